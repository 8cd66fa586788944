"""What was done to the codes of an NVFP4 weight.

Contract:
    exact   a change is named only if it gives the other's codes exactly, all of them. It is tried
            on the first rows, and then on every row
    ties    where scales are equal and codes differ by one step, the original lay at a midpoint or
            near it: conventions and rounding modes differ so, and only so
"""

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from nvfp4check.checkpoint.audit.sources import row_pieces
from nvfp4check.checkpoint.diff.measured import Array, Measured
from nvfp4check.checkpoint.diff.operands import Stored
from nvfp4check.checkpoint.naming import Part
from nvfp4ref import nvfp4, ties
from nvfp4ref.conventions import Convention
from nvfp4ref.formats import BLOCK_SIZE

#: Rows that a change is tried on first.
_FIRST_ROWS = 4
_HALF_BLOCK = BLOCK_SIZE // 2
#: The bits of a block's codes that are not signs.
_MAGNITUDES = np.uint64(0x7777777777777777)
#: The conventions of those who make checkpoints, in the order in which they are named.
_PRODUCERS = (
    Convention.MODELOPT,
    Convention.MODELOPT_0_39,
    Convention.COMPRESSED_TENSORS,
    Convention.TORCHAO,
    Convention.TRANSFORMER_ENGINE,
)

Change = Callable[[Array], Array]


def _unpacked(packed: Array) -> Array:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _packed(codes: Array) -> Array:
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def _nibbles_swapped(packed: Array) -> Array:
    return np.asarray((packed >> 4) | (packed << 4), np.uint8)


def _block_in_halves(packed: Array) -> Array:
    codes = _unpacked(packed).reshape(packed.shape[0], -1, 2, _HALF_BLOCK)
    return _packed(codes.transpose(0, 1, 3, 2).reshape(packed.shape[0], -1))


def _negated(packed: Array) -> Array:
    return np.asarray(packed ^ 0x88, np.uint8)


