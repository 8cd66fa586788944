"""FlashInfer's NVFP4 kernels on Blackwell, by their documented entry points.

`nvfp4_quantize` and `mm_fp4` take the global encode scale and 128x4 scales. Their
arguments are held to the source at fb28d724; not run by this project, which has no such GPU.
"""

import flashinfer
import torch

from nvfp4check.ops import UnsupportedError


def quantize(
    x: torch.Tensor, global_decode_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize by `nvfp4_quantize` with row-major scales."""
    if x.dtype == torch.float32:
        raise UnsupportedError("FlashInfer takes float16 and bfloat16, not float32")
    if not x.is_contiguous() or x.shape[0] == 0:
        raise UnsupportedError("FlashInfer takes contiguous tensors of at least one row")
    codes, scales = flashinfer.nvfp4_quantize(
        x,
        (1.0 / global_decode_scale).reshape(1),
        sfLayout=flashinfer.SfLayout.layout_linear,
        do_shuffle=False,
    )
    row_major = scales.view(torch.float8_e4m3fn).reshape(-1, x.shape[1] // 16)
    return codes.view(torch.uint8), row_major[: x.shape[0]]


def swizzle(block_scales: torch.Tensor) -> torch.Tensor:
    """Swizzle by `nvfp4_block_scale_interleave`."""
    rows, columns = block_scales.shape
    if rows == 0:
        raise UnsupportedError("FlashInfer takes at least one row")
    padded = torch.zeros(
        -(-rows // 128) * 128, -(-columns // 4) * 4, dtype=torch.uint8, device=block_scales.device
    )
    padded[:rows, :columns] = block_scales.view(torch.uint8)
    flat: torch.Tensor = flashinfer.nvfp4_block_scale_interleave(padded)
    return flat


def matmul(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply by `mm_fp4` with its CUTLASS backend."""
    if dtype == torch.float32 or min(a_codes.shape[0], b_codes.shape[0]) == 0:
        raise UnsupportedError("mm_fp4 gives bfloat16 and float16 of at least one row")
    if a_codes.shape[1] % 16 or b_codes.shape[0] % 32:
        raise UnsupportedError("mm_fp4 takes K and N that are multiples of 32")
    product: torch.Tensor = flashinfer.mm_fp4(
        a_codes.contiguous(),
        b_codes.contiguous().T,
        swizzle(a_scales).reshape(-1, -(-a_scales.shape[1] // 4) * 4),
        swizzle(b_scales).reshape(-1, -(-b_scales.shape[1] // 4) * 4).T,
        alpha,
        dtype,
        backend="cutlass",
    )
    return product
