"""Two NVFP4 weights held against each other, sixteen elements at a time.

Contract:
    values     looked up in float32 tables [256, 16] by scale byte and code; what the tables hold is
               the caller's (`nvfp4.Tables`)
    sums       of squares, in float32 by lane within a row of blocks and in float64 across rows: a
               row of n blocks adds a relative error of at most n * 2**-24. Blocks whose codes,
               scale and table are equal are summed in integers, and their scales' squares in
               float64
    beyond     |a - b| > gap a + gap b, one float32 rounding on either side
    codes      changed where their four bits differ; steps are counted in the order of the values,
               -6 to 6, with 0 and -0 one place
    largest    |a - b| of each row; which element that is, the caller looks up

A row is gone through twice while it is in the first-level cache: once in bytes, eight blocks at a
time, which counts codes and lists the blocks that must be looked at by value; once these.

The IR is generic LLVM vector code. Where the processor has AVX-512 a table row is looked up in one
instruction, and equal blocks are not looked at again; elsewhere by a gather, and every block is.
"""

from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from nvfp4check.checkpoint.scan_numba import VECTOR_BYTES
from nvfp4check.checkpoint.scan_tally import HALVES
from nvfp4ref.formats import BLOCK_SIZE

_intrinsic: Callable[..., Any] = intrinsic
_cg: Any = cgutils

