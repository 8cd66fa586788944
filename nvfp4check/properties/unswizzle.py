"""The laws of `unswizzle`: the 128x4 tiles back to row-major block scales [M, C]."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from nvfp4check import compare, inputs
from nvfp4check.properties import common
from nvfp4check.properties.law import Case, Failure, Property, Runner, Setting, failed
from nvfp4check.properties.swizzle import MODEL_SHAPES, as_bytes
from nvfp4ref import layout

NAME = "unswizzle"


def _case(label: str, flat: torch.Tensor, rows: int, columns: int) -> Case:
    return Case(label, {"flat": flat, "rows": rows, "columns": columns})


def _tiles(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    scales = torch.randint(0, 256, (rows, columns), generator=generator)
    return layout.swizzle(inputs.scales_from_bytes(scales))


def ordinary(setting: Setting) -> Iterator[Case]:
    """Whole tiles, and a ragged tile on either side."""
    for rows, columns in ((128, 4), (130, 7)):
        flat = _tiles(setting.generator(1, rows), rows, columns)
        yield _case(f"{rows} x {columns}", flat, rows, columns)


def _shapes(setting: Setting) -> Iterator[Case]:
    several = [(rows, columns) for rows in (*inputs.ROWS, 257) for columns in inputs.BLOCKS]
    for rows, columns in (*several, *MODEL_SHAPES):
        flat = _tiles(setting.generator(2, rows, columns), rows, columns)
        yield _case(f"{rows} x {columns}", flat, rows, columns)


def _places(setting: Setting) -> Iterator[Case]:
    for rows, columns in ((128, 4), (256, 8), (200, 10)):
        for plane in (0, 1):
            flat = layout.swizzle(inputs.scale_ids(rows, columns, plane))
            yield _case(f"{rows} x {columns}, plane {plane}", flat, rows, columns)


def _padding(setting: Setting) -> Iterator[Case]:
    for rows, columns in ((1, 1), (33, 5), (129, 7)):
        places = layout.offsets_128x4(rows, columns).flatten()
        for byte in inputs.POISONS:
            flat = _tiles(setting.generator(3, rows), rows, columns).view(torch.uint8)
            padding = torch.ones(len(flat), dtype=torch.bool)
            padding[places] = False
            poisoned = inputs.scales_from_bytes(torch.where(padding, byte, flat))
            yield _case(f"{rows} x {columns}, padding {byte:#x}", poisoned, rows, columns)


def _check(runner: Runner, case: Case) -> Failure | None:
    taken = case.inputs
    expected = layout.unswizzle(taken["flat"], taken["rows"], taken["columns"])
    actual = as_bytes(runner, case)
    wanted = expected.view(torch.uint8)
    comparison = compare.bits(actual[0], wanted.flatten(), what="scales, row by row")
    return failed(case, comparison, actual, (wanted,))


def _shrink(case: Case, failure: Failure) -> Iterable[Case]:
    rows, columns = case.inputs["rows"], case.inputs["columns"]
    scales = layout.unswizzle(case.inputs["flat"], rows, columns).view(torch.uint8)
    for r, c in ((rows // 2, columns), (rows, columns // 2)):
        if r > 0 and c > 0:
            flat = layout.swizzle(inputs.scales_from_bytes(scales[:r, :c]))
            yield _case(f"{r} x {c} of {case.label}", flat, r, c)


_law = partial(Property, operation=NAME)

PROPERTIES = (
    _law(
        name="every-shape",
        law="whole and ragged tiles are read alike",
        generate=_shapes,
        check=_check,
        shrink=_shrink,
    ),
    _law(
        name="scales-that-name-their-place",
        law="every byte of a tile comes back to its own row and column",
        generate=_places,
        check=_check,
        shrink=_shrink,
    ),
    _law(
        name="poison-in-padding-changes-nothing",
        law="padding bytes of 0x7F, 0xFF, 0x7E and 0xA5 reach no scale",
        generate=_padding,
        check=_check,
    ),
    common.ignores_poison(NAME, ordinary, ("flat",)),
    common.repeats(NAME, ordinary),
    common.writes_only_its_outputs(NAME, ordinary),
)