def _column_halves(packed: Array) -> Array:
    return np.roll(packed, packed.shape[1] // 2, axis=1)


def _columns_reversed(packed: Array) -> Array:
    return _packed(_unpacked(packed)[:, ::-1])


#: Changes that keep every row in its place.
IN_ROWS: tuple[tuple[str, Change], ...] = (
    ("with the nibbles of every byte swapped", _nibbles_swapped),
    ("with every block packed as its two halves, as GGML does", _block_in_halves),
    ("negated", _negated),
    ("with the halves of its columns swapped", _column_halves),
    ("with its columns in reverse", _columns_reversed),
)


def name_codes(a: Stored, b: Stored, found: Measured) -> str | None:
    """Say what became of the codes."""
    # What moves codes about leaves some beyond the bound, or moves equal ones.
    if found.beyond or not found.changed_scales:
        first = min(a.operand.rows, _FIRST_ROWS)
        heads = a.codes(0, first), b.codes(0, first)
        for this, that, names in ((0, 1, ("a", "b")), (1, 0, ("b", "a"))):
            for what, change in IN_ROWS:
                if not np.array_equal(change(heads[this]), heads[that]):
                    continue
                if _gives((a, b)[this], (a, b)[that], change):
                    return f"codes of {names[1]} are {names[0]}'s {what}"
        zero = [_all_zero(side) for side in (a, b)]
        if zero[0] != zero[1]:
            return f"every code of {'a' if zero[0] else 'b'} is 0"
    return None if found.changed_scales else _rounding(a, b)


def _gives(this: Stored, that: Stored, change: Change) -> bool:
    rows = this.operand.rows
    middle = rows // 2
    pieces = [(middle, min(rows, middle + _FIRST_ROWS)), *row_pieces(rows, this.operand.columns)]
    return all(np.array_equal(change(this.codes(*piece)), that.codes(*piece)) for piece in pieces)


def _all_zero(side: Stored) -> bool:
    pieces = row_pieces(side.operand.rows, side.operand.columns)
    return not any((side.codes(start, stop) & 0x77).any() for start, stop in pieces)


def _rounding(a: Stored, b: Stored) -> str | None:
    """Name the rounding that makes codes differ under equal scales."""
    kinds: Counter[str] = Counter()
    for start, stop in row_pieces(a.operand.rows, a.operand.columns):
        one, two = (_unpacked(side.codes(start, stop)) for side in (a, b))
        different = one != two
        left, right = one[different].astype(np.int8), two[different].astype(np.int8)
        step = (right & 7) - (left & 7)
        same_sign = (left & 8) == (right & 8)
        kinds["all"] += left.size
        kinds["zero"] += int((((left | right) & 7) == 0).sum())
        kinds["smaller"] += int((same_sign & (step == -1)).sum())
        kinds["larger"] += int((same_sign & (step == 1)).sum())
        neighbours = same_sign & (np.abs(step) == 1)
        kinds["even"] += int((neighbours & (left & 1 == 0)).sum())
        if kinds["smaller"] + kinds["larger"] + kinds["zero"] != kinds["all"]:
            return None  # a code is more than one step away: that is no rounding
    return _named(kinds, a.operand.elements)


def _near_ties(elements: int) -> float:
    """Bound the codes that float32 roundings change, of originals spread evenly over their cells.

    Two conventions choose otherwise only within both their errors of a midpoint. That is the
    largest share of a cell at 5, beside the cell of 4 from 3.5 to 5. Of a Poisson number four
    deviations more are granted, and one.
    """
    error = 2 * max(ties.element_error(convention) for convention in _PRODUCERS)
    expected = elements * 2 * error * 5.0 / 1.5
    return expected + 4 * math.sqrt(expected) + 1


def _named(kinds: Counter[str], elements: int) -> str | None:
    count, signs = kinds["all"], kinds["zero"]
    if signs == count:
        return f"{count:,} codes differ in the sign of zero alone: another convention"
    steps = kinds["smaller"] + kinds["larger"]
    if steps + signs != count:
        return None
    limit = int(_near_ties(elements))
    if steps <= limit:
        return (
            f"{steps:,} of {elements:,} codes differ by one step; up to {limit:,} do by float32 "
            "roundings beside a tie, dividing against multiplying by a reciprocal"
        )
    if kinds["larger"] == 0 or kinds["smaller"] == 0:
        side = "b" if kinds["larger"] == 0 else "a"
        way = "rounds ties toward zero, or truncates"
        if kinds["even"] not in (0, steps):
            way = "truncates instead of rounding to nearest"
        return f"{steps:,} codes of {side} are one step nearer to zero: it {way}"
    if kinds["even"] == steps:
        return f"{steps:,} codes differ by one step, a's even: ties are rounded otherwise in b"
    if kinds["even"] == 0:
        return f"{steps:,} codes differ by one step, b's even: ties are rounded otherwise in a"
    return (
        f"{steps:,} codes differ by one step under equal scales, more than the {limit:,} of "
        "float32 roundings: ties, or another arithmetic"
    )


def name_zero_blocks(a: Stored, b: Stored, found: Measured) -> str | None:
    """Name the conventions of either side by the scales of their blocks of zeros."""
    if not all(found.empty_blocks):
        return None
    named = []
    for side in (a, b):
        held = _zero_block_scales(side)
        decode = side.decode_scale(Part.GLOBAL_SCALE)
        if len(held) != 1 or not decode:
            return None
        named.append(_by_zero_scale(held.pop(), decode))
    if None in named or named[0] == named[1]:
        return None
    return f"blocks of zeros have the scale of {named[0]} in a, of {named[1]} in b"


def _zero_block_scales(side: Stored) -> set[int]:
    """Find the scale bytes of blocks of zeros: all if there is one, some if there are more."""
    held: set[int] = set()
    for start, stop in row_pieces(side.operand.rows, side.operand.columns):
        words = side.codes(start, stop).reshape(-1).view(np.uint64)
        empty = (words & _MAGNITUDES) == 0
        if empty.any():
            held.update(np.unique(side.scales(start, stop).reshape(-1)[empty]).tolist())
        if len(held) > 1:
            break
    return held


def _by_zero_scale(byte: int, decode: float) -> str | None:
    zeros = torch.zeros(1, BLOCK_SIZE)
    scale = torch.tensor(decode, dtype=torch.float32)
    names = [
        convention.value
        for convention in _PRODUCERS
        if int(nvfp4.quantize_block_scales(zeros, scale, convention).view(torch.uint8)) == byte
    ]
    return " or ".join(names) or None
