"""F9 and F19 as stored bytes: scales in a tensor core's layout; rows and columns out of place."""

import torch

from nvfp4check.checkpoint.faults.base import Need, Planting, fault
from nvfp4check.checkpoint.naming import LogicalWeight
from nvfp4ref import layout
from nvfp4ref.formats import BLOCK_SIZE, SCALE_TILE_COLUMNS, SCALE_TILE_ROWS

_SMALL_TILE_ROWS = 8


def _fills_tiles(rows: int) -> Need:
    """Whether block scales fill tiles of so many rows: then tiling keeps their size."""

    def fills(weight: LogicalWeight) -> bool:
        columns = weight.shape[1] // BLOCK_SIZE
        return (
            weight.shape[0] % rows == 0
            and columns % SCALE_TILE_COLUMNS == 0
            and columns > SCALE_TILE_COLUMNS
        )

    return fills


def _tileable(p: Planting, rows: int = SCALE_TILE_ROWS) -> LogicalWeight:
    return p.nvfp4(_fills_tiles(rows), f"NVFP4 weight whose block scales fill {rows}x4 tiles")


def _place(flat_offsets: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Put each scale at its offset."""
    flat = torch.zeros_like(scales).flatten()
    flat[flat_offsets.flatten()] = scales.flatten()
    return flat.view_as(scales)


@fault(
    "F9a",
    "scales-swizzled",
    does="Block scales are stored in the 128x4 tiles of tensor cores; engines tile them again.",
    threads=(
        "modular/modular/issues/6600",
        "sgl-project/sglang/pull/23625",
        "NVIDIA/Model-Optimizer/pull/2038",
    ),
    found_with_base=("NV701",),
    also=("NV203", "NV206", "NV703"),
    remark="NV206 sees it without a base where rows or columns of the weight differ in size",
)
def _swizzled(p: Planting) -> None:
    weight = _tileable(p)
    tiled = layout.swizzle(p.scales(weight)).view_as(p.scales(weight))
    p.set_scales(weight, tiled, "block scales in 128x4 tiles")


@fault(
    "F9b",
    "scales-swizzled-twice",
    does="Block scales were put in 128x4 tiles twice.",
    threads=("modular/modular/issues/6600",),
    found_with_base=("NV701",),
    also=("NV203", "NV206"),
)
def _twice(p: Planting) -> None:
    weight = _tileable(p)
    once = layout.swizzle(p.scales(weight)).view_as(p.scales(weight))
    twice = layout.swizzle(once).view_as(once)
    p.set_scales(weight, twice, "block scales in 128x4 tiles of 128x4 tiles")


@fault(
    "F9c",
    "scales-in-8x4-tiles",
    does="Block scales are stored in the 8x4 tiles that TensorRT-LLM uses for few rows.",
    threads=("vllm-project/vllm/pull/47587",),
    found_with_base=("NV701",),
    also=("NV203", "NV206"),
)
def _small_tiles(p: Planting) -> None:
    weight = _tileable(p, _SMALL_TILE_ROWS)
    scales = p.scales(weight)
    p.set_scales(
        weight, _place(layout.offsets_8x4(*scales.shape), scales), "block scales in 8x4 tiles"
    )


@fault(
    "F9d",
    "scale-rows-permuted",
    does="The rows of block scales were permuted as for tiles, without the interleaving.",
    threads=("flashinfer-ai/flashinfer/issues/4087",),
    found_with_base=("NV701",),
    also=("NV203", "NV206"),
)
def _rows_only(p: Planting) -> None:
    weight = _tileable(p)
    columns = weight.shape[1] // BLOCK_SIZE
    tiles = p.scales(weight).view(-1, 4, SCALE_TILE_ROWS // 4, columns)
    p.set_scales(
        weight, tiles.transpose(1, 2).flatten(0, 2), "rows r and 32 + r of each 128 interleaved"
    )


@fault(
    "F9e",
    "scale-columns-not-padded",
    does="Offsets of the tiles were computed from a number of columns that is no multiple of 4 and "
    "was not padded; what did not fit is lost.",
    threads=("vllm-project/vllm/pull/23140",),
    found_with_base=("NV701",),
    also=("NV203",),
)
def _not_padded(p: Planting) -> None:
    weight = p.nvfp4(
        lambda w: (
            (w.shape[1] // BLOCK_SIZE) % SCALE_TILE_COLUMNS != 0
            and w.shape[0] % SCALE_TILE_ROWS == 0
        ),
        "NVFP4 weight whose scale columns are no multiple of 4",
    )
    scales = p.scales(weight)
    offsets = layout.offsets_128x4(scales.shape[0], scales.shape[1]).flatten()
    inside = offsets < scales.numel()
    flat = scales.flatten().clone()
    flat[offsets[inside]] = scales.flatten()[inside]
    p.set_scales(weight, flat.view_as(scales), "block scales in tiles that overlap")


def _exchange(
    p: Planting, weight: LogicalWeight, one: slice, two: slice, axis: int, what: str
) -> None:
    """Exchange rows, or columns by whole blocks, with their block scales."""
    codes, scales = p.codes(weight), p.scales(weight)
    for values, size in ((codes, 1), (scales, BLOCK_SIZE if axis else 1)):
        first, second = (
            values.narrow(axis, part.start // size, (part.stop - part.start) // size)
            for part in (one, two)
        )
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
    p.set_codes(weight, codes, f"codes: {what}")
    p.set_scales(weight, scales, f"block scales: {what}")


@fault(
    "F19h",
    "ranks-in-another-order",
    does="The columns of two tensor parallel ranks of a row-parallel weight were joined in the "
    "other order.",
    threads=("vllm-project/vllm-gguf-plugin/issues/103",),
    found_with_base=("NV703",),
)
def _ranks(p: Planting) -> None:
    weight = p.nvfp4(lambda w: w.shape[1] % (16 * BLOCK_SIZE) == 0, "NVFP4 weight of 16 blocks")
    rank = weight.shape[1] // 4
    one, two = slice(rank, 2 * rank), slice(2 * rank, 3 * rank)
    _exchange(p, weight, one, two, 1, "ranks 1 and 2 of 4 are in one another's place")


@fault(
    "F19i",
    "heads-in-another-order",
    does="Two heads of an attention projection, rows and their block scales, changed places.",
    found_with_base=("NV703",),
)
def _heads(p: Planting) -> None:
    weight = p.nvfp4(lambda w: w.shape[0] % 8 == 0)
    head = weight.shape[0] // 8
    one, two = slice(head, 2 * head), slice(5 * head, 6 * head)
    _exchange(p, weight, one, two, 0, "an eighth of the rows is in another's place")


@fault(
    "F19j",
    "one-row-repeated",
    does="One row, with its block scales, is its neighbour's: an index was one too small.",
    found_with_base=("NV703",),
)
def _repeated(p: Planting) -> None:
    weight = p.nvfp4(lambda w: w.shape[0] > 1)
    row = int(p.rng.integers(1, weight.shape[0]))
    codes, scales = p.codes(weight), p.scales(weight)
    codes[row], scales[row] = codes[row - 1], scales[row - 1]
    p.set_codes(weight, codes, f"codes of row {row} are those of row {row - 1}")
    p.set_scales(weight, scales, f"block scales of row {row} are those of row {row - 1}")


FAULTS = (
    _swizzled,
    _twice,
    _small_tiles,
    _rows_only,
    _not_padded,
    _ranks,
    _heads,
    _repeated,
)
