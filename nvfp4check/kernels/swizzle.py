"""Block scales between row-major order and the 128x4 tiles of tensor cores.

M rows, C scale columns.

Contract:
    swizzle    scale (r, c) to ((r // 128) * tiles across + c // 4) * 512
                           + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4;
               every padding byte zero, each output byte written once
    unswizzle  back; what the padding holds has no effect
    Bytes are copied, so NaN and -0.0 stay what they are.
"""

import torch
import triton
import triton.language as tl

from nvfp4check.kernels.arch import INTERPRETER, Architecture, architecture_of
from nvfp4check.kernels.grid import place_of
from nvfp4check.kernels.launch import (
    ceil_div,
    check_dtype,
    check_shape,
    launch,
    power_of_two,
    rows_of,
)
from nvfp4ref.formats import SCALE_TILE_COLUMNS, SCALE_TILE_ROWS

_SCALE_DTYPES = (torch.float8_e4m3fn, torch.uint8)


@triton.jit
def _places(band, part, TILES: tl.constexpr):
    """Return the row and the column within a band of tiles, of each element read in order."""
    group = tl.arange(0, 4)[:, None, None]
    row = group * 32 + tl.arange(0, 32)[None, :, None]
    column = part * (TILES * 4) + tl.arange(0, TILES * 4)[None, None, :]
    return band * 128 + row, column


@triton.jit
def _band_places(band, part, tiles_across, TILES: tl.constexpr):
    """Return the place of each of the TILES * 512 bytes written in order, and whether it exists."""
    place = tl.arange(0, TILES * 512)
    first = band.to(tl.int64) * tiles_across + part * TILES
    return first * 512 + place, part * TILES + place // 512 < tiles_across


@triton.jit
def _swizzle_kernel(linear_ptr, flat_ptr, M, C, stride_sm, tiles_across, TILES: tl.constexpr):
    band, part = place_of(tl.cdiv(tiles_across, TILES))
    row, column = _places(band, part, TILES)
    scales = tl.load(
        linear_ptr + row.to(tl.int64) * stride_sm + column, mask=(row < M) & (column < C), other=0
    )
    # (row // 32, row % 32, tile, column) to (tile, row % 32, row // 32, column).
    tiles = tl.permute(tl.reshape(scales, (4, 32, TILES, 4)), (2, 1, 0, 3))
    place, exists = _band_places(band, part, tiles_across, TILES)
    tl.store(flat_ptr + place, tl.reshape(tiles, (TILES * 512,)), mask=exists)


@triton.jit
def _unswizzle_kernel(flat_ptr, linear_ptr, M, C, tiles_across, TILES: tl.constexpr):
    band, part = place_of(tl.cdiv(tiles_across, TILES))
    place, exists = _band_places(band, part, tiles_across, TILES)
    tiles = tl.reshape(tl.load(flat_ptr + place, mask=exists, other=0), (TILES, 32, 4, 4))
    scales = tl.reshape(tl.permute(tiles, (2, 1, 0, 3)), (4, 32, TILES * 4))
    row, column = _places(band, part, TILES)
    tl.store(linear_ptr + row.to(tl.int64) * C + column, scales, mask=(row < M) & (column < C))


def swizzle_tiles(arch: Architecture, tiles_across: int) -> int:
    """Return how many tiles of 512 bytes a program moves."""
    return power_of_two(tiles_across, most=64 if arch is INTERPRETER else 8)


def swizzle(block_scales: torch.Tensor) -> torch.Tensor:
    """Return block scales [M, C] as the flat 128x4 layout, in the same dtype.

    Raises:
        ValueError: The scales are no matrix of float8_e4m3fn or uint8.
    """
    check_dtype("block_scales", block_scales, *_SCALE_DTYPES)
    check_shape("block_scales", block_scales, None, None)
    M, C = block_scales.shape
    linear = rows_of(block_scales).view(torch.uint8)
    bands, tiles_across = ceil_div(M, SCALE_TILE_ROWS), ceil_div(C, SCALE_TILE_COLUMNS)
    size = bands * tiles_across * SCALE_TILE_ROWS * SCALE_TILE_COLUMNS
    flat = torch.empty(size, dtype=torch.uint8, device=linear.device)
    tiles = swizzle_tiles(architecture_of(linear), tiles_across)
    launch(
        _swizzle_kernel,
        (ceil_div(tiles_across, tiles) * bands,),
        linear,
        flat,
        M,
        C,
        linear.stride(0),
        tiles_across,
        on=linear,
        TILES=tiles,
    )
    return flat.view(block_scales.dtype)


def unswizzle(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the block scales [rows, columns] that the flat 128x4 layout holds.

    Raises:
        ValueError: The flat scales have another dtype or size than the layout takes.
    """
    check_dtype("flat", flat, *_SCALE_DTYPES)
    tiles_across = ceil_div(columns, SCALE_TILE_COLUMNS)
    bands = ceil_div(rows, SCALE_TILE_ROWS)
    check_shape("flat", flat, bands * tiles_across * SCALE_TILE_ROWS * SCALE_TILE_COLUMNS)
    source = rows_of(flat).view(torch.uint8)
    linear = torch.empty(rows, columns, dtype=torch.uint8, device=flat.device)
    tiles = swizzle_tiles(architecture_of(flat), tiles_across)
    launch(
        _unswizzle_kernel,
        (ceil_div(tiles_across, tiles) * bands,),
        source,
        linear,
        rows,
        columns,
        tiles_across,
        on=flat,
        TILES=tiles,
    )
    return linear.view(flat.dtype)
