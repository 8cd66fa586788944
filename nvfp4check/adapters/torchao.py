"""torchao's NVFP4 (`torchao.prototype.mx_formats`), 0.15 and later."""

import torch
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, nvfp4_quantize
from torchao.prototype.mx_formats.utils import from_blocked, to_blocked

from nvfp4check.ops import UnsupportedError

_BLOCK = 16


def quantize(
    x: torch.Tensor, global_decode_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize by `nvfp4_quantize` with a per-tensor scale."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise UnsupportedError(f"torchao takes bfloat16 and float32, not {x.dtype}")
    if not x.is_contiguous():
        raise UnsupportedError("torchao takes contiguous tensors")
    scales, codes = nvfp4_quantize(x, _BLOCK, global_decode_scale)
    return codes.view(torch.uint8), scales


def dequantize(
    packed_codes: torch.Tensor,
    block_scales: torch.Tensor,
    global_decode_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dequantize by `NVFP4Tensor.dequantize`."""
    tensor = NVFP4Tensor(packed_codes, block_scales, _BLOCK, dtype, global_decode_scale)
    values: torch.Tensor = tensor.dequantize(dtype)
    return values


def swizzle(block_scales: torch.Tensor) -> torch.Tensor:
    """Swizzle by `to_blocked`."""
    flat: torch.Tensor = to_blocked(block_scales)
    return flat


def unswizzle(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Read the tiles back by `from_blocked`."""
    scales: torch.Tensor = from_blocked(flat, rows, columns)
    return scales
