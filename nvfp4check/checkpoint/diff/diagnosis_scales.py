"""What was done to the scales of an NVFP4 weight.

Contract:
    exact     a change of block scales is named only if it gives the other's bytes exactly, all of
              them; of a global scale, if it gives its float32 to one ulp
"""

import math
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch

from nvfp4check.checkpoint import bounds
from nvfp4check.checkpoint.audit.sources import row_pieces
from nvfp4check.checkpoint.diff.measured import Array, Measured
from nvfp4check.checkpoint.diff.operands import Stored
from nvfp4check.checkpoint.naming import Part
from nvfp4ref import layout
from nvfp4ref.formats import BLOCK_SIZE, E2M1, E4M3, NVFP4

_ULP = 2.0**-23
_NAN = 0x7F
#: Largest ratio of two roundings of one number to E4M3, each off by at most a sixteenth.
_TWO_ROUNDINGS = (1 + 2.0**-4) / (1 - 2.0**-4)
#: Byte of 240, the largest value of E4M3FNUZ.
_BYTE_240 = 0x77
#: Factors that stand for something.
_FACTORS = {
    E2M1.max: "6, the largest code",
    E4M3.max: "448, the largest block scale",
    NVFP4.full_scale: "2688, the largest code times the largest block scale",
}
_FIRST_ROWS = 4
#: Where more than one in so many scales changed, the first rows show what happened to all.
_FEW = 64
_SAMPLED_ROWS = 64
_MANTISSA = (1 << E4M3.mantissa_bits) - 1

Change = Callable[[Array], Array | None]


def name_global_scale(a: Stored, b: Stored, found: Measured) -> str | None:
    """Say what became of the global scale."""
    one, two = (side.decode_scale(Part.GLOBAL_SCALE) for side in (a, b))
    if one is None or two is None or one == two:
        return None
    for value, side in ((one, "a"), (two, "b")):
        if not math.isfinite(value) or value <= 0:
            return f"global scale of {side} is {value:g}"
    same = "same codes and scales, " if not found.changed_codes and not found.changed_scales else ""
    other_way = (
        a.operand.weight.global_scale_is_reciprocal != b.operand.weight.global_scale_is_reciprocal
    )
    if _close(one, two):
        return f"{same}global scale {'inverse' if other_way else 'equal'} to 1 ulp"
    for (left, right), (this, that) in (((one, two), ("a", "b")), ((two, one), ("b", "a"))):
        if _close(right * left, 1.0):
            return f"{same}global scale of {that} is the reciprocal of {this}'s"
        if _close(right, left * left):
            return f"{same}global scale of {that} is the square of {this}'s: applied twice"
        if right == 1.0:
            return f"{same}global scale of {that} is 1: dropped, or folded into the block scales"
    ratio = two / one
    for value in (ratio, 1 / ratio):
        nearest = round(value)
        for factor, meaning in _FACTORS.items():
            if _close(value, factor):
                way = "times" if value == ratio else "over"
                return f"{same}global scale of b is a's {way} {meaning}"
        made_up = found.changed_scales and not found.beyond
        if 1 < nearest < 1 << 16 and _close(value, nearest) and not made_up:
            way = "times" if value == ratio else "over"
            return f"{same}global scale of b is a's {way} {nearest}: a constant factor"
    if not same:
        return None
    return f"{same}global scale of b is a's times {ratio:.6g}: a constant factor"


def name_made_up(a: Stored, b: Stored, found: Measured) -> str | None:
    """Say of another global scale that block scales make up for it: no element is beyond."""
    one, two = (side.decode_scale(Part.GLOBAL_SCALE) for side in (a, b))
    if not one or not two or one == two or found.beyond or not found.changed_scales:
        return None
    return f"global scale of b is a's times {two / one:.6g}, made up for by the block scales"


def systematic_factor(a: Stored, b: Stored) -> float | None:
    """Find a constant factor between two weights of equal codes that rounding does not explain.

    Block scale times global scale of both are then roundings of one number, so the ratio of any two
    blocks' is at most that of two roundings, and so is its mean; under equal block scales the
    global scales agree to an ulp.
    """
    one, two = (side.decode_scale(Part.GLOBAL_SCALE) for side in (a, b))
    if not one or not two or not math.isfinite(one) or not math.isfinite(two):
        return None
    values = bounds.e4m3_values()
    count, total, least, most = 0, 0.0, math.inf, 0.0
    for start, stop in row_pieces(a.operand.rows, a.operand.columns):
        left, right = (values[side.scales(start, stop)] for side in (a, b))
        # Subnormal scales are too coarse to tell, and the largest clips.
        normal = (left >= E4M3.smallest_normal) & (right >= E4M3.smallest_normal)
        normal &= (left < E4M3.max) & (right < E4M3.max)
        ratios = right[normal] / left[normal]
        if ratios.size:
            count += ratios.size
            total += float(ratios.sum())
            least, most = min(least, float(ratios.min())), max(most, float(ratios.max()))
    if not count or most / least > _TWO_ROUNDINGS**2:
        return None
    factor = total / count * two / one
    granted = 1 + 2 * _ULP if least == most == 1.0 else _TWO_ROUNDINGS
    return None if 1 / granted <= factor <= granted else factor


