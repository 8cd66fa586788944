"""FP8 with 128 x 128 blocks: the weights of DeepSeek-V3's own checkpoints.

N rows, K columns, both of any size: the last blocks of a row or column may be partial.

Contract:
    dequantize  value = element * scale_inv[n // 128, k // 128], one product rounded to float32,
                then to `dtype`, nearest even. "inv" or not, it multiplies.
    quantize    scale_inv = amax of the block / 448, or 1 where the block is all zero;
                element = E4M3(w / scale_inv), saturating; both divisions rounded to float32.
                With `ScaleFormat.UE8M0` the scale is rounded up to a power of two, and is still
                a float32
    partial     a block that the edge cuts has its own scale, from the elements that are there
    NaN         a scale or an element NaN gives NaN; in quantize it makes the scale of its block
                NaN and so all elements of the block

Bit-exact with DeepSeek-V3 inference/kernel.py, weight_dequant, run in float32 or bfloat16.
"""

from enum import StrEnum

import torch

from nvfp4ref import e4m3, e8m0
from nvfp4ref.formats import E4M3, FP8_BLOCK


class ScaleFormat(StrEnum):
    """Which float32 values a scale may take."""

    FLOAT32 = "float32"
    #: Powers of two, as `scale_fmt: ue8m0` of DeepSeek-V3.1 says.
    UE8M0 = "ue8m0"


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Return how many blocks a weight [rows, columns] has down and across."""
    block_rows, block_columns = FP8_BLOCK.block_shape
    return -(-rows // block_rows), -(-columns // block_columns)


def dequantize(
    w: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the values [N, K] of elements float8_e4m3fn [N, K] under their scales.

    Raises:
        ValueError: The scales are not one for each block of 128 x 128.
    """
    rows, columns = w.shape
    if tuple(scale_inv.shape) != scale_shape(rows, columns):
        raise ValueError(
            f"a weight [{rows}, {columns}] takes scale_inv {list(scale_shape(rows, columns))}, "
            f"found {list(scale_inv.shape)}"
        )
    return (e4m3.decode(w) * _spread(scale_inv.float(), rows, columns)).to(dtype)


def quantize(
    w: torch.Tensor, scale_format: ScaleFormat = ScaleFormat.FLOAT32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the elements float8_e4m3fn [N, K] and scales float32 of a weight [N, K]."""
    rows, columns = w.shape
    values = w.float()
    largest = torch.tensor(E4M3.max, dtype=torch.float32, device=w.device)
    scale_inv = _block_amax(values) / largest
    scale_inv = torch.where(scale_inv == 0, 1.0, scale_inv)
    if scale_format is ScaleFormat.UE8M0:
        scale_inv = e8m0.decode(e8m0.encode(scale_inv, e8m0.Rounding.UP))
    elements = e4m3.encode(values / _spread(scale_inv, rows, columns), e4m3.Overflow.SATURATE)
    return elements.view(torch.float8_e4m3fn), scale_inv


def _spread(scale_inv: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the scale of each element [rows, columns]."""
    block_rows, block_columns = FP8_BLOCK.block_shape
    down = torch.arange(rows, device=scale_inv.device) // block_rows
    across = torch.arange(columns, device=scale_inv.device) // block_columns
    return scale_inv[down][:, across]


def _block_amax(values: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each block; padding zeros do not count."""
    rows, columns = values.shape
    down, across = scale_shape(rows, columns)
    block_rows, block_columns = FP8_BLOCK.block_shape
    padding = (0, across * block_columns - columns, 0, down * block_rows - rows)
    padded = torch.nn.functional.pad(values.abs(), padding)
    return padded.view(down, block_rows, across, block_columns).amax(dim=(1, 3))
