"""FP8 with one scale for a whole weight, or one for each of its rows.

M tokens, N rows of the weight, K columns.

Contract:
    weight      value = element * scale, one product rounded to float32, then to `dtype`, nearest
                even; the scale is one number, or one for each row
    STATIC      x * (1 / scale) with the one stored scale, both rounded to float32; E4M3 of that,
                saturating
    PER_TOKEN   x / scale rounded to float32 and to E4M3, scale = max(amax / 448, 1 / (448 * 512))
                of each token, at run time
    product     of the elements exact in float64 (a multiple of 2**-18 below 2**18 * K), times both
                scales in float64
    NaN         an element NaN or a scale NaN gives NaN; a NaN in a token makes its scale NaN

Sources: ModelOpt's FP8 and FP8_PER_CHANNEL_PER_TOKEN, float-quantized of compressed-tensors; for
the input vLLM's csrc, static_scaled_fp8_quant and dynamic_per_token_scaled_fp8_quant.
"""

from enum import StrEnum

import torch

from nvfp4ref import e4m3
from nvfp4ref.formats import E4M3

#: Smallest scale of a token. vLLM, min_scaling_factor.
SMALLEST_SCALE = 1.0 / (E4M3.max * 512.0)


class Fp8Activations(StrEnum):
    """Where the scale of an FP8 weight's input comes from."""

    #: The input is not quantised.
    NONE = "none"
    STATIC = "static"
    PER_TOKEN = "per-token"


def row_scales(weight_scale: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the scales of a weight of so many rows as float32 [1] or [N].

    Raises:
        ValueError: It is neither one scale nor one a row.
    """
    if weight_scale.numel() != 1 and weight_scale.shape not in ((rows,), (rows, 1)):
        raise ValueError(f"scales {list(weight_scale.shape)} for {rows} rows: expected one or each")
    return weight_scale.reshape(-1).to(torch.float32)


def dequantize(
    w: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the values [N, K] of elements float8_e4m3fn [N, K]; the scale is [], [N] or [N, 1]."""
    return (e4m3.decode(w) * row_scales(weight_scale, len(w)).unsqueeze(1)).to(dtype)


def quantize_static(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 values of x [M, K] under its stored scale, as float32."""
    reciprocal = 1.0 / input_scale.reshape(()).to(torch.float32)
    return e4m3.round_(x.to(torch.float32) * reciprocal)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the E4M3 values of x [M, K] as float32, and the scale of each token [M, 1]."""
    values = x.to(torch.float32)
    scales = (values.abs().amax(dim=-1, keepdim=True) / E4M3.max).clamp(min=SMALLEST_SCALE)
    return e4m3.round_(values / scales), scales


def product(
    a: torch.Tensor, a_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor
) -> torch.Tensor:
    """Return the product in float64 [M, N] of E4M3 values a [M, K] and w [N, K].

    a_scales is [] or [M, 1], w_scales [1] or [N].
    """
    return a.double() @ w.double().T * a_scales.double() * w_scales.double()