def _close(one: float, two: float) -> bool:
    return math.isclose(one, two, rel_tol=_ULP, abs_tol=0.0)


def name_scales(a: Stored, b: Stored, found: Measured) -> str | None:
    """Say what became of the block scales."""
    changed = found.changed_scales or 0
    rows, row_blocks = a.operand.rows, a.operand.columns // BLOCK_SIZE
    many = changed * _FEW > rows * row_blocks
    # What was done to scales alone leaves the codes, or puts some beyond the bound.
    look = _named if found.beyond or not found.changed_codes else _only_counted
    moved = 2 * changed > rows * row_blocks and look is _named and _same_bytes_of_each(a, b)
    if many and not moved and not any(found.not_finite):
        for start in (0, rows // 2):
            stop = min(rows, start + _SAMPLED_ROWS)
            sample = [np.array(side.scales(start, stop)) for side in (a, b)]
            if not np.array_equal(sample[0], sample[1]):
                if look(sample[0], sample[1], moved=False) is None:
                    return None
                break
    return look(*(np.array(side.scales(0, rows)) for side in (a, b)), moved=moved)


def _same_bytes_of_each(a: Stored, b: Stored) -> bool:
    """Whether both sides have as many of every scale byte: what only moves bytes keeps that."""
    one, two = (side.scales(0, side.operand.rows).reshape(-1) for side in (a, b))
    if np.bitwise_xor.reduce(one) != np.bitwise_xor.reduce(two):
        return False
    return bool(np.array_equal(np.bincount(one, minlength=256), np.bincount(two, minlength=256)))


def _only_counted(left: Array, right: Array, *, moved: bool) -> str | None:
    return _counted(left, right)


def _named(left: Array, right: Array, *, moved: bool) -> str | None:
    for (one, two), (this, that) in (((left, right), ("a", "b")), ((right, left), ("b", "a"))):
        for what, change in _moves(one.shape) if moved else _changes(one.shape):
            if not moved and not _may_give(change, one, two):
                continue
            made = change(one)
            if made is not None and made.shape == two.shape and np.array_equal(made, two):
                return f"block scales of {that} are {this}'s {what}"
    return _counted(left, right)


def _may_give(change: Change, one: Array, two: Array) -> bool:
    """Try a change on the first rows.

    What repeats the first rows, or changes every byte by itself, begins with the same ones there.
    """
    made = change(one[: 16 * _FIRST_ROWS])
    return made is not None and np.array_equal(made[:_FIRST_ROWS], two[:_FIRST_ROWS])


def _moves(shape: tuple[int, ...]) -> Iterator[tuple[str, Change]]:
    yield "swizzled into 128x4 tiles", _swizzled
    yield "swizzled into 128x4 tiles twice", lambda scales: _twice(_swizzled, scales)
    yield "in 8x4 tiles", _tiles_of_8
    yield "with the rows of every 128 permuted as for tiles", _rows_permuted
    yield "shifted by one block", lambda scales: np.roll(scales, 1, axis=1)
    yield "shifted by one row", lambda scales: np.roll(scales, 1, axis=0)
    if shape[0] == shape[1]:
        yield "transposed", lambda scales: scales.T
    yield "transposed as bytes", lambda scales: scales.T.reshape(scales.shape)
    yield "in reverse rows", lambda scales: scales[::-1]
    yield "with the halves of its rows swapped", lambda scales: _halves(scales, 0)
    yield "with the halves of its columns swapped", lambda scales: _halves(scales, 1)


def _changes(shape: tuple[int, ...]) -> Iterator[tuple[str, Change]]:
    yield "shifted by one block, the first kept", _shifted_keeping_first
    for ranks in (2, 4, 8, 16):
        for axis, name in ((0, "rows"), (1, "columns")):
            if shape[axis] % ranks == 0:
                yield (
                    f"first 1/{ranks} of its {name}, repeated: every rank took shard 0",
                    _repeated(ranks, axis),
                )
    yield "rounded up to powers of two", lambda scales: _powers_of_two(scales, up=True)
    yield "cut to powers of two", lambda scales: _powers_of_two(scales, up=False)
    yield "clamped at 240", lambda scales: np.minimum(scales, _BYTE_240)
    yield "numbers of their bytes: a cast where the bits were meant", _bytes_as_numbers
    yield "with negative sign", lambda scales: scales ^ np.uint8(E4M3.sign_bit)
    for exponent in range(1, 9):
        yield f"times 2**{exponent}: the exponent is off", _exponent_moved(exponent)


def _swizzled(scales: Array) -> Array | None:
    rows, columns = scales.shape
    if rows % 128 or columns % 4:
        return None
    flat = layout.swizzle(torch.from_numpy(scales.copy()).view(torch.float8_e4m3fn))
    return flat.view(torch.uint8).numpy().reshape(rows, columns)


def _twice(change: Change, scales: Array) -> Array | None:
    once = change(scales)
    return None if once is None else change(once)


def _tiles_of_8(scales: Array) -> Array | None:
    rows, columns = scales.shape
    if rows % 8 or columns % 4:
        return None
    made = np.empty(scales.size, np.uint8)
    made[layout.offsets_8x4(rows, columns).numpy().reshape(-1)] = scales.reshape(-1)
    return made.reshape(rows, columns)


def _rows_permuted(scales: Array) -> Array | None:
    rows, columns = scales.shape
    if rows % 128:
        return None
    # Row r of a tile lies at 4 (r mod 32) + r // 32 of its 128.
    tiles = scales.reshape(rows // 128, 4, 32, columns)
    return tiles.transpose(0, 2, 1, 3).reshape(rows, columns)


def _shifted_keeping_first(scales: Array) -> Array:
    return np.concatenate([scales[:, :1], scales[:, :-1]], axis=1)


def _halves(scales: Array, axis: int) -> Array | None:
    return None if scales.shape[axis] % 2 else np.roll(scales, scales.shape[axis] // 2, axis=axis)


def _repeated(ranks: int, axis: int) -> Change:
    def change(scales: Array) -> Array:
        size = scales.shape[axis] // ranks
        first = scales[:size] if axis == 0 else scales[:, :size]
        return np.concatenate([first] * ranks, axis=axis)

    return change


def _powers_of_two(scales: Array, *, up: bool) -> Array:
    return np.asarray(_power_of_every_byte(up=up)[scales])


@cache
def _power_of_every_byte(*, up: bool) -> Array:
    scales = np.arange(256, dtype=np.uint8)
    if up:
        moved = np.minimum((scales.astype(np.int16) + _MANTISSA) & ~_MANTISSA, 0x78)
    else:
        moved = scales.astype(np.int16) & ~_MANTISSA
    # Below the normal range every byte has its own leading bit.
    small = scales < 1 << E4M3.mantissa_bits
    size = np.where(scales == 0, 1, scales).astype(np.float64)
    power = np.exp2(np.ceil(np.log2(size)) if up else np.floor(np.log2(size)))
    return np.where(small, np.where(scales == 0, 0, power), moved).astype(np.uint8)


def _bytes_as_numbers(scales: Array) -> Array:
    return np.asarray(_number_of_every_byte()[scales])


@cache
def _number_of_every_byte() -> Array:
    values = torch.arange(256, dtype=torch.float32).to(torch.float8_e4m3fn)
    return np.asarray(values.view(torch.uint8).numpy())


def _exponent_moved(exponent: int) -> Change:
    def change(scales: Array) -> Array | None:
        moved = scales.astype(np.int16) + (exponent << E4M3.mantissa_bits)
        low = scales < 1 << E4M3.mantissa_bits
        return None if low.any() or (moved >= _NAN).any() else moved.astype(np.uint8)

    return change


def _counted(left: Array, right: Array) -> str | None:
    """Say what the differing scales have in common, where they have."""
    different = left != right
    count = int(different.sum())
    if not count:
        return None
    one, two = left[different], right[different]
    for this, that, side in ((one, two, "b"), (two, one, "a")):
        void = ((that & _NAN) == _NAN) & ((this & _NAN) != _NAN)
        if void.any():
            return f"{int(void.sum()):,} block scales of {side} are NaN{_moved(this, that, ~void)}"
        if (that == 0).all():
            return f"{count:,} block scales of {side} became 0"
        if (that == _BYTE_240).all() and (this > _BYTE_240).all():
            return f"{count:,} block scales of {side} are clamped at 240"
        if (that == 0x7E).all():
            return f"{count:,} block scales of {side} are saturated at 448"
    pairs = [_pairwise_equal(scales) for scales in (left, right)]
    if pairs[0] != pairs[1]:
        return f"block scales of {'a' if pairs[0] else 'b'} are pairwise equal: blocks of 32"
    powers = [not (scales & _MANTISSA).any() for scales in (left, right)]
    if powers[0] != powers[1]:
        return f"block scales of {'a' if powers[0] else 'b'} are powers of two"
    return None


def _pairwise_equal(scales: Array) -> bool:
    return scales.shape[1] % 2 == 0 and bool((scales[:, ::2] == scales[:, 1::2]).all())


def _moved(one: Array, two: Array, rest: Array) -> str:
    """Say by what factor the other scales moved, where all of them did by one."""
    values = bounds.e4m3_values()
    known = rest & (one != 0)
    ratios = values[two[known]] / values[one[known]]
    if ratios.size and ratios.min() > 0 and ratios.max() / ratios.min() <= _TWO_ROUNDINGS**2:
        return f", the others times {float(np.median(ratios)):.3g}"
    return ""
