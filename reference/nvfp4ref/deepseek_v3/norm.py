"""RMSNorm.

Contract:
    y = x / sqrt(mean(x**2) + eps) * weight, along the last dimension
    arithmetic  float32 for bfloat16 and float32 input, float64 for float64; one rounding at the
                end to the dtype of x (transformers rounds once more before the weight)
"""

import torch


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of this dtype are computed: float64, or else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x [T, D] normalised and scaled by weight [D], in the dtype of x."""
    wide = x.to(arithmetic(x.dtype))
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * inverse * weight.to(wide.dtype)).to(x.dtype)
