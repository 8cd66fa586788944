"""Quantise a matrix to NVFP4 in one pass.

M rows, K columns, C = K/16.

Contract:
    block scale and codes as `nvfp4check.kernels.numeric` says, bit for bit the reference under the
    conventions `engine`, `engine-vllm` and `modelopt`
    linear        block scales [M, C] in row-major order
    swizzled      the same bytes in 128x4 tiles, padding zero, written in the same pass
    non-finite    NaN is left out of its block's largest magnitude (modelopt: makes it NaN)
"""

from enum import StrEnum

import torch
import triton
import triton.language as tl

from nvfp4check.kernels.arch import INTERPRETER, Architecture, architecture_of
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
    power_of_two,
    rows_of,
)
from nvfp4check.kernels.numeric import CONVENTIONS, quantize_tile
from nvfp4ref.formats import BLOCK_SIZE, SCALE_TILE_COLUMNS, SCALE_TILE_ROWS


class ScaleLayout(StrEnum):
    """Where a block scale is stored."""

    LINEAR = "linear"
    SWIZZLED = "swizzled-128x4"


@triton.jit
def swizzled_offset(rows, columns, tiles_across):
    """Return where the 128x4 layout has scale (row, column)."""
    tile = (rows // 128).to(tl.int64) * tiles_across + columns // 4
    return tile * 512 + (rows % 32) * 16 + (rows % 128) // 32 * 4 + columns % 4


@triton.jit
def store_quantized(
    codes,
    scale_bytes,
    codes_ptr,
    scales_ptr,
    offs_m,
    pid_k,
    M,
    K,
    tiles_across,
    BLOCK_K: tl.constexpr,
    SWIZZLED: tl.constexpr,
):
    """Store a tile's packed codes and block scales; zero the scale padding if swizzled."""
    offs_byte = pid_k * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    in_codes = (offs_m[:, None] < M) & (offs_byte[None, :] < K // 2)
    rows = offs_m.to(tl.int64)[:, None]
    tl.store(codes_ptr + rows * (K // 2) + offs_byte[None, :], codes, mask=in_codes)

    offs_c = pid_k * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)
    in_scales = (offs_m[:, None] < M) & (offs_c[None, :] < K // 16)
    if SWIZZLED:
        places = swizzled_offset(offs_m[:, None], offs_c[None, :], tiles_across)
        padded = tl.where(in_scales, scale_bytes, 0).to(tl.uint8)
        inside = (offs_m[:, None] < (M + 127) // 128 * 128) & (offs_c[None, :] < tiles_across * 4)
        tl.store(scales_ptr + places, padded, mask=inside)
    else:
        places = rows * (K // 16) + offs_c[None, :]
        tl.store(scales_ptr + places, scale_bytes.to(tl.uint8), mask=in_scales)


@triton.jit
def _quantize_kernel(
    x_ptr,
    decode_ptr,
    codes_ptr,
    scales_ptr,
    M,
    K,
    stride_xm,
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

    # K is a multiple of 16, so the mask never cuts a block.
    inside = (offs_m[:, None] < M) & (offs_k[None, :] < K)
    rows = offs_m.to(tl.int64)[:, None] * stride_xm
    x = tl.load(x_ptr + rows + offs_k[None, :], mask=inside, other=0.0).to(tl.float32)
    decode = tl.load(decode_ptr)

    codes, scale_bytes = quantize_tile(x, decode, BLOCK_M, BLOCK_K, CONVENTION, NATIVE)
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


def tile_shape(arch: Architecture, rows: int, columns: int) -> tuple[int, int]:
    """Return BLOCK_M and BLOCK_K of an element-wise kernel over [rows, columns]."""
    elements = 1 << 16 if arch is INTERPRETER else 1 << 12
    block_k = power_of_two(columns, least=BLOCK_SIZE, most=min(elements, 1024))
    block_m = power_of_two(rows, most=elements // block_k)
    return block_m, block_k


def empty_quantized(
    rows: int, columns: int, layout: ScaleLayout, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unwritten packed codes and block scales of a matrix."""
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
    shape: tuple[int, ...] = (rows, columns // BLOCK_SIZE)
    if layout is ScaleLayout.SWIZZLED:
        padded_rows = ceil_div(rows, SCALE_TILE_ROWS) * SCALE_TILE_ROWS
        shape = (padded_rows * scale_tiles_across(columns) * SCALE_TILE_COLUMNS,)
    return codes, torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)


def scale_tiles_across(columns: int) -> int:
    """Return how many 128x4 tiles cover the block scales of a row."""
    return ceil_div(columns // BLOCK_SIZE, SCALE_TILE_COLUMNS)


def covered(rows: int, columns: int, layout: ScaleLayout) -> tuple[int, int]:
    """Return the rows and columns a grid must cover: the scale padding too if swizzled."""
    if layout is ScaleLayout.LINEAR:
        return rows, columns
    return (
        ceil_div(rows, SCALE_TILE_ROWS) * SCALE_TILE_ROWS,
        scale_tiles_across(columns) * SCALE_TILE_COLUMNS * BLOCK_SIZE,
    )


def check_convention(convention: str) -> str:
    """Return a convention the kernels know, as a plain string.

    Raises:
        ValueError: They do not know it.
    """
    if str(convention) not in CONVENTIONS:
        raise ValueError(
            f"convention {str(convention)!r}: the kernels know {', '.join(CONVENTIONS)}"
        )
    return str(convention)


@declares(reciprocal="ieee")
def quantize(
    x: torch.Tensor,
    global_decode_scale: torch.Tensor,
    convention: str = "engine",
    *,
    scale_layout: ScaleLayout = ScaleLayout.LINEAR,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the packed codes uint8 [M, K/2] and block scales float8_e4m3fn of x [M, K].

    The block scales are [M, C] in the linear layout, flat and padded in the swizzled one.

    Raises:
        ValueError: x is no matrix of float32, bfloat16 or float16 with K a multiple of 16, the
            global scale is not one float32 on its device, or the convention is not known.
    """
    check_dtype("x", x, *INPUT_DTYPES)
    check_shape("x", x, None, None)
    check_blocks("x", x.shape[1])
    check_scalar("global_decode_scale", global_decode_scale)
    check_device(x=x, global_decode_scale=global_decode_scale)
    name = check_convention(convention)
    arch = architecture_of(x)
    x = rows_of(x)
    (M, K), device = x.shape, x.device
    codes, scales = empty_quantized(M, K, scale_layout, device)
    rows, columns = covered(M, K, scale_layout)
    block_m, block_k = tile_shape(arch, rows, columns)
    launch(
        _quantize_kernel,
        (ceil_div(columns, block_k) * ceil_div(rows, block_m),),
        x,
        global_decode_scale,
        codes,
        scales.view(torch.uint8),
        M,
        K,
        x.stride(0),
        scale_tiles_across(K),
        on=x,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        CONVENTION=name,
        SWIZZLED=scale_layout is ScaleLayout.SWIZZLED,
        NATIVE=arch.converts_e2m1,
    )
    return codes, scales
