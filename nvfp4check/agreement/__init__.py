"""Agreement of two runs: layers, routing, logits, and the verdict that the positions support."""
