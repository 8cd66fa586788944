"""What was done to a weight that is stored as numbers, or that changed its format.

Contract:
    factor      a constant one is named where it brings every element within the bound
    exact       rounding to another dtype, zeros, and rows in another order are named if they give
                the other's numbers exactly
"""

from collections.abc import Callable

import numpy as np
import torch

from nvfp4check.checkpoint.audit.sources import row_pieces
from nvfp4check.checkpoint.diff.measured import Array, Measured
from nvfp4check.checkpoint.diff.operands import Stored, Values, within
from nvfp4ref.formats import FP8_BLOCK

_FIRST_ROWS = 4
_TALL = FP8_BLOCK.block_shape[0]


def name_values(a: Stored, b: Stored, found: Measured) -> str | None:
    """Say what distinguishes two weights of one format that is not NVFP4."""
    lost = _lost(found)
    if lost is not None:
        return lost
    left, right = Values(a), Values(b)
    for this, that, names in ((left, right, ("a", "b")), (right, left, ("b", "a"))):
        for what, change in _ELEMENTWISE:
            if _gives(this, that, change):
                return f"{names[1]} is {names[0]} {what}"
    return _factor(left, right) or _scale_left_out(left, right) or _rows_moved(left, right)


def name_across(a: Stored, b: Stored, found: Measured) -> str | None:
    """Say what distinguishes two weights of different formats."""
    if found.beyond == 0:
        return None
    lost = _lost(found)
    if lost is not None:
        return lost
    left, right = Values(a), Values(b)
    said = _factor(left, right)
    if said is not None:
        return said
    for what, change in _IN_ROWS:
        if _bound_under(left, right, change):
            return f"b is a {what}"
    return _rows_moved(left, right)


def _lost(found: Measured) -> str | None:
    """Say which side holds no finite number where the other does, or nothing but zeros."""
    for place, side in enumerate(("a", "b")):
        if found.not_finite[place] and not found.not_finite[1 - place]:
            return f"{found.not_finite[place]:,} elements of {side} are NaN or infinite"
    for place, (side, energy) in enumerate((("a", found.energy_a), ("b", found.energy_b))):
        if energy == 0:
            finite = "finite " if found.not_finite[place] else ""
            return f"every {finite}element of {side} is 0"
    return None


def _rounded(dtype: torch.dtype) -> Callable[[Array], Array]:
    def change(values: Array) -> Array:
        return np.asarray(torch.from_numpy(values).to(dtype).double().numpy())

    return change


_ELEMENTWISE: tuple[tuple[str, Callable[[Array], Array]], ...] = (
    ("rounded to bfloat16", _rounded(torch.bfloat16)),
    ("rounded to float16", _rounded(torch.float16)),
    ("negated", np.negative),
    ("rounded to E4M3 without a scale", _rounded(torch.float8_e4m3fn)),
)


def _pairs_swapped(values: Array) -> Array:
    return values.reshape(values.shape[0], -1, 2)[:, :, ::-1].reshape(values.shape)


def _column_halves(values: Array) -> Array:
    return np.roll(values, values.shape[1] // 2, axis=1)


_IN_ROWS: tuple[tuple[str, Callable[[Array], Array]], ...] = (
    ("with the nibbles of every byte swapped", _pairs_swapped),
    ("with the halves of its columns swapped", _column_halves),
    ("negated", np.negative),
)


def _pieces(side: Values) -> list[tuple[int, int]]:
    operand = side.stored.operand
    first = min(operand.rows, _FIRST_ROWS)
    return [(0, first), *row_pieces(operand.rows, operand.columns)]


def _gives(this: Values, that: Values, change: Callable[[Array], Array]) -> bool:
    return all(
        np.array_equal(change(this.rows(*piece)[0]), that.rows(*piece)[0], equal_nan=True)
        for piece in _pieces(this)
    )


def _bound_under(left: Values, right: Values, change: Callable[[Array], Array]) -> bool:
    if left.stored.operand.columns % 2:
        return False
    for piece in _pieces(left):
        (one, gap_a), (two, gap_b) = left.rows(*piece), right.rows(*piece)
        moved, gaps = change(one), np.abs(change(gap_a)) + gap_b
        if not within(moved, two, gaps):
            return False
    return True


def _factor(left: Values, right: Values) -> str | None:
    """Find a constant factor by least squares on the first rows, and hold all rows to it."""
    (one, _), (two, _) = (side.rows(*_pieces(left)[0]) for side in (left, right))
    with np.errstate(all="ignore"):
        factor = float((one * two).sum() / (one * one).sum())
    if not np.isfinite(factor) or factor == 0:
        return None
    nearest = 1 / round(1 / factor) if abs(factor) < 1 else float(round(factor))
    # Rounding leaves a few parts in a thousand of the least squares' factor.
    if abs(factor / nearest - 1) < 2.0**-6:
        factor = nearest
    if factor == 1.0:
        return None
    for piece in _pieces(left):
        (one, gap_a), (two, gap_b) = left.rows(*piece), right.rows(*piece)
        if not within(one * factor, two, gap_a * abs(factor) + gap_b):
            return None
    return f"b is a times {factor:.6g}: a constant factor"


def _scale_left_out(left: Values, right: Values) -> str | None:
    """Recognise FP8 bytes that were taken without the scales of their 128 x 128 blocks."""
    operand = left.stored.operand
    if len(operand.shape) != 2 or operand.columns < 2:
        return None
    for this, that, side in ((left, right, "b"), (right, left, "a")):
        tops = range(0, operand.rows, _TALL)
        if all(_is_unscaled(this, that, top, min(top + _TALL, operand.rows)) for top in tops):
            return f"{side} is FP8 without the scales of its 128x128 blocks"
    return None


def _is_unscaled(this: Values, that: Values, top: int, bottom: int) -> bool:
    (scaled, _), (bare, _) = this.rows(top, bottom), that.rows(top, bottom)
    rounded = torch.from_numpy(bare).to(torch.float8_e4m3fn).double().numpy()
    if not np.array_equal(rounded, bare):
        return False
    for start in range(0, scaled.shape[1], _TALL):
        one, two = scaled[:, start : start + _TALL], bare[:, start : start + _TALL]
        energy = float((two * two).sum())
        if energy == 0:
            continue
        scale = float((one * two).sum()) / energy
        # BF16 keeps eight bits of element times scale.
        if not (np.abs(one - two * scale) <= np.abs(one) * 2.0**-7 + 2.0**-133).all():
            return False
    return True


def _rows_moved(left: Values, right: Values) -> str | None:
    """Recognise rows in another order, where both sides hold the same numbers."""
    rows = left.stored.operand.rows
    if rows < 2 or left.stored.operand.format is not right.stored.operand.format:
        return None
    half = rows // 2
    orders: list[tuple[str, Callable[[int], int]]] = [
        ("with its rows in reverse", lambda row: rows - 1 - row)
    ]
    if rows % 2 == 0:
        orders.append(("with the halves of its rows swapped", lambda row: (row + half) % rows))
    for what, source in orders:
        if all(
            np.array_equal(left.rows(source(row), source(row) + 1)[0], right.rows(row, row + 1)[0])
            for row in range(rows)
        ):
            return f"b is a {what}"
    return None
