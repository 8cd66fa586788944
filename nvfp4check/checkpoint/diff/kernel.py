"""Two NVFP4 weights held against each other, sixteen elements at a time.

Contract:
    values     looked up in float32 tables [256, 16] by scale byte and code; what the tables hold is
               the caller's (`nvfp4.Tables`)
    sums       of squares, in float32 by lane within a row of blocks and in float64 across rows: a
               row of n blocks adds a relative error of at most n * 2**-24
    beyond     |a - b| > gap a + gap b, one float32 rounding on either side
    codes      changed where their four bits differ; steps are counted in the order of the values,
               -6 to 6, with 0 and -0 one place
    largest    |a - b| of each row; which element that is, the caller looks up

The IR is generic LLVM vector code. Where the processor has AVX-512 a table row is looked up in one
instruction, elsewhere by a gather.
"""

from collections.abc import Callable
from typing import Any, cast

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from nvfp4check.checkpoint.scan_numba import VECTOR_BYTES
from nvfp4ref.formats import BLOCK_SIZE

_intrinsic: Callable[..., Any] = intrinsic
_cg: Any = cgutils

#: Smallest step counted in each column of the histogram of code steps.
STEPS = (1, 2, 3, 5, 9)
#: Places in the array of counts: changed codes, elements beyond, then one for each of `STEPS`.
CHANGED, BEYOND, FIRST_STEP = 0, 1, 2
COUNTS = FIRST_STEP + len(STEPS)
#: Places in the array of sums: squares of a, of b, and of a - b.
SUMS = 3

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_WORDS = ir.VectorType(_I32, BLOCK_SIZE)
_FLOATS = ir.VectorType(_F32, BLOCK_SIZE)
#: Place of each code in the order of values.
_ORDER = [0, 1, 2, 3, 4, 5, 6, 7, 0, -1, -2, -3, -4, -5, -6, -7]


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use; keep the machine code on disk where there is a place for it."""
    try:
        made = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no writable cache directory
        made = numba.njit(nogil=True, error_model="numpy")(function)
    return cast("Callable[..., Any]", made)


def _every(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * BLOCK_SIZE)


class _Code:
    """Writes the vector code of a row."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def unpacked(self, data: Any, block: Any) -> Any:
        """Load the 16 codes of a block; bits above the lowest four are not theirs."""
        b = self.b
        place = b.gep(data, [b.mul(block, ir.Constant(_I64, 8))])
        eight = b.load(b.bitcast(place, ir.VectorType(_I8, 8).as_pointer()), align=1)
        wide = b.zext(eight, ir.VectorType(_I32, 8))
        high = b.lshr(wide, ir.Constant(ir.VectorType(_I32, 8), [4] * 8))
        order = [lane // 2 + 8 * (lane % 2) for lane in range(BLOCK_SIZE)]
        return b.shuffle_vector(wide, high, ir.Constant(_WORDS, order))

    def row_of(self, table: Any, scales: Any, block: Any) -> Any:
        b = self.b
        byte = b.zext(b.load(b.gep(scales, [block])), _I64)
        return b.gep(table, [b.mul(byte, ir.Constant(_I64, BLOCK_SIZE))])

    def look_up(self, row: Any, codes: Any) -> Any:
        b = self.b
        if VECTOR_BYTES == 64:
            whole = b.load(b.bitcast(row, _FLOATS.as_pointer()), align=4)
            return b.call(self._declared("llvm.x86.avx512.permvar.sf.512", _FLOATS), [whole, codes])
        nothing = ir.Constant(_FLOATS, ir.Undefined)
        found = nothing
        low = b.and_(codes, _every(15))
        for lane in range(BLOCK_SIZE):
            at = ir.Constant(_I32, lane)
            value = b.load(b.gep(row, [b.extract_element(low, at)]), align=4)
            found = b.insert_element(found, value, at)
        return found

    def order(self, codes: Any) -> Any:
        """Return the place of each code in the order of values."""
        b = self.b
        if VECTOR_BYTES == 64:
            table = ir.Constant(_WORDS, _ORDER)
            return b.call(self._declared("llvm.x86.avx512.permvar.si.512", _WORDS), [table, codes])
        size = b.and_(codes, _every(7))
        negative = b.icmp_unsigned("!=", b.and_(codes, _every(8)), _every(0))
        return b.select(negative, b.sub(_every(0), size), size)

    def _declared(self, name: str, vector: Any) -> Any:
        return _cg.get_or_insert_function(
            self.b.module, ir.FunctionType(vector, [vector, _WORDS]), name
        )

    def unary(self, name: str, value: Any) -> Any:
        kind = ir.FunctionType(value.type, [value.type])
        return self.b.call(_cg.get_or_insert_function(self.b.module, kind, name), [value])

    def larger(self, one: Any, two: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", one, two), one, two)

    def ones(self, mask: Any) -> Any:
        """Turn a mask into 1 where it is set."""
        return self.b.zext(mask, _WORDS)


@_intrinsic
def compare_blocks(
    typing_context: Any,
    codes_a: Any,
    scales_a: Any,
    codes_b: Any,
    scales_b: Any,
    tables: Any,
    first: Any,
    blocks: Any,
    sums: Any,
    counts: Any,
) -> Any:
    """Hold `blocks` blocks from `first` on against each other; return the largest difference.

    `tables` [4, 256, 16] holds the values of a and of b and their half gaps; `sums` and `counts`
    are added to.
    """

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def data(place: int) -> Any:
            return context.make_array(signature.args[place])(
                context, builder, arguments[place]
            ).data

        b, code = builder, _Code(builder)
        table = data(4)
        pitch = 256 * BLOCK_SIZE
        values_a, values_b, gaps_a, gaps_b = (
            b.gep(table, [ir.Constant(_I64, pitch * place)]) for place in range(4)
        )
        zero = ir.Constant(_FLOATS, [0.0] * BLOCK_SIZE)
        sum_places = [_cg.alloca_once_value(b, zero) for _ in range(SUMS)]
        count_places = [_cg.alloca_once_value(b, _every(0)) for _ in range(COUNTS)]
        largest = _cg.alloca_once_value(b, zero)
        with _cg.for_range(b, arguments[6]) as loop:
            block = b.add(arguments[5], loop.index)
            ca, cb = code.unpacked(data(0), block), code.unpacked(data(2), block)
            scales = (data(1), data(3))
            va = code.look_up(code.row_of(values_a, scales[0], block), ca)
            vb = code.look_up(code.row_of(values_b, scales[1], block), cb)
            gap = b.fadd(
                code.look_up(code.row_of(gaps_a, scales[0], block), ca),
                code.look_up(code.row_of(gaps_b, scales[1], block), cb),
            )
            difference = b.fsub(va, vb)
            distance = code.unary(f"llvm.fabs.v{BLOCK_SIZE}f32", difference)
            for place, (one, two) in zip(
                sum_places,
                ((va, va), (vb, vb), (difference, difference)),
                strict=True,
            ):
                b.store(b.fadd(b.load(place), b.fmul(one, two)), place)
            b.store(code.larger(distance, b.load(largest)), largest)
            changed = b.icmp_unsigned("!=", b.and_(b.xor(ca, cb), _every(15)), _every(0))
            steps = b.sub(code.order(ca), code.order(cb))
            negative = b.icmp_signed("<", steps, _every(0))
            steps = b.select(negative, b.sub(_every(0), steps), steps)
            masks = [
                changed,
                b.fcmp_ordered(">", distance, gap),
                *(b.icmp_signed(">=", steps, _every(step)) for step in STEPS),
            ]
            for place, mask in zip(count_places, masks, strict=True):
                b.store(b.add(b.load(place), code.ones(mask)), place)
        for index, place in enumerate(sum_places):
            kind = ir.FunctionType(_F32, [_F32, _FLOATS])
            reduce = _cg.get_or_insert_function(b.module, kind, "llvm.vector.reduce.fadd.v16f32")
            total = b.fpext(b.call(reduce, [ir.Constant(_F32, 0.0), b.load(place)]), _F64)
            target = b.gep(data(7), [ir.Constant(_I64, index)])
            b.store(b.fadd(b.load(target), total), target)
        for index, place in enumerate(count_places):
            kind = ir.FunctionType(_I32, [_WORDS])
            reduce = _cg.get_or_insert_function(b.module, kind, "llvm.vector.reduce.add.v16i32")
            total = b.zext(b.call(reduce, [b.load(place)]), _I64)
            target = b.gep(data(8), [ir.Constant(_I64, index)])
            b.store(b.add(b.load(target), total), target)
        kind = ir.FunctionType(_F32, [_FLOATS])
        reduce = _cg.get_or_insert_function(b.module, kind, "llvm.vector.reduce.fmax.v16f32")
        return b.call(reduce, [b.load(largest)])

    return (
        types.float32(
            codes_a,
            scales_a,
            codes_b,
            scales_b,
            tables,
            types.int64,
            types.int64,
            sums,
            counts,
        ),
        lower,
    )


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
    for row in range(largest.size):
        largest[row] = compare_blocks(
            codes_a,
            scales_a,
            codes_b,
            scales_b,
            tables,
            row * row_blocks,
            row_blocks,
            sums,
            counts,
        )


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
