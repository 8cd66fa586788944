"""How many steps the codes of two NVFP4 weights are apart, and how many beyond the bound.

Contract:
    steps, bound   `scale_pairs`, whose entries say of every pair of scales what its codes are
    counts         of elements at least so many steps apart, of elements beyond, and the most steps

A block's codes lie in a lane, which is repeated four times: one look-up in the four tables of an
entry's half gives all four answers. Where no element of eight blocks is two steps apart or beyond
by two, which is nearly always, adding up is counting.
"""

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from nvfp4check.checkpoint.diff.scale_pairs import ENTRY, HALF
from nvfp4check.checkpoint.diff.vectors import (
    BYTES,
    GROUP,
    I8,
    I64,
    LANE,
    TABLE,
    WORDS,
    Vectors,
    every,
    number,
    pointers,
)

_intrinsic: Callable[..., Any] = intrinsic
_cg: Any = cgutils

#: Smallest step counted in each column of the histogram of steps.
STEPS = (1, 2, 3, 5, 9)
#: Places in the array of counts, after those of `kernel_sums`: elements beyond the bound, the most
#: steps, then one for each of `STEPS`.
BEYOND, MOST_STEPS, FIRST_STEP = range(4, 7)
#: Columns in twos: a byte holds the counts of two for eight blocks, four bits each.
_IN_TWOS = (STEPS[:2], STEPS[2:4], STEPS[4:])
#: Words of a vector that the two tables of the bound fill, and those of the steps.
_BOUND, _STEPS = range(4), range(4, 8)


class _Steps:
    """The vector code that compares eight blocks after eight."""

    def __init__(self, builder: Any, data: list[Any]) -> None:
        self.b, self.v = builder, Vectors(builder)
        self.lanes, self.scales = data[0:2], data[2:4]
        self.is_made, self.entries, self.counts = data[4:]
        self.rooms = {least: self.v.room(WORDS) for least in STEPS}
        self.most = self.v.room(BYTES)

    def entries_of(self, block: Any) -> tuple[list[Any], Any]:
        """Find the entries of eight pairs of scales, and whether all of them are made."""
        b, v = self.b, self.v
        found, are_made = [], ir.Constant(I8, 1)
        for place in range(GROUP):
            one, two = (
                b.zext(b.load(v.at(side, b.add(block, number(place)))), I64) for side in self.scales
            )
            pair = b.or_(b.shl(one, number(8)), two)
            are_made = b.and_(are_made, b.load(v.at(self.is_made, pair)))
            found.append(v.at(self.entries, b.mul(pair, number(ENTRY))))
        return found, b.icmp_unsigned("!=", are_made, ir.Constant(I8, 0))

    def group(self, group: Any, entries: list[Any]) -> None:
        """Compare the eight blocks of a group."""
        b, v = self.b, self.v
        apart = []
        for block, entry in enumerate(entries):
            # Lanes lie in the order 0 2 4 6, 1 3 5 7.
            lane = block // 2 + 4 * (block % 2)
            place = b.add(b.mul(group, number(128)), number(TABLE * lane))
            sides = []
            for index, room in enumerate(self.lanes):
                codes = v.repeated(v.load(v.at(room, place), LANE))
                sides.append(v.look_up(v.load(v.at(entry, HALF * index), BYTES), codes))
            subtract = v.declared("llvm.usub.sat.v64i8", BYTES, BYTES, BYTES)
            apart.append(b.call(subtract, sides))
        bits = functools.reduce(b.or_, apart)
        is_far = v.any(b.icmp_unsigned("!=", b.and_(bits, every(BYTES, 0xFE)), every(BYTES, 0)))
        with b.if_else(is_far, likely=False) as (then, otherwise):
            with then:
                self._count(apart)
            with otherwise:
                v.add(self.rooms[STEPS[0]], v.sum(functools.reduce(b.add, apart)))

    def _count(self, apart: list[Any]) -> None:
        """Count the steps of eight blocks, whatever they are."""
        b, v = self.b, self.v
        for columns in _IN_TWOS:
            table = [
                sum((steps >= least) << 4 * place for place, least in enumerate(columns))
                for steps in range(TABLE)
            ]
            total = functools.reduce(b.add, [v.in_table(table, one) for one in apart])
            for place, least in enumerate(columns):
                shifted = b.lshr(total, every(BYTES, 4)) if place else total
                v.add(self.rooms[least], v.sum(b.and_(shifted, every(BYTES, 15))))
        for one in apart:
            v.raise_to(self.most, one)

    def finish(self) -> None:
        """Hand the counts over."""
        b, v = self.b, self.v
        self._hand_over(BEYOND, self.rooms[STEPS[0]], _BOUND)
        for index, room in enumerate(self.rooms.values()):
            self._hand_over(FIRST_STEP + index, room, _STEPS)
        half = ir.VectorType(I8, 32)
        reduce = v.declared("llvm.vector.reduce.umax.v32i8", I8, half)
        most = b.zext(b.call(reduce, [v.part(b.load(self.most), range(32, 64))]), I64)
        v.raise_to(v.at(self.counts, MOST_STEPS), most)

    def _hand_over(self, index: int, room: Any, words: Any) -> None:
        v = self.v
        v.add(v.at(self.counts, index), v.total(v.part(self.b.load(room), words)))


@_intrinsic
def count_steps(
    typing_context: Any,
    lanes_a: Any,
    lanes_b: Any,
    scales_a: Any,
    scales_b: Any,
    is_made: Any,
    entries: Any,
    counts: Any,
    unequal: Any,
    first: Any,
    group: Any,
    groups: Any,
    least: Any,
) -> Any:
    """Count from group number `group` to `groups`; the first of them begins at block `first`.

    Groups of which less than `least` is unequal are passed over. Returned is the group whose
    entries are not all made, which was not counted, or `groups`.
    """

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = builder
        data = pointers(context, builder, signature, arguments)
        chunk = _Steps(b, data[:7])
        end = _cg.alloca_once_value(b, arguments[10])
        with _cg.for_range(b, arguments[10], arguments[9]) as loop:
            block = b.add(arguments[8], b.mul(loop.index, number(GROUP)))
            held = b.load(b.gep(data[7], [loop.index]))
            with b.if_then(b.icmp_signed(">=", held, arguments[11])):
                found, are_made = chunk.entries_of(block)
                with b.if_then(b.not_(are_made), likely=False):
                    b.store(loop.index, end)
                    loop.do_break()
                chunk.group(loop.index, found)
        chunk.finish()
        return b.load(end)

    arrays = lanes_a, lanes_b, scales_a, scales_b, is_made, entries, counts, unequal
    return types.int64(*arrays, *[types.int64] * 4), lower
