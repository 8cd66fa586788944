"""The RMS norm of x, or of x + residual, quantised in the pass that forms it.

M rows, K columns.

Contract:
    residual  x + residual in float32, rounded to the dtype of x, stored; the norm is of what is
              stored
    norm      x * rsqrt(mean(x**2) + eps) * weight in float32: the mean summed in any order, rsqrt
              as the GPU's instruction gives it (2 ulp), nothing rounded to 16 bit
    then      as `nvfp4check.kernels.quantize`
    width     a row is held in registers, so K is at most 65536
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nvfp4check.kernels.arch import INTERPRETER, Architecture, architecture_of
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
    power_of_two,
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
)
from nvfp4ref.formats import BLOCK_SIZE

MAX_COLUMNS = 65536


@triton.jit
def _rms_norm_quantize_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    summed_ptr,
    decode_ptr,
    codes_ptr,
    scales_ptr,
    M,
    K,
    eps,
    stride_xm,
    stride_rm,
    tiles_across,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CONVENTION: tl.constexpr,
    SWIZZLED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    inside = (offs_m[:, None] < M) & (offs_k[None, :] < K)
    rows = offs_m.to(tl.int64)[:, None]
    x = tl.load(x_ptr + rows * stride_xm + offs_k[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + rows * stride_rm + offs_k[None, :], mask=inside, other=0.0
        )
        summed = (x + residual.to(tl.float32)).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + rows * K + offs_k[None, :], summed, mask=inside)
        x = summed.to(tl.float32)
    weight = tl.load(weight_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)

    mean = tl.sum(x * x, axis=1) / K
    values = x * tl.rsqrt(mean + eps)[:, None] * weight[None, :]

    decode = tl.load(decode_ptr)
    codes, scale_bytes = quantize_tile(values, decode, BLOCK_M, BLOCK_K, CONVENTION, NATIVE)
    store_quantized(
        codes, scale_bytes, codes_ptr, scales_ptr, offs_m, 0, M, K, tiles_across, BLOCK_K, SWIZZLED
    )


@dataclass(frozen=True, slots=True)
class RowTile:
    """Rows and columns that a program holds, and its warps."""

    block_m: int
    block_k: int
    warps: int


def row_tile(arch: Architecture, rows: int, columns: int) -> RowTile:
    """Return the tile that holds whole rows: 32 elements a thread, more where rows are long."""
    block_k = power_of_two(columns, least=BLOCK_SIZE * 4, most=MAX_COLUMNS)
    most = 1 << 16 if arch is INTERPRETER else 1 << 12
    block_m = power_of_two(rows, most=max(1, most // block_k))
    return RowTile(block_m, block_k, power_of_two(block_m * block_k // 1024, most=16))


@declares(reciprocal="ieee", batch_invariant=True)
def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    global_decode_scale: torch.Tensor,
    residual: torch.Tensor | None = None,
    convention: str = "engine",
    *,
    scale_layout: ScaleLayout = ScaleLayout.LINEAR,
) -> tuple[torch.Tensor, ...]:
    """Return packed codes and block scales of the norm, and x + residual if there is a residual.

    Raises:
        ValueError: x is no matrix of a float dtype with K a multiple of 16 and at most 65536, the
            weight or the residual does not fit it, or the global scale or the convention is none.
    """
    check_dtype("x", x, *INPUT_DTYPES)
    check_shape("x", x, None, None)
    M, K = x.shape
    check_blocks("x", K)
    if not 0 < K <= MAX_COLUMNS:
        raise ValueError(f"x: {K} columns, expected 16 to {MAX_COLUMNS}")
    check_dtype("weight", weight, *INPUT_DTYPES)
    check_shape("weight", weight, K)
    check_scalar("global_decode_scale", global_decode_scale)
    check_device(x=x, weight=weight, global_decode_scale=global_decode_scale)
    if residual is not None:
        check_dtype("residual", residual, x.dtype)
        check_shape("residual", residual, M, K)
        check_device(x=x, residual=residual)
        residual = rows_of(residual)
    name = check_convention(convention)
    arch = architecture_of(x)
    x = rows_of(x)
    codes, scales = empty_quantized(M, K, scale_layout, x.device)
    summed = x if residual is None else torch.empty(M, K, dtype=x.dtype, device=x.device)
    rows, columns = covered(M, K, scale_layout)
    tile = row_tile(arch, rows, columns)
    launch(
        _rms_norm_quantize_kernel,
        (ceil_div(rows, tile.block_m),),
        x,
        x if residual is None else residual,
        weight.contiguous(),
        summed,
        global_decode_scale,
        codes,
        scales.view(torch.uint8),
        M,
        K,
        float(eps),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        scale_tiles_across(K),
        on=x,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        HAS_RESIDUAL=residual is not None,
        CONVENTION=name,
        SWIZZLED=scale_layout is ScaleLayout.SWIZZLED,
        NATIVE=arch.converts_e2m1,
        num_warps=tile.warps,
    )
    return (codes, scales) if residual is None else (codes, scales, summed)
