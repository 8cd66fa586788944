"""The laws of `swizzle`: row-major block scales [M, C] to the 128x4 tiles, zero padded.

The result is compared as bytes: its shape and whether it is uint8 or float8_e4m3fn are free.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from nvfp4check import compare, inputs
from nvfp4check.properties import common
from nvfp4check.properties.law import Case, Failure, Property, Runner, Setting, failed
from nvfp4ref import layout

NAME = "swizzle"

#: Shapes beside those round the tiles: DeepSeek-V3's own, and a long thin one.
MODEL_SHAPES = ((576, 448), (2048, 32), (1, 1152))


def _bytes(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    """Return every byte equally likely, NaN and negative ones too: a layout moves bits."""
    return inputs.scales_from_bytes(torch.randint(0, 256, (rows, columns), generator=generator))


def ordinary(setting: Setting) -> Iterator[Case]:
    """Whole tiles, and a ragged tile on either side."""
    for rows, columns in ((128, 4), (130, 7)):
        scales = _bytes(setting.generator(1, rows), rows, columns)
        yield Case(f"{rows} x {columns}", {"block_scales": scales})


def _shapes(setting: Setting) -> Iterator[Case]:
    yield Case("0 x 4", {"block_scales": inputs.scales_from_bytes(torch.empty(0, 4))})
    several = [(rows, columns) for rows in (*inputs.ROWS, 257) for columns in inputs.BLOCKS]
    for rows, columns in (*several, *MODEL_SHAPES):
        scales = _bytes(setting.generator(2, rows, columns), rows, columns)
        yield Case(f"{rows} x {columns}", {"block_scales": scales})


def _places(setting: Setting) -> Iterator[Case]:
    for rows, columns in ((128, 4), (256, 8), (200, 10)):
        for plane in (0, 1):
            scales = inputs.scale_ids(rows, columns, plane)
            yield Case(f"{rows} x {columns}, plane {plane}", {"block_scales": scales})


def as_bytes(runner: Runner, case: Case) -> tuple[torch.Tensor, ...]:
    """Return what a kernel made of a case as flat bytes."""
    (result,) = runner(case.inputs)
    return (result.contiguous().view(torch.uint8).flatten(),)


def _check(runner: Runner, case: Case) -> Failure | None:
    scales = case.inputs["block_scales"]
    actual = as_bytes(runner, case)
    expected = layout.swizzle(scales).view(torch.uint8)
    comparison = compare.bits(actual[0], expected, what="swizzled bytes")
    return failed(case, comparison, actual, (expected,), _where(scales, comparison))


def _where(scales: torch.Tensor, comparison: compare.Comparison) -> str:
    if comparison.first is None:
        return ""
    rows, columns = scales.shape
    place = comparison.first.index[0]
    hit = (layout.offsets_128x4(rows, columns) == place).nonzero()
    if not len(hit):
        return f"byte {place} is padding, which must be zero"
    r, c = hit[0].tolist()
    return f"byte {place} is the place of scale ({r}, {c})"


def _unswizzles(runner: Runner, case: Case) -> Failure | None:
    scales = case.inputs["block_scales"]
    actual = as_bytes(runner, case)
    rows, columns = scales.shape
    if actual[0].numel() != layout.swizzled_size(rows, columns):
        return _check(runner, case)
    back = layout.unswizzle(actual[0], rows, columns)
    comparison = compare.bits(back, scales.view(torch.uint8), what="scales read back")
    return failed(case, comparison, actual, (scales,))


def _shrink(case: Case, failure: Failure) -> Iterable[Case]:
    scales = case.inputs["block_scales"].view(torch.uint8)
    rows, columns = scales.shape
    for r, c in dict.fromkeys(
        ((rows // 2, columns), (rows, columns // 2), (rows - 1, columns), (rows, columns - 1))
    ):
        if (r, c) != (rows, columns) and r > 0 and c > 0:
            smaller = inputs.scales_from_bytes(scales[:r, :c])
            yield Case(f"{r} x {c} of {case.label}", {"block_scales": smaller})


_law = partial(Property, operation=NAME)

PROPERTIES = (
    _law(
        name="every-shape",
        law="whole and ragged tiles are laid out alike, and padding is zero",
        generate=_shapes,
        check=_check,
        shrink=_shrink,
    ),
    _law(
        name="scales-that-name-their-place",
        law="every scale of a tile stands at its own byte",
        generate=_places,
        check=_check,
        shrink=_shrink,
    ),
    _law(
        name="round-trips",
        law="reading the tiles back gives the scales",
        generate=ordinary,
        check=_unswizzles,
    ),
    common.takes_any_view(NAME, ordinary, ("block_scales",)),
    common.ignores_poison(NAME, ordinary, ("block_scales",)),
    common.repeats(NAME, ordinary),
    common.writes_only_its_outputs(NAME, ordinary),
)
