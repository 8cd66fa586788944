"""The counting of `scan_tally` in one sweep: each vector of codes is loaded once for every count.

Steps of 32 blocks, four vectors of 512 bits. In each:
    1. a word of 16 codes becomes one number that holds three counts (block, sum of s, sum of
       (s * s - s) / 2, s being a code in halves), by look-ups of bytes and sums of bytes
    2. the numbers of some steps before are added up by scale byte, which keeps the scalar units
       busy while all else is the work of the vector units; to take numbers just stored as vectors
       word by word from the store queue would make it wait
    3. the four vectors are turned into the bit planes of their codes; counting the set bits of
       the planes' 15 products gives the histogram of codes
    4. the product of the three planes of the magnitude tells whether every block has a +-6

Contract:
    (s * s - s) / 2    is an integer of at most 78: two of them fit a byte, two squares do not
    identical to `count_with_numpy` in every count

For processors with byte look-ups across a vector and vector bit counts (AVX512-VBMI, -VPOPCNTDQ).
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from nvfp4check.checkpoint.scan_packed import (
    BIASED,
    COUNT_SHIFT,
    FLUSH,
    SIGNED,
    SUM_SHIFT,
    TABLE_PITCH,
    TABLES,
    flush,
    jit,
)
from nvfp4check.checkpoint.scan_tally import CODE_BYTES

LANES = 8
VECTORS = 4
#: Blocks of one step.
STEP = VECTORS * LANES
#: Sets of planes whose products are counted; 0 is every code there is.
PLANE_SETS = range(1, 16)

#: By code, (s * s - s) / 2: two of them fit a byte, two squares do not.
_TRIANGLES = [(half * half - half) // 2 for half in SIGNED]
#: Bytes by which codes are asked for before they are needed.
_AHEAD = 8192
#: Steps whose numbers are kept, a power of two, and steps after which numbers are added up.
_KEPT, _DELAY = 8, 6

_intrinsic: Callable[..., Any] = intrinsic
_cg: Any = cgutils
_INT8, _INT32, _INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_WORDS = ir.VectorType(_INT64, LANES)
_OCTETS = ir.VectorType(_INT8, LANES * CODE_BYTES)


def _every(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * LANES)


def _choose(builder: Any, mask: int, one: Any, other: Any) -> Any:
    """Bits of `one` where the mask has them, else of `other`: a single vector instruction."""
    kept = builder.and_(one, _every(mask))
    return builder.or_(kept, builder.and_(other, _every(~mask & (2**64 - 1))))


def _shifted_left(builder: Any, value: Any, by: int) -> Any:
    return builder.shl(value, _every(by))


def _shifted_right(builder: Any, value: Any, by: int) -> Any:
    return builder.lshr(value, _every(by))


def _planes(builder: Any, a: Any, b: Any, c: Any, d: Any) -> list[Any]:
    """Bit planes 0 to 3 of the codes of four vectors; in each nibble one bit of each vector."""
    pairs = []
    for one, other in ((a, b), (c, d)):
        low = _choose(builder, 0x3333333333333333, one, _shifted_left(builder, other, 2))
        high = _choose(builder, 0x3333333333333333, _shifted_right(builder, one, 2), other)
        pairs.append((low, high))
    planes = []
    for one, other in zip(*pairs, strict=True):
        even = _choose(builder, 0x5555555555555555, one, _shifted_left(builder, other, 1))
        odd = _choose(builder, 0x5555555555555555, _shifted_right(builder, one, 1), other)
        planes += [even, odd]
    return planes


def _number(builder: Any, words: Any) -> Any:
    """Pack the counts of each block of a vector."""
    look_up = _cg.get_or_insert_function(
        builder.module,
        ir.FunctionType(_OCTETS, [_OCTETS, _OCTETS]),
        "llvm.x86.avx512.permvar.qi.512",
    )
    add_bytes = _cg.get_or_insert_function(
        builder.module, ir.FunctionType(_WORDS, [_OCTETS, _OCTETS]), "llvm.x86.avx512.psad.bw.512"
    )
    low = builder.bitcast(words, _OCTETS)
    high = builder.bitcast(_shifted_right(builder, words, 4), _OCTETS)

    def summed(entries: list[int]) -> Any:
        # A look-up heeds six bits of a byte: two more than a code has.
        table = ir.Constant(_OCTETS, entries * 4)
        both = builder.add(
            builder.call(look_up, [table, low]), builder.call(look_up, [table, high])
        )
        return builder.call(add_bytes, [both, ir.Constant(_OCTETS, [0] * 64)])

    sums = _shifted_left(builder, summed(BIASED), SUM_SHIFT)
    return builder.or_(builder.or_(summed(_TRIANGLES), sums), _every(1 << COUNT_SHIFT))


def _index(value: int) -> Any:
    return ir.Constant(_INT64, value)


class _Sweep:
    """Writes the parts of a step."""

    def __init__(self, builder: Any, codes: Any, scales: Any, tables: Any) -> None:
        self.b = builder
        self.codes, self.scales, self.tables = codes, scales, tables
        numbers = _cg.alloca_once(builder, ir.ArrayType(_INT64, _KEPT * STEP))
        numbers.align = 64
        self.numbers = builder.bitcast(numbers, _INT64.as_pointer())
        self.totals = {s: _cg.alloca_once_value(builder, _every(0)) for s in PLANE_SETS}
        self.unfilled = _cg.alloca_once_value(builder, ir.Constant(_INT8, 0))

    def _declared(self, name: str, kind: Any) -> Any:
        return _cg.get_or_insert_function(self.b.module, kind, name)

    def _kept(self, step: Any, place: int) -> Any:
        """Address of a number of a step."""
        b = self.b
        first = b.mul(b.and_(step, _index(_KEPT - 1)), _index(STEP))
        return b.gep(self.numbers, [b.add(first, _index(place))])

    def load(self, block: Any) -> list[Any]:
        """Load the vectors of a step, and ask for those of a later one."""
        b = self.b
        arguments = [_INT8.as_pointer(), _INT32, _INT32, _INT32]
        prefetch = self._declared("llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), arguments))
        to_read_soon = [ir.Constant(_INT32, value) for value in (0, 3, 1)]
        start = b.gep(self.codes, [b.mul(block, _index(CODE_BYTES))])
        vectors = []
        for number in range(VECTORS):
            place = b.gep(start, [_index(LANES * CODE_BYTES * number)])
            b.call(prefetch, [b.gep(place, [_index(_AHEAD)]), *to_read_soon])
            vectors.append(b.load(b.bitcast(place, _WORDS.as_pointer()), align=1))
        return vectors

    def keep_numbers(self, step: Any, vectors: list[Any]) -> None:
        """Pack the counts of each block and keep them for later."""
        for number, words in enumerate(vectors):
            place = self._kept(step, LANES * number)
            at = self.b.bitcast(place, _WORDS.as_pointer())
            self.b.store(_number(self.b, words), at, align=64)

    def add_by_scale(self, step: Any, block: Any) -> None:
        """Add the numbers kept of a step to the tables."""
        b = self.b
        for first in range(0, STEP, TABLES):
            at = b.gep(self.scales, [b.add(block, _index(first))])
            eight = b.load(b.bitcast(at, _INT64.as_pointer()), align=1)
            for table in range(TABLES):
                byte = b.and_(b.lshr(eight, _index(8 * table)), _index(255))
                entry = b.gep(self.tables, [b.add(byte, _index(TABLE_PITCH * table))])
                number = b.load(self._kept(step, first + table))
                b.store(b.add(b.load(entry), number), entry)

    def count_planes(self, vectors: list[Any]) -> Any:
        """Count bits of all products of planes; return that of the three of the magnitude."""
        b = self.b
        count = self._declared(f"llvm.ctpop.v{LANES}i64", ir.FunctionType(_WORDS, [_WORDS]))
        planes = _planes(b, *vectors)
        products: dict[int, Any] = {}
        for s, total in self.totals.items():
            lowest = s & -s
            plane = planes[lowest.bit_length() - 1]
            products[s] = b.and_(products[s - lowest], plane) if s > lowest else plane
            b.store(b.add(b.load(total), b.call(count, [products[s]])), total)
        return products[7]

    def note_unfilled(self, vectors: list[Any], sixes: Any) -> None:
        """Look closer where some block has no six: a block of zeros needs none."""
        b = self.b
        each = [
            b.icmp_unsigned("!=", b.and_(sixes, _every(0x1111111111111111 << bit)), _every(0))
            for bit in range(VECTORS)
        ]
        filled = b.bitcast(reduce(b.and_, each), _INT8)
        with b.if_then(b.icmp_unsigned("!=", filled, ir.Constant(_INT8, 255)), likely=False):
            found = b.load(self.unfilled)
            for words in vectors:
                six = b.and_(words, _shifted_right(b, words, 1))
                six = b.and_(b.and_(six, _shifted_right(b, words, 2)), _every(0x1111111111111111))
                live = b.and_(words, _every(0x7777777777777777))
                unfilled = b.and_(
                    b.icmp_unsigned("==", six, _every(0)), b.icmp_unsigned("!=", live, _every(0))
                )
                found = b.or_(found, b.bitcast(unfilled, _INT8))
            b.store(found, self.unfilled)

    def finish(self, counts: Any, seen: Any) -> None:
        """Add up the lanes of the totals, and hand over whether a block was unfilled."""
        b = self.b
        for s, total in self.totals.items():
            place = b.gep(counts, [_index(s)])
            lanes = [
                b.extract_element(b.load(total), ir.Constant(_INT32, lane)) for lane in range(LANES)
            ]
            b.store(reduce(b.add, lanes, b.load(place)), place)
        b.store(b.or_(b.load(seen), b.zext(b.load(self.unfilled), _INT64)), seen)


@_intrinsic
def _count_steps(
    typing_context: Any,
    codes: Any,
    scales: Any,
    first: Any,
    steps: Any,
    tables: Any,
    counts: Any,
    seen: Any,
) -> Any:
    """Add steps of blocks to tables [8, pitch] of packed numbers and to counts [16] of plane sets.

    `seen[0]` becomes other than zero where a block is live without a six.
    """

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def data(position: int, form: Any) -> Any:
            kind = signature.args[position]
            array = context.make_array(kind)(context, builder, arguments[position])
            return builder.bitcast(array.data, form.as_pointer())

        def block_of(step: Any) -> Any:
            return builder.add(arguments[2], builder.mul(step, _index(STEP)))

        sweep = _Sweep(builder, data(0, _INT8), data(1, _INT8), data(4, _INT64))
        last = arguments[3]
        with _cg.for_range(builder, last, intp=_INT64) as loop:
            vectors = sweep.load(block_of(loop.index))
            sweep.keep_numbers(loop.index, vectors)
            sweep.note_unfilled(vectors, sweep.count_planes(vectors))
            due = builder.sub(loop.index, _index(_DELAY))
            with builder.if_then(builder.icmp_signed(">=", due, _index(0)), likely=True):
                sweep.add_by_scale(due, block_of(due))
        left = builder.sub(last, _index(_DELAY))
        left = builder.select(builder.icmp_signed("<", left, _index(0)), _index(0), left)
        with _cg.for_range_slice(builder, left, last, _index(1), intp=_INT64) as (step, _):
            sweep.add_by_scale(step, block_of(step))
        sweep.finish(data(5, _INT64), data(6, _INT64))
        return context.get_dummy_value()

    return types.void(codes, scales, types.int64, types.int64, tables, counts, seen), lower


@jit
def count_fused(codes: Any, scales: Any, joint: Any, bits: Any, seen: Any) -> None:
    """Count whole steps of blocks: by scale byte, by set of planes, and whether any is unfilled."""
    tables = np.zeros((TABLES, TABLE_PITCH), np.uint64)
    found = np.zeros((256, 3), np.int64)
    for first in range(0, scales.size, FLUSH):
        steps = min(FLUSH, scales.size - first) // STEP
        _count_steps(codes, scales, first, steps, tables, bits, seen)
        flush(tables, found)
    for byte in range(256):
        blocks, triangles, total = found[byte, 0], found[byte, 1], found[byte, 2]
        joint[byte, 0] += blocks
        joint[byte, 1] += 2 * triangles + total
        joint[byte, 2] += total
