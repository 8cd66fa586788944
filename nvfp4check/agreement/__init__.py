"""Agreement of two runs: layers, routing, logits, and the verdict that the positions support."""

from nvfp4check.agreement.assertion import assert_agrees

__all__ = ["assert_agrees"]
