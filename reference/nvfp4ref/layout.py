"""Layouts of block scales: row-major in files, 128x4 tiles in the memory of tensor cores.

M rows, C = K/16 scale columns; Mp and Cp are M and C rounded up to whole tiles.

Contract:
    linear         scale (r, c) at r * C + c; what checkpoints store
    swizzled_128x4 scale (r, c) at ((r // 128) * (Cp / 4) + c // 4) * 512
                                   + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
                   in Mp * Cp bytes; padding bytes are zero
    swizzled_8x4   scale (r, c) at ((r // 8) * (Cp / 4) + c // 4) * 32 + (r % 8) * 4 + c % 4
                   (TensorRT-LLM and FlashInfer for few rows)

Sources: cuBLAS documentation, section 3.1.4.4.2; FlashInfer's quantization_utils.cuh,
get_sf_out_offset_128x4; equal to torchao's to_blocked.
"""

import torch

from nvfp4ref.formats import SCALE_TILE_COLUMNS, SCALE_TILE_ROWS


def padded(size: int, tile: int) -> int:
    """Return the size rounded up to a whole number of tiles."""
    return -(-size // tile) * tile


def offsets_128x4(rows: int, columns: int) -> torch.Tensor:
    """Return the place of each scale [rows, columns] in the swizzled bytes, int64."""
    r = torch.arange(rows).unsqueeze(1)
    c = torch.arange(columns).unsqueeze(0)
    tiles_across = padded(columns, SCALE_TILE_COLUMNS) // SCALE_TILE_COLUMNS
    tile = (r // 128) * tiles_across + c // 4
    return tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4


def offsets_8x4(rows: int, columns: int) -> torch.Tensor:
    """Return the place of each scale [rows, columns] in the 8x4 layout, int64."""
    r = torch.arange(rows).unsqueeze(1)
    c = torch.arange(columns).unsqueeze(0)
    tiles_across = padded(columns, SCALE_TILE_COLUMNS) // SCALE_TILE_COLUMNS
    return ((r // 8) * tiles_across + c // 4) * 32 + (r % 8) * 4 + c % 4


def swizzled_size(rows: int, columns: int) -> int:
    """Return how many bytes the 128x4 layout takes, padding included."""
    return padded(rows, SCALE_TILE_ROWS) * padded(columns, SCALE_TILE_COLUMNS)


def swizzle(block_scales: torch.Tensor) -> torch.Tensor:
    """Return block scales [M, C] as the flat 128x4 layout, zero padded, in the same dtype.

    Raises:
        ValueError: The scales are not a matrix.
    """
    if block_scales.ndim != 2:
        raise ValueError(f"block scales are [M, C], found shape {tuple(block_scales.shape)}")
    rows, columns = block_scales.shape
    flat = torch.zeros(swizzled_size(rows, columns), dtype=torch.uint8, device=block_scales.device)
    places = offsets_128x4(rows, columns).to(block_scales.device)
    flat[places.flatten()] = block_scales.contiguous().view(torch.uint8).flatten()
    return flat.view(block_scales.dtype)


def unswizzle(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the block scales [rows, columns] that the flat 128x4 layout holds.

    Raises:
        ValueError: The flat scales have another number of bytes than the layout takes.
    """
    expected = swizzled_size(rows, columns)
    if flat.numel() != expected:
        raise ValueError(
            f"128x4 scales of {rows} x {columns} take {expected} bytes, found {flat.numel()}"
        )
    raw = flat.contiguous().view(torch.uint8).flatten()
    places = offsets_128x4(rows, columns).to(flat.device)
    return raw[places.flatten()].view(rows, columns).view(flat.dtype)
