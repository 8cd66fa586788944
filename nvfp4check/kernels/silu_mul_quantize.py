"""silu(gate) * up, quantised in the pass that forms it.

M rows, K columns.

Contract:
    value     gate / (1 + exp(-gate)) * up in float32, never rounded to 16 bit; exp and the quotient
              as the GPU's fast instructions give them (2 ulp)
    then      as `nvfp4check.kernels.quantize`
"""

import torch
import triton
import triton.language as tl

from nvfp4check.kernels.arch import architecture_of
from nvfp4check.kernels.grid import place_of
from nvfp4check.kernels.launch import (
    INPUT_DTYPES,
    ceil_div,
    check_blocks,
    check_device,
    check_dtype,
    check_scalar,
    check_shape,
    declares,
    launch,
    rows_of,
)
from nvfp4check.kernels.numeric import quantize_tile
from nvfp4check.kernels.quantize import (
    ScaleLayout,
    check_convention,
    covered,
    empty_quantized,
    scale_tiles_across,
    store_quantized,
    tile_shape,
)


@triton.jit
def _silu_mul_quantize_kernel(
    gate_ptr,
    up_ptr,
    decode_ptr,
    codes_ptr,
    scales_ptr,
    M,
    K,
    stride_gm,
    stride_um,
    tiles_across,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CONVENTION: tl.constexpr,
    SWIZZLED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    pid_m, pid_k = place_of(tl.cdiv(tiles_across * 64 if SWIZZLED else K, BLOCK_K))
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (offs_m[:, None] < M) & (offs_k[None, :] < K)
    rows = offs_m.to(tl.int64)[:, None]
    gate = tl.load(gate_ptr + rows * stride_gm + offs_k[None, :], mask=inside, other=0.0)
    up = tl.load(up_ptr + rows * stride_um + offs_k[None, :], mask=inside, other=0.0)
    gate = gate.to(tl.float32)
    values = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)

    decode = tl.load(decode_ptr)
    codes, scale_bytes = quantize_tile(values, decode, BLOCK_M, BLOCK_K, CONVENTION, NATIVE)
    store_quantized(
        codes,
        scale_bytes,
        codes_ptr,
        scales_ptr,
        offs_m,
        pid_k,
        M,
        K,
        tiles_across,
        BLOCK_K,
        SWIZZLED,
    )


@declares(reciprocal="ieee")
def silu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    global_decode_scale: torch.Tensor,
    convention: str = "engine",
    *,
    scale_layout: ScaleLayout = ScaleLayout.LINEAR,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed codes and block scales of silu(gate) * up, both [M, K].

    Raises:
        ValueError: gate and up are not matrices of one shape and float dtype with K a multiple of
            16, or the global scale or the convention is none.
    """
    check_dtype("gate", gate, *INPUT_DTYPES)
    check_shape("gate", gate, None, None)
    check_blocks("gate", gate.shape[1])
    check_dtype("up", up, gate.dtype)
    check_shape("up", up, *gate.shape)
    check_scalar("global_decode_scale", global_decode_scale)
    check_device(gate=gate, up=up, global_decode_scale=global_decode_scale)
    name = check_convention(convention)
    arch = architecture_of(gate)
    gate, up = rows_of(gate), rows_of(up)
    M, K = gate.shape
    codes, scales = empty_quantized(M, K, scale_layout, gate.device)
    rows, columns = covered(M, K, scale_layout)
    block_m, block_k = tile_shape(arch, rows, columns)
    launch(
        _silu_mul_quantize_kernel,
        (ceil_div(columns, block_k) * ceil_div(rows, block_m),),
        gate,
        up,
        global_decode_scale,
        codes,
        scales.view(torch.uint8),
        M,
        K,
        gate.stride(0),
        up.stride(0),
        scale_tiles_across(K),
        on=gate,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        CONVENTION=name,
        SWIZZLED=scale_layout is ScaleLayout.SWIZZLED,
        NATIVE=arch.converts_e2m1,
    )
    return codes, scales
