"""The counting of `scan_tally` in one sweep: each vector of codes is loaded once for every count.

Steps of 32 blocks, four vectors of 512 bits. In each:
    1. a word of 16 codes becomes one number that holds three counts (block, sum of s, sum of
       (s * s - s) / 2, s being a code in halves), by look-ups of bytes and sums of bytes
    2. these numbers are added up by scale byte; this keeps the scalar units busy, the rest the
       vector units
    3. the four vectors are turned into the bit planes of their codes; counting the set bits of
       the planes' 15 products gives the histogram of codes
    4. the product of the three planes of the magnitude tells whether every block has a +-6

Contract:
    (s * s - s) / 2    is an integer of at most 78: two of them fit a byte, two squares do not
    identical to `count_with_numpy` in every count

For processors with byte look-ups across a vector and vector bit counts (AVX512-VBMI, -VPOPCNTDQ).
"""

from collections.abc import Callable
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
_AHEAD = 4096

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


def _has_unfilled(builder: Any, vectors: list[Any]) -> Any:
    """Whether some block is live without a six, as a byte that is not zero."""
    found = ir.Constant(_INT8, 0)
    for words in vectors:
        sixes = builder.and_(words, _shifted_right(builder, words, 1))
        sixes = builder.and_(sixes, _shifted_right(builder, words, 2))
        sixes = builder.and_(sixes, _every(0x1111111111111111))
        live = builder.and_(words, _every(0x7777777777777777))
        unfilled = builder.and_(
            builder.icmp_unsigned("==", sixes, _every(0)),
            builder.icmp_unsigned("!=", live, _every(0)),
        )
        found = builder.or_(found, builder.bitcast(unfilled, _INT8))
    return found


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

        def index(value: int) -> Any:
            return ir.Constant(_INT64, value)

        codes_at, scales_at = data(0, _INT8), data(1, _INT8)
        tables_at, counts_at, seen_at = data(4, _INT64), data(5, _INT64), data(6, _INT64)
        numbers = _cg.alloca_once(builder, ir.ArrayType(_WORDS, VECTORS))
        numbers.align = 64
        numbers_at = builder.bitcast(numbers, _INT64.as_pointer())
        flag = _cg.alloca_once_value(builder, ir.Constant(_INT8, 0))
        totals = {s: _cg.alloca_once_value(builder, _every(0)) for s in PLANE_SETS}
        prefetch = _cg.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [_INT8.as_pointer(), _INT32, _INT32, _INT32]),
            "llvm.prefetch.p0",
        )

        for_reading = [ir.Constant(_INT32, value) for value in (0, 3, 1)]
        count_bits = _cg.get_or_insert_function(
            builder.module, ir.FunctionType(_WORDS, [_WORDS]), f"llvm.ctpop.v{LANES}i64"
        )

        with _cg.for_range(builder, arguments[3], intp=_INT64) as loop:
            block = builder.add(arguments[2], builder.mul(loop.index, index(STEP)))
            start = builder.gep(codes_at, [builder.mul(block, index(CODE_BYTES))])
            vectors = []
            for number in range(VECTORS):
                place = builder.gep(start, [index(64 * number)])
                ahead = builder.gep(place, [index(_AHEAD)])
                builder.call(prefetch, [ahead, *for_reading])
                at = builder.bitcast(place, _WORDS.as_pointer())
                vectors.append(builder.load(at, align=1))
                target = builder.gep(numbers, [ir.Constant(_INT32, 0), ir.Constant(_INT32, number)])
                builder.store(_number(builder, vectors[-1]), target, align=64)

            planes = _planes(builder, *vectors)
            products: dict[int, Any] = {}
            for s in PLANE_SETS:
                lowest = s & -s
                plane = planes[lowest.bit_length() - 1]
                products[s] = builder.and_(products[s - lowest], plane) if s > lowest else plane
                total = builder.load(totals[s])
                builder.store(
                    builder.add(total, builder.call(count_bits, [products[s]])), totals[s]
                )

            filled = None
            for bit in range(4):
                has_six = builder.icmp_unsigned(
                    "!=", builder.and_(products[7], _every(0x1111111111111111 << bit)), _every(0)
                )
                filled = has_six if filled is None else builder.and_(filled, has_six)
            all_filled = builder.icmp_unsigned(
                "==", builder.bitcast(filled, _INT8), ir.Constant(_INT8, 255)
            )
            with builder.if_then(builder.not_(all_filled), likely=False):
                found = _has_unfilled(builder, vectors)
                builder.store(builder.or_(builder.load(flag), found), flag)

            for group in range(STEP // TABLES):
                at = builder.gep(scales_at, [builder.add(block, index(TABLES * group))])
                eight = builder.load(builder.bitcast(at, _INT64.as_pointer()), align=1)
                for table in range(TABLES):
                    byte = builder.and_(builder.lshr(eight, index(8 * table)), index(255))
                    entry = builder.gep(tables_at, [builder.add(byte, index(TABLE_PITCH * table))])
                    packed = builder.load(builder.gep(numbers_at, [index(TABLES * group + table)]))
                    builder.store(builder.add(builder.load(entry), packed), entry)

        for s in PLANE_SETS:
            total, whole = builder.load(totals[s]), ir.Constant(_INT64, 0)
            for lane in range(LANES):
                whole = builder.add(
                    whole, builder.extract_element(total, ir.Constant(_INT32, lane))
                )
            place = builder.gep(counts_at, [index(s)])
            builder.store(builder.add(builder.load(place), whole), place)
        noted = builder.zext(builder.load(flag), _INT64)
        builder.store(builder.or_(builder.load(seen_at), noted), seen_at)
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