#: Smallest step counted in each column of the histogram of code steps.
STEPS = (1, 2, 3, 5, 9)
#: Places in the array of counts: changed codes, elements beyond, blocks of a and of b whose codes
#: are all zero, then one for each of `STEPS`.
CHANGED, BEYOND, EMPTY_A, EMPTY_B, FIRST_STEP = range(5)
COUNTS = FIRST_STEP + len(STEPS)
#: Places in the array of sums: squares of a, of b, and of a - b.
SUMS = 3

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_WORDS = ir.VectorType(_I32, BLOCK_SIZE)
_FLOATS = ir.VectorType(_F32, BLOCK_SIZE)
#: Blocks gone through at a time in bytes, and the codes of as many bytes.
_GROUP = 8
_BYTES = ir.VectorType(_I8, 8 * _GROUP)
_BLOCKS = ir.VectorType(_I64, _GROUP)
_SCALES = ir.VectorType(_I8, _GROUP)
_DOUBLES = ir.VectorType(_F64, _GROUP)
#: Groups after which counts in bytes are emptied: each adds at most 2.
_FLUSH = 120
_WIDE = VECTOR_BYTES == 64
_NAN = 0x7F
#: The bits of a block's codes that are not signs.
_SIZES = 0x7777777777777777
#: Bits of an E4M3 magnitude as the uppermost of a float64, and what makes up for its other bias.
_TO_DOUBLE, _BIAS = 52 - 3, 2.0 ** (1023 - 7)
#: Places in a table [256, 16] of the number under scale 1 and code 1.
_ONE = (0x38, 2)


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use; keep the machine code on disk where there is a place for it."""
    try:
        made = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no writable cache directory
        made = numba.njit(nogil=True, error_model="numpy")(function)
    return cast("Callable[..., Any]", made)


def _constant(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _declared(builder: Any, name: str, kind: Any, *arguments: Any) -> Any:
    return _cg.get_or_insert_function(builder.module, ir.FunctionType(kind, arguments), name)


def _loaded(builder: Any, place: Any, kind: Any) -> Any:
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=1)


def _data(context: Any, builder: Any, signature: Any, arguments: Any) -> list[Any]:
    """Give the first elements of all arguments that are arrays, None for the others."""
    return [
        context.make_array(kind)(context, builder, value).data
        if isinstance(kind, types.Array)
        else None
        for kind, value in zip(signature.args, arguments, strict=True)
    ]


def _add_to(builder: Any, array: Any, place: int, value: Any) -> None:
    target = builder.gep(array, [ir.Constant(_I64, place)])
    add = builder.fadd if value.type == _F64 else builder.add
    builder.store(add(builder.load(target), value), target)


def _order(builder: Any, codes: Any) -> Any:
    """Return the place of each code in the order of values."""
    size = builder.and_(codes, _constant(_BYTES, 7))
    is_negative = builder.icmp_unsigned("!=", builder.and_(codes, _constant(_BYTES, 8)), _zero())
    return builder.select(is_negative, builder.sub(_zero(), size), size)


def _zero() -> Any:
    return _constant(_BYTES, 0)


def _unequal_codes(builder: Any, one: Any, two: Any) -> list[Any]:
    """Return a mask of changed codes, and one for each of `STEPS`."""
    steps = builder.sub(_order(builder, one), _order(builder, two))
    is_negative = builder.icmp_signed("<", steps, _zero())
    steps = builder.select(is_negative, builder.sub(_zero(), steps), steps)
    return [
        builder.icmp_unsigned("!=", one, two),
        *(builder.icmp_signed(">=", steps, _constant(_BYTES, step)) for step in STEPS),
    ]


def _squares(builder: Any, low: Any, high: Any) -> Any:
    """Sum the squares of each block's codes, in quarters."""
    table = ir.Constant(_BYTES, [half * half for half in HALVES] * (_BYTES.count // len(HALVES)))
    look_up = _declared(builder, "llvm.x86.avx512.pshuf.b.512", _BYTES, _BYTES, _BYTES)
    add = _declared(builder, "llvm.x86.avx512.psad.bw.512", _BLOCKS, _BYTES, _BYTES)
    both = (builder.call(add, [builder.call(look_up, [table, n]), _zero()]) for n in (low, high))
    return builder.add(*both)


def _equal_energy(builder: Any, squares: Any, scales: Any, is_listed: Any) -> Any:
    """Give the sum of squares of every block that is not listed, times its scale's square."""
    b = builder
    bits = b.shl(
        b.zext(b.and_(scales, _constant(_SCALES, 0x7F)), _BLOCKS), _constant(_BLOCKS, _TO_DOUBLE)
    )
    scale = b.fmul(b.bitcast(bits, _DOUBLES), _constant(_DOUBLES, _BIAS))
    counted = b.select(is_listed, _constant(_BLOCKS, 0), squares)
    return b.fmul(b.uitofp(counted, _DOUBLES), b.fmul(scale, scale))


@_intrinsic
def _compare_bytes(
    typing_context: Any,
    codes_a: Any,
    scales_a: Any,
    codes_b: Any,
    scales_b: Any,
    first: Any,
    groups: Any,
    listed: Any,
    places: Any,
    counts: Any,
    energy: Any,
) -> Any:
    """Count what is unequal in `groups` groups of blocks from block `first` on, `_FLUSH` at most.

    The numbers of blocks that must be looked at by value go to `places` from `listed` on; returned
    is the end of the list. Where tables are equal, `energy` holds what the others add.
    """

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = builder
        data = _data(context, builder, signature, arguments)
        count_places = [_cg.alloca_once_value(b, _zero()) for _ in range(1 + len(STEPS))]
        empty_places = [_cg.alloca_once_value(b, _constant(_BLOCKS, 0)) for _ in range(2)]
        sum_place = _cg.alloca_once_value(b, _constant(_DOUBLES, 0.0))
        end = _cg.alloca_once_value(b, arguments[6])
        with _cg.for_range(b, arguments[5]) as loop:
            block = b.add(arguments[4], b.mul(loop.index, ir.Constant(_I64, _GROUP)))
            byte = b.mul(block, ir.Constant(_I64, BLOCK_SIZE // 2))
            one, two = (_loaded(b, b.gep(data[side], [byte]), _BYTES) for side in (0, 2))
            scales = [_loaded(b, b.gep(data[side], [block]), _SCALES) for side in (1, 3)]
            low, high = (
                [b.and_(_shifted(b, codes, shift), _constant(_BYTES, 15)) for codes in (one, two)]
                for shift in (0, 4)
            )
            blocks = [b.bitcast(codes, _BLOCKS) for codes in (one, two)]
            is_changed = b.icmp_unsigned("!=", *blocks)
            for place, codes in zip(empty_places, blocks, strict=True):
                sizes = b.and_(codes, _constant(_BLOCKS, _SIZES))
                is_empty = b.icmp_unsigned("==", sizes, _constant(_BLOCKS, 0))
                b.store(b.add(b.load(place), b.zext(is_empty, _BLOCKS)), place)
            with b.if_then(_any(b, is_changed)):
                for masks in (_unequal_codes(b, *low), _unequal_codes(b, *high)):
                    for place, mask in zip(count_places, masks, strict=True):
                        b.store(b.add(b.load(place), b.zext(mask, _BYTES)), place)
            if _WIDE:
                size = b.and_(scales[0], _constant(_SCALES, _NAN))
                is_listed = b.or_(is_changed, b.icmp_unsigned("!=", *scales))
                is_nan = b.icmp_unsigned("==", size, _constant(_SCALES, _NAN))
                is_listed = b.or_(is_listed, is_nan)
                squares = _squares(b, low[0], high[0])
                more = _equal_energy(b, squares, scales[0], is_listed)
                b.store(b.fadd(b.load(sum_place), more), sum_place)
                bits = b.bitcast(is_listed, _I8)
                for place in range(_GROUP):
                    # Written always, kept where its bit moves the end.
                    number = b.trunc(b.add(block, ir.Constant(_I64, place)), _I32)
                    b.store(number, b.gep(data[7], [b.load(end)]))
                    bit = b.and_(b.lshr(bits, ir.Constant(_I8, place)), ir.Constant(_I8, 1))
                    b.store(b.add(b.load(end), b.zext(bit, _I64)), end)
        shorts = ir.VectorType(ir.IntType(16), _BYTES.count)
        reduce = _declared(b, "llvm.vector.reduce.add.v64i16", shorts.element, shorts)
        for index, place in enumerate(count_places):
            total = b.zext(b.call(reduce, [b.zext(b.load(place), shorts)]), _I64)
            _add_to(b, data[8], CHANGED if index == 0 else FIRST_STEP + index - 1, total)
        reduce = _declared(b, "llvm.vector.reduce.add.v8i64", _I64, _BLOCKS)
        for index, place in zip((EMPTY_A, EMPTY_B), empty_places, strict=True):
            _add_to(b, data[8], index, b.call(reduce, [b.load(place)]))
        kind = _declared(b, "llvm.vector.reduce.fadd.v8f64", _F64, _F64, _DOUBLES)
        _add_to(b, data[9], 0, b.call(kind, [ir.Constant(_F64, 0.0), b.load(sum_place)]))
        return b.load(end)

    arrays = codes_a, scales_a, codes_b, scales_b
    return types.int64(
        *arrays, types.int64, types.int64, types.int64, places, counts, energy
    ), lower


def _shifted(builder: Any, codes: Any, shift: int) -> Any:
    return builder.lshr(codes, _constant(_BYTES, shift)) if shift else codes


def _any(builder: Any, mask: Any) -> Any:
    bits = builder.bitcast(mask, ir.IntType(mask.type.count))
    return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))


def _nibbles(builder: Any, data: Any, block: Any) -> Any:
    """Load the 16 codes of a block, in any order; bits above the lowest four are not theirs."""
    b = builder
    place = b.gep(data, [b.mul(block, ir.Constant(_I64, BLOCK_SIZE // 2))])
    word = _loaded(b, place, _I64)
    single = b.insert_element(ir.Constant(_BLOCKS, ir.Undefined), word, ir.Constant(_I32, 0))
    every = b.shuffle_vector(single, single, ir.Constant(ir.VectorType(_I32, _GROUP), [0] * _GROUP))
    shifts = ir.Constant(_WORDS, [4 * (lane // 2) for lane in range(BLOCK_SIZE)])
    return b.lshr(b.bitcast(every, _WORDS), shifts)


def _look_up(builder: Any, row: Any, codes: Any) -> Any:
    b = builder
    if _WIDE:
        name = "llvm.x86.avx512.permvar.sf.512"
        return b.call(
            _declared(b, name, _FLOATS, _FLOATS, _WORDS),
            [b.load(b.bitcast(row, _FLOATS.as_pointer()), align=4), codes],
        )
    found = ir.Constant(_FLOATS, ir.Undefined)
    low = b.and_(codes, _constant(_WORDS, 15))
    for lane in range(BLOCK_SIZE):
        at = ir.Constant(_I32, lane)
        value = b.load(b.gep(row, [b.extract_element(low, at)]), align=4)
        found = b.insert_element(found, value, at)
    return found


@_intrinsic
def _compare_values(
    typing_context: Any,
    codes_a: Any,
    scales_a: Any,
    codes_b: Any,
    scales_b: Any,
    tables: Any,
    places: Any,
    listed: Any,
    sums: Any,
    counts: Any,
) -> Any:
    """Hold the blocks of a list against each other; return the largest difference.

    `tables` [4, 256, 16] holds the values of a and of b and their half gaps; `sums` and `counts`
    are added to.
    """

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = builder
        data = _data(context, builder, signature, arguments)
        pitch = 256 * BLOCK_SIZE
        tables = [b.gep(data[4], [ir.Constant(_I64, pitch * place)]) for place in range(4)]
        zero = _constant(_FLOATS, 0.0)
        sum_places = [_cg.alloca_once_value(b, zero) for _ in range(SUMS)]
        beyond = _cg.alloca_once_value(b, _constant(_WORDS, 0))
        largest = _cg.alloca_once_value(b, zero)
        with _cg.for_range(b, arguments[6]) as loop:
            block = b.zext(b.load(b.gep(data[5], [loop.index])), _I64)
            codes = [_nibbles(b, data[side], block) for side in (0, 2)]
            rows = [
                b.mul(b.zext(b.load(b.gep(data[side], [block])), _I64), ir.Constant(_I64, 16))
                for side in (1, 3)
            ]
            va, vb, gap_a, gap_b = (
                _look_up(b, b.gep(tables[place], [rows[place % 2]]), codes[place % 2])
                for place in range(4)
            )
            difference = b.fsub(va, vb)
            absolute = _declared(b, f"llvm.fabs.v{BLOCK_SIZE}f32", _FLOATS, _FLOATS)
            distance = b.call(absolute, [difference])
            squared = (va, vb, difference)
            for place, number in zip(sum_places, squared, strict=True):
                b.store(b.fadd(b.load(place), b.fmul(number, number)), place)
            held = b.load(largest)
            b.store(b.select(b.fcmp_ordered(">", distance, held), distance, held), largest)
            mask = b.fcmp_ordered(">", distance, b.fadd(gap_a, gap_b))
            b.store(b.add(b.load(beyond), b.zext(mask, _WORDS)), beyond)
        reduce = _declared(b, "llvm.vector.reduce.fadd.v16f32", _F32, _F32, _FLOATS)
        for index, place in enumerate(sum_places):
            zero_first = [ir.Constant(_F32, 0.0), b.load(place)]
            total = b.call(reduce, zero_first, fastmath=("reassoc",))
            _add_to(b, data[7], index, b.fpext(total, _F64))
        reduce = _declared(b, "llvm.vector.reduce.add.v16i32", _I32, _WORDS)
        _add_to(b, data[8], BEYOND, b.zext(b.call(reduce, [b.load(beyond)]), _I64))
        return b.call(
            _declared(b, "llvm.vector.reduce.fmax.v16f32", _F32, _FLOATS),
            [b.load(largest)],
            fastmath=("nnan",),
        )

    arrays = codes_a, scales_a, codes_b, scales_b, tables, places
    return types.float32(*arrays, types.int64, sums, counts), lower


@jit
def compare_rows(
    codes_a: Any,
    scales_a: Any,
    codes_b: Any,
    scales_b: Any,
    tables: Any,
    row_blocks: int,
    sums: Any,
    counts: Any,
    largest: Any,
) -> None:
    """Compare rows of flat packed codes and scale bytes; `largest` has a place for every row."""
    same_tables = True
    for byte in range(256):
        for code in range(16):
            same_tables &= tables[0, byte, code] == tables[1, byte, code]
    listed_all = not (_WIDE and same_tables)
    places = np.empty(row_blocks + _GROUP, np.int32)
    energy = np.zeros(1)
    whole = row_blocks // _GROUP
    rest = row_blocks - whole * _GROUP
    # What is left of a row, followed by zeros, which are equal and add nothing.
    left_a, left_b = np.zeros(8 * _GROUP, np.uint8), np.zeros(8 * _GROUP, np.uint8)
    under_a, under_b = np.zeros(_GROUP, np.uint8), np.zeros(_GROUP, np.uint8)
    for row in range(largest.size):
        first = row * row_blocks
        listed = 0
        for group in range(0, whole, _FLUSH):
            listed = _compare_bytes(
                codes_a,
                scales_a,
                codes_b,
                scales_b,
                first + group * _GROUP,
                min(_FLUSH, whole - group),
                listed,
                places,
                counts,
                energy,
            )
        if rest:
            last = first + whole * _GROUP
            left_a[: 8 * rest] = codes_a[8 * last : 8 * (last + rest)]
            left_b[: 8 * rest] = codes_b[8 * last : 8 * (last + rest)]
            under_a[:rest] = scales_a[last : last + rest]
            under_b[:rest] = scales_b[last : last + rest]
            before = listed
            listed = _compare_bytes(
                left_a, under_a, left_b, under_b, 0, 1, listed, places, counts, energy
            )
            for place in range(before, listed):
                places[place] += last
        if listed_all:
            listed = row_blocks
            for place in range(row_blocks):
                places[place] = first + place
        largest[row] = _compare_values(
            codes_a, scales_a, codes_b, scales_b, tables, places, listed, sums, counts
        )
        padding = (_GROUP - rest) % _GROUP
        counts[EMPTY_A] -= padding
        counts[EMPTY_B] -= padding
    if not listed_all:
        # Squares are in quarters of a code's and a scale's one.
        one = np.float64(tables[0, _ONE[0], _ONE[1]])
        sums[0] += energy[0] * one * one / 4
        sums[1] += energy[0] * one * one / 4


@jit
def same_products(
    codes_a: Any,
    scales_a: Any,
    codes_b: Any,
    scales_b: Any,
    products: Any,
    p: int,
    q: int,
) -> bool:
    """Whether p * code * scale of a is q * code * scale of b throughout, in exact integers.

    `products` [256, 16] holds code times scale in the smallest unit, at most 2**22 in magnitude;
    a scale that is NaN is marked by `2**40`, and only equal to another.
    """
    nan = 1 << 40
    for block in range(scales_a.size):
        left, right = products[scales_a[block]], products[scales_b[block]]
        if left[0] == nan or right[0] == nan:
            if left[0] != right[0]:
                return False
            continue
        for byte in range(8):
            pair_a, pair_b = codes_a[8 * block + byte], codes_b[8 * block + byte]
            if p * left[pair_a & 15] != q * right[pair_b & 15]:
                return False
            if p * left[pair_a >> 4] != q * right[pair_b >> 4]:
                return False
    return True
