"""nvfp4ref: the oracle. Pure PyTorch and the standard library; slow, obvious, believed."""
