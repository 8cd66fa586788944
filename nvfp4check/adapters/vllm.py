"""vLLM's NVFP4 kernels on Blackwell (`vllm._custom_ops`), by their documented entry points.

Their arguments are held to the source of release 0.32.0; not run by this project, which has no such
GPU. What runs on a CPU is `vllm_emulation`.
"""

import torch
from vllm import _custom_ops

from nvfp4check.ops import UnsupportedError


def quantize(
    x: torch.Tensor, global_decode_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize by `scaled_fp4_quant` with row-major scales."""
    if x.dtype == torch.float32 or x.shape[0] == 0:
        raise UnsupportedError("vLLM takes float16 and bfloat16 of at least one row")
    codes, scales = _custom_ops.scaled_fp4_quant(
        x, (1.0 / global_decode_scale).reshape(1), is_sf_swizzled_layout=False
    )
    return codes, scales.view(torch.float8_e4m3fn).reshape(x.shape[0], -1)


def _tiles(block_scales: torch.Tensor) -> torch.Tensor:
    rows, columns = block_scales.shape
    row_tiles, column_tiles = -(-rows // 128), -(-columns // 4)
    padded = torch.zeros(
        row_tiles * 128, column_tiles * 4, dtype=torch.uint8, device=block_scales.device
    )
    padded[:rows, :columns] = block_scales.view(torch.uint8)
    tiles = padded.view(row_tiles, 4, 32, column_tiles, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape).view(torch.float8_e4m3fn)


def matmul(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply by `cutlass_scaled_fp4_mm`."""
    if dtype == torch.float32 or min(a_codes.shape[0], b_codes.shape[0]) == 0:
        raise UnsupportedError("cutlass_scaled_fp4_mm gives bfloat16 and float16")
    if a_codes.shape[1] % 16 or b_codes.shape[0] % 32:
        raise UnsupportedError("cutlass_scaled_fp4_mm takes K and N that are multiples of 32")
    product: torch.Tensor = _custom_ops.cutlass_scaled_fp4_mm(
        a_codes.contiguous(),
        b_codes.contiguous(),
        _tiles(a_scales),
        _tiles(b_scales),
        alpha,
        dtype,
    )
    return product
