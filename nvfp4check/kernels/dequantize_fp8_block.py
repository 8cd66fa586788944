"""FP8 weights with one float32 scale a 128 x 128 block, back to values.

N rows, K columns, both of any size.

Contract:
    value = element * scale_inv[n // 128, k // 128], one product rounded to float32, then to the
    dtype, nearest even; NaN bytes give NaN. "inv" or not, it multiplies.
    Bit for bit the reference.
"""

import torch
import triton
import triton.language as tl

from nvfp4check.kernels.arch import INTERPRETER, Architecture, architecture_of
from nvfp4check.kernels.grid import place_of
from nvfp4check.kernels.launch import (
    INPUT_DTYPES,
    ceil_div,
    check_device,
    check_dtype,
    check_shape,
    launch,
    rows_of,
)
from nvfp4check.kernels.numeric import decode_e4m3
from nvfp4ref.formats import FP8_BLOCK

BLOCK_ROWS, BLOCK_COLUMNS = FP8_BLOCK.block_shape


@triton.jit
def _dequantize_fp8_block_kernel(
    w_ptr,
    scale_ptr,
    out_ptr,
    N,
    K,
    stride_wn,
    stride_sn,
    stride_sk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A tile lies inside one block of 128 x 128, so its scale is one number.
    pid_n, pid_k = place_of(tl.cdiv(K, BLOCK_K))
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (offs_n[:, None] < N) & (offs_k[None, :] < K)
    rows = offs_n.to(tl.int64)[:, None]
    w = tl.load(w_ptr + rows * stride_wn + offs_k[None, :], mask=inside, other=0)
    scale_row = pid_n * BLOCK_N // 128
    scale_column = pid_k * BLOCK_K // 128
    scale = tl.load(scale_ptr + scale_row * stride_sn + scale_column * stride_sk)
    values = decode_e4m3(w.to(tl.int32)) * scale
    tl.store(out_ptr + rows * K + offs_k[None, :], values.to(out_ptr.dtype.element_ty), mask=inside)


def fp8_tile(arch: Architecture) -> tuple[int, int]:
    """Return BLOCK_N and BLOCK_K, which divide 128."""
    return (BLOCK_ROWS if arch is INTERPRETER else 32), BLOCK_COLUMNS


def dequantize_fp8_block(
    w: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the values [N, K] of elements float8_e4m3fn [N, K] under their scales.

    Raises:
        ValueError: The scales are not one for each block, or a dtype or device is wrong.
    """
    check_dtype("w", w, torch.float8_e4m3fn)
    check_shape("w", w, None, None)
    N, K = w.shape
    check_dtype("scale_inv", scale_inv, torch.float32)
    check_shape("scale_inv", scale_inv, ceil_div(N, BLOCK_ROWS), ceil_div(K, BLOCK_COLUMNS))
    check_device(w=w, scale_inv=scale_inv)
    if dtype not in INPUT_DTYPES:
        raise ValueError(f"dtype {dtype}: expected float32, bfloat16 or float16")
    raw = rows_of(w).view(torch.uint8)
    out = torch.empty(N, K, dtype=dtype, device=w.device)
    block_n, block_k = fp8_tile(architecture_of(w))
    launch(
        _dequantize_fp8_block_kernel,
        (ceil_div(K, block_k) * ceil_div(N, block_n),),
        raw,
        scale_inv,
        out,
        N,
        K,
        raw.stride(0),
        scale_inv.stride(0),
        scale_inv.stride(1),
        on=w,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )
    return out
