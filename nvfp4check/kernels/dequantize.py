"""NVFP4 codes and scales back to values.

M rows, K columns, C = K/16.

Contract:
    value = code * (block scale * global decode scale), both products rounded to float32, then to
    the dtype, nearest even; code 8 gives -0.0; a block scale NaN makes its 16 values NaN
    Bit for bit the reference.
"""

import torch
import triton
import triton.language as tl

from nvfp4check.kernels.arch import architecture_of
from nvfp4check.kernels.grid import place_of
from nvfp4check.kernels.launch import (
    INPUT_DTYPES,
    ceil_div,
    check_device,
    check_dtype,
    check_scalar,
    check_shape,
    launch,
    rows_of,
)
from nvfp4check.kernels.numeric import decode_e2m1_pairs, decode_e4m3
from nvfp4check.kernels.quantize import tile_shape
from nvfp4ref.formats import BLOCK_SIZE


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scales_ptr,
    decode_ptr,
    out_ptr,
    M,
    K,
    stride_cm,
    stride_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NATIVE: tl.constexpr,
):
    pid_m, pid_k = place_of(tl.cdiv(K, BLOCK_K))
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_byte = pid_k * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    offs_c = pid_k * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = offs_m.to(tl.int64)[:, None]
    in_rows = offs_m[:, None] < M

    packed = tl.load(
        codes_ptr + rows * stride_cm + offs_byte[None, :],
        mask=in_rows & (offs_byte[None, :] < K // 2),
        other=0,
    )
    scale_bytes = tl.load(
        scales_ptr + rows * stride_sm + offs_c[None, :],
        mask=in_rows & (offs_c[None, :] < K // 16),
        other=0,
    )
    scales = decode_e4m3(scale_bytes.to(tl.int32)) * tl.load(decode_ptr)

    # Both neighbours of a byte share its scale, so they are scaled before they are interleaved.
    even, odd = decode_e2m1_pairs(packed, NATIVE)
    blocks: tl.constexpr = (BLOCK_M, BLOCK_K // 16, 8)
    even = tl.reshape(even, blocks) * scales[:, :, None]
    odd = tl.reshape(odd, blocks) * scales[:, :, None]
    values = tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_K))
    tl.store(
        out_ptr + rows * K + offs_k[None, :],
        values.to(out_ptr.dtype.element_ty),
        mask=in_rows & (offs_k[None, :] < K),
    )


def dequantize(
    packed_codes: torch.Tensor,
    block_scales: torch.Tensor,
    global_decode_scale: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the values [M, K] of packed codes [M, K/2] and block scales [M, C].

    Raises:
        ValueError: The shapes, dtypes or devices do not fit together.
    """
    check_dtype("packed_codes", packed_codes, torch.uint8)
    check_shape("packed_codes", packed_codes, None, None)
    check_dtype("block_scales", block_scales, torch.float8_e4m3fn)
    M, K = packed_codes.shape[0], packed_codes.shape[1] * 2
    if K % BLOCK_SIZE:
        raise ValueError(f"packed_codes: {K} codes a row, expected a multiple of {BLOCK_SIZE}")
    check_shape("block_scales", block_scales, M, K // BLOCK_SIZE)
    check_scalar("global_decode_scale", global_decode_scale)
    check_device(
        packed_codes=packed_codes,
        block_scales=block_scales,
        global_decode_scale=global_decode_scale,
    )
    if dtype not in INPUT_DTYPES:
        raise ValueError(f"dtype {dtype}: expected float32, bfloat16 or float16")
    arch = architecture_of(packed_codes)
    codes, scales = rows_of(packed_codes), rows_of(block_scales).view(torch.uint8)
    out = torch.empty(M, K, dtype=dtype, device=codes.device)
    block_m, block_k = tile_shape(arch, M, K)
    launch(
        _dequantize_kernel,
        (ceil_div(K, block_k) * ceil_div(M, block_m),),
        codes,
        scales,
        global_decode_scale,
        out,
        M,
        K,
        codes.stride(0),
        scales.stride(0),
        on=codes,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        NATIVE=arch.converts_e2m1,
    )
    return out
