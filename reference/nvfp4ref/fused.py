"""Activations formed and quantised in one step.

Contract:
    silu_mul          gate / (1 + exp(-gate)) * up in float64, rounded once to float32
    rms_norm          x / sqrt(mean(x**2) + eps) * weight in float64, rounded once to float32
    residual          x + residual, rounded once to the dtype of x; the norm is of the rounded sum
    then              `nvfp4ref.nvfp4.quantize` under the named convention

Kernels form these values in float32 and some round them to 16 bit before they quantise, so codes
may differ where the value lies within that error of a rounding boundary, and nowhere else.
"""

import torch

from nvfp4ref.conventions import Convention
from nvfp4ref.nvfp4 import quantize
from nvfp4ref.rounding import round_to


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up in float64."""
    wide = gate.double()
    return wide * wide.sigmoid() * up.double()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the RMS norm of each row in float64."""
    wide = x.double()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return wide / (mean_square + eps).sqrt() * weight.double()


def add_residual(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Return x + residual rounded once to the dtype of x."""
    return round_to(x.double() + residual.double(), x.dtype)


def silu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    global_decode_scale: torch.Tensor,
    convention: Convention,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed codes and block scales of silu(gate) * up."""
    return quantize(silu_mul(gate, up).float(), global_decode_scale, convention)


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    global_decode_scale: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    convention: Convention,
) -> tuple[torch.Tensor, ...]:
    """Return packed codes and block scales of the norm, and the new residual if there is one."""
    if residual is None:
        return quantize(rms_norm(x, weight, eps).float(), global_decode_scale, convention)
    summed = add_residual(x, residual)
    normed = rms_norm(summed, weight, eps).float()
    return (*quantize(normed, global_decode_scale, convention), summed)
