"""The sums of two NVFP4 weights, in integers, and where the largest difference may lie.

Contract:
    unit      a code counts its halves h, 0 to 12 and signed; a block scale its steps s of 2**-9.
              n = h s is a value in units of 2**-10 times the global scale
    sums      of n_a**2, n_a n_b and n_b**2 over all elements: a block adds at most 16 * 12**2 *
              (7 * 2**15)**2, sixty-four blocks less than 2**53. So float64 holds the integers, and
              nothing is rounded
    largest   blocks are listed whose sum of (n_a f_a - n_b f_b)**2 exceeds a floor, f the global
              scales or anything in their ratio. With f_b = f_a (1 + e) that sum is
              f_a**2 (R + 2 e S + e**2 B), R, S and B the sums of (n_a - n_b)**2, (n_b - n_a) n_b
              and n_b**2, integers: so that a small e loses no digits. As 2 e S is at most
              R + e**2 B, sixteen roundings of the latter cover all of float64's
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from nvfp4check.checkpoint.diff.vectors import (
    BYTES,
    DOUBLES,
    F64,
    GROUP,
    I8,
    I64,
    OCTETS,
    WORDS,
    Vectors,
    every,
    number,
    pointers,
)
from nvfp4check.checkpoint.scan_packed import SIGNED
from nvfp4check.checkpoint.scan_tally import CODE_BYTES, HALVES
from nvfp4ref.formats import BLOCK_SIZE

_intrinsic: Callable[..., Any] = intrinsic
_cg: Any = cgutils

#: Places in the array of counts: changed codes and scales, blocks of a and of b whose codes are all
#: zero.
CHANGED, CHANGED_SCALES, EMPTY_A, EMPTY_B = range(4)
_COUNTED = (CHANGED, CHANGED_SCALES, EMPTY_A, EMPTY_B)
#: Places in the array of sums: of n_a**2, n_a n_b and n_b**2, each above and below 2**`PART`.
SUMS, PART = 3, 30
#: Groups that are added up at a time.
GROUPS = 64
_NAN = 0x7F
_SQUARES = [half * half for half in HALVES] * 2
_SIZES = [*HALVES, *HALVES]
#: What R and e**2 B are multiplied with, so that no rounding hides a block.
ROUNDINGS = 1 + 16 * 2.0**-53


class _Sums:
    """The vector code that adds up eight blocks after eight."""

    def __init__(self, builder: Any, data: list[Any], numbers: list[Any]) -> None:
        self.b, self.v = builder, Vectors(builder)
        self.codes, self.scales = data[0:4:2], data[1:4:2]
        self.steps, self.lanes, self.unequal, self.listed = data[4], data[5:7], data[7], data[8]
        self.factors, self.floor = numbers[:3], numbers[3]
        self.sums = [self.v.room(DOUBLES) for _ in range(SUMS)]
        self.counts = {index: _cg.alloca_once_value(builder, number(0)) for index in _COUNTED}
        self.largest_scale = self.v.room(OCTETS)
        self.end = _cg.alloca_once_value(builder, number(0))

    def group(self, block: Any, place: Any) -> None:
        """Add up eight blocks from `block` on, and lay their codes out in lanes."""
        b, v = self.b, self.v
        byte = b.mul(block, number(CODE_BYTES))
        codes = [v.load(v.at(side, byte), BYTES) for side in self.codes]
        scales = [v.load(v.at(side, block), OCTETS) for side in self.scales]
        for side in scales:
            v.raise_to(self.largest_scale, b.and_(side, every(OCTETS, _NAN)))
        low = [b.and_(side, every(BYTES, 15)) for side in codes]
        high = [b.lshr(side, every(BYTES, 4)) for side in codes]
        for index, room in enumerate(self.lanes):
            for half, lanes in enumerate(v.lanes(low[index], high[index])):
                v.store(lanes, v.at(room, b.add(b.mul(place, number(128)), number(64 * half))))
        changed = [v.chosen(b.icmp_unsigned("!=", *half)) for half in (low, high)]
        changed_scales = v.chosen(b.icmp_unsigned("!=", *scales))
        b.store(b.add(b.add(*changed), changed_scales), v.at(self.unequal, place))
        v.add(self.counts[CHANGED], b.add(*changed))
        v.add(self.counts[CHANGED_SCALES], changed_scales)
        squares = [
            b.add(*(v.sum(v.in_table(_SQUARES, half[side])) for half in (low, high)))
            for side in (0, 1)
        ]
        is_empty = [b.icmp_unsigned("==", side, every(WORDS, 0)) for side in squares]
        with b.if_then(v.any(b.or_(*is_empty)), likely=False):
            for index, mask in zip((EMPTY_A, EMPTY_B), is_empty, strict=True):
                v.add(self.counts[index], v.chosen(mask))
        added = self._added(scales, squares[0], self._products(low, high), squares[1])
        for room, more in zip(self.sums, added, strict=True):
            b.store(b.fadd(b.load(room), more), room)
        may_be = self._may_be_largest(*added)
        with b.if_then(v.any(may_be), likely=False):
            self._list(may_be, block)

    def _products(self, low: list[Any], high: list[Any]) -> Any:
        """Sum over every block h_a h_b: the size of one, the other with both signs."""
        b, v = self.b, self.v
        pairs = []
        for one, two in (low, high):
            signed = b.xor(two, b.and_(one, every(BYTES, 8)))
            pairs.append((v.in_table(_SIZES, one), v.in_table(SIGNED, signed)))
        return v.products(pairs)

    def _added(self, scales: list[Any], *sums: Any) -> list[Any]:
        """Multiply the sums of codes with the steps of both scales that they belong to."""
        b = self.b
        steps = [self._steps_of(side) for side in scales]
        found = []
        for total, (one, two) in zip(sums, ((0, 0), (0, 1), (1, 1)), strict=True):
            first = b.fmul(b.sitofp(total, DOUBLES), steps[one])
            found.append(b.fmul(first, steps[two]))
        return found

    def _steps_of(self, scales: Any) -> Any:
        """Look the steps of scale bytes up."""
        b, v = self.b, self.v
        begin = v.splat(b.ptrtoint(self.steps, I64), WORDS)
        addresses = b.add(begin, b.shl(b.zext(scales, WORDS), every(WORDS, 3)))
        places = b.inttoptr(addresses, ir.VectorType(F64.as_pointer(), GROUP))
        mask = ir.VectorType(ir.IntType(1), GROUP)
        name = f"llvm.masked.gather.v{GROUP}f64.v{GROUP}p0"
        function = v.declared(name, DOUBLES, places.type, ir.IntType(32), mask, DOUBLES)
        aligned = ir.Constant(ir.IntType(32), 8)
        return b.call(function, [places, aligned, every(mask, 1), every(DOUBLES, 0.0)])

    def _may_be_largest(self, of_a: Any, mixed: Any, of_b: Any) -> Any:
        b = self.b
        apart = b.fsub(b.fadd(of_a, of_b), b.fadd(mixed, mixed))
        total = None
        for sums, factor in zip((apart, of_b, b.fsub(of_b, mixed)), self.factors, strict=True):
            more = b.fmul(sums, factor, flags=["contract"])
            total = more if total is None else b.fadd(total, more, flags=["contract"])
        return b.fcmp_ordered(">", total, self.floor)

    def _list(self, mask: Any, block: Any) -> None:
        b, v = self.b, self.v
        bits = b.bitcast(mask, I8)
        for place in range(GROUP):
            # Written always, kept where its bit moves the end.
            held = b.load(self.end)
            b.store(b.add(block, number(place)), v.at(self.listed, held))
            bit = b.and_(b.lshr(bits, ir.Constant(I8, place)), ir.Constant(I8, 1))
            b.store(b.add(held, b.zext(bit, I64)), self.end)

    def finish(self, sums: Any, counts: Any) -> Any:
        """Hand everything over, unless a scale is NaN; return the end of the list."""
        b, v = self.b, self.v
        is_void = v.any(b.icmp_unsigned("==", b.load(self.largest_scale), every(OCTETS, _NAN)))
        with b.if_else(is_void, likely=False) as (then, otherwise):
            with then:
                b.store(number(-1), self.end)
            with otherwise:
                for index, room in enumerate(self.sums):
                    total = v.total(b.fptosi(b.load(room), WORDS))
                    v.add(v.at(sums, 2 * index), b.ashr(total, number(PART)))
                    v.add(v.at(sums, 2 * index + 1), b.and_(total, number((1 << PART) - 1)))
                for index, room in self.counts.items():
                    v.add(v.at(counts, index), b.load(room))
        return b.load(self.end)


@_intrinsic
def add_up(
    typing_context: Any,
    codes_a: Any,
    scales_a: Any,
    codes_b: Any,
    scales_b: Any,
    steps: Any,
    lanes_a: Any,
    lanes_b: Any,
    unequal: Any,
    listed: Any,
    sums: Any,
    counts: Any,
    first: Any,
    groups: Any,
    apart: Any,
    energy: Any,
    mixed: Any,
    floor: Any,
) -> Any:
    """Add up `groups` groups of blocks from block `first` on; return how many blocks are listed.

    `unequal` gets how many codes and scales of each group are changed. Listed is a block whose
    R * apart + B * energy + S * mixed exceeds `floor`. Where a scale is NaN nothing is added, and
    -1 returned.
    """

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b, v = builder, Vectors(builder)
        data = pointers(context, builder, signature, arguments)
        chunk = _Sums(b, data, [v.splat(one, DOUBLES) for one in arguments[13:]])
        with _cg.for_range(b, arguments[12]) as loop:
            chunk.group(b.add(arguments[11], b.mul(loop.index, number(GROUP))), loop.index)
        return chunk.finish(*data[9:11])

    stored = codes_a, scales_a, codes_b, scales_b
    arrays = *stored, steps, lanes_a, lanes_b, unequal, listed, sums, counts
    return types.int64(*arrays, types.int64, types.int64, *[types.float64] * 4), lower


@_intrinsic
def largest_of(
    typing_context: Any, codes_a: Any, codes_b: Any, block: Any, scale_a: Any, scale_b: Any
) -> Any:
    """Give the largest |a - b| of a block, under scales of a half."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b, v = builder, Vectors(builder)
        data = pointers(context, builder, signature, arguments)
        half = ir.VectorType(I8, CODE_BYTES)
        many = ir.VectorType(F64, BLOCK_SIZE)
        values = []
        for side, scale in zip(data[:2], arguments[3:], strict=True):
            packed = v.load(v.at(side, b.mul(arguments[2], number(CODE_BYTES))), half)
            codes = v.joined([b.and_(packed, every(half, 15)), b.lshr(packed, every(half, 4))])
            halves = b.sitofp(v.in_table(SIGNED, codes), many)
            values.append(b.fmul(halves, v.splat(scale, many)))
        absolute = v.declared(f"llvm.fabs.v{BLOCK_SIZE}f64", many, many)
        largest = v.declared(f"llvm.vector.reduce.fmax.v{BLOCK_SIZE}f64", F64, many)
        return b.call(largest, [b.call(absolute, [b.fsub(*values)])], fastmath=("nnan",))

    return types.float64(codes_a, codes_b, types.int64, types.float64, types.float64), lower
