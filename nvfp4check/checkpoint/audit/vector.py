"""Sixteen elements of a block against their codes, in vectors of whatever width there is.

Contract:
    a            magnitude of an element as float32
    q            a * factor, one float32 rounding; factor is 1 / (block scale * global scale) a
                 little too small, or a little too large (`numbers.ZONE`)
    code of q    nearest of E2M1, halves up, at most 7: the bits of q (of q + 1 below 1, where the
                 steps are even) rounded to one bit of mantissa
    wrong        the stored magnitude lies outside the codes of both q, or its sign is another's
    near         both q have different codes (a tie lies between them), or the element is -0.0, or
                 a code of zero has another sign than its element

The IR is generic LLVM vector code: it compiles for any processor.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from nvfp4ref.formats import BLOCK_SIZE

_intrinsic: Callable[..., Any] = intrinsic
_declare: Any = cgutils.get_or_insert_function

_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_HALF = BLOCK_SIZE // 2
_WORDS = ir.VectorType(_I32, BLOCK_SIZE)
_FLOATS = ir.VectorType(ir.FloatType(), BLOCK_SIZE)
_HALF_WORDS = ir.VectorType(_I32, _HALF)


@_intrinsic
def bits_of(typing_context: Any, value: Any) -> Any:
    """Bits of a float32."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.uint32(types.float32), lower


@_intrinsic
def float_of(typing_context: Any, bits: Any) -> Any:
    """The float32 of some bits."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), lower


@_intrinsic
def ones_of(typing_context: Any, word: Any) -> Any:
    """Number of bits set."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), lower


@_intrinsic
def look_at_block(
    typing_context: Any, source: Any, at: Any, codes: Any, least: Any, most: Any
) -> Any:
    """Look at 16 elements from `source[at]` on: two words of findings.

    The first holds the largest magnitude's bits (0 to 31) and a mask of live elements whose sign is
    not their code's (32 to 47); the second the masks of wrong (0 to 15), near (16 to 31) and live
    (32 to 47) elements, whose code is no zero. `source` holds bfloat16 as uint16 or float32 as
    uint32.
    """
    width = source.dtype.bitwidth

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        kind = ir.VectorType(ir.IntType(width), BLOCK_SIZE)
        place = builder.bitcast(builder.gep(data, [arguments[1]]), kind.as_pointer())
        elements = builder.load(place, align=width // 8)
        if width < 32:
            elements = builder.shl(builder.zext(elements, _WORDS), _every(32 - width))
        findings = _Block(builder, elements, _unpacked(builder, arguments[2])).findings(
            arguments[3], arguments[4]
        )
        return context.make_tuple(builder, signature.return_type, findings)

    pair = types.UniTuple(types.uint64, 2)  # type: ignore[no-untyped-call]
    return pair(source, types.int64, types.uint64, types.float32, types.float32), lower


def _every(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * BLOCK_SIZE)


def _splat(builder: Any, value: Any, kind: Any, lanes: int) -> Any:
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(first, nothing, zeros)


def _unpacked(builder: Any, word: Any) -> Any:
    """Return the 16 codes of a word, the lowest nibble first."""
    halves = []
    for shift in (0, 32):
        half = builder.trunc(builder.lshr(word, ir.Constant(_I64, shift)), _I32)
        shifts = ir.Constant(_HALF_WORDS, [4 * lane for lane in range(_HALF)])
        halves.append(builder.lshr(_splat(builder, half, _HALF_WORDS, _HALF), shifts))
    order = ir.Constant(ir.VectorType(_I32, BLOCK_SIZE), [*range(BLOCK_SIZE)])
    return builder.and_(builder.shuffle_vector(*halves, order), _every(15))


class _Block:
    """The vector code for one block."""

    def __init__(self, builder: Any, bits: Any, codes: Any) -> None:
        self.builder = builder
        self.bits = bits
        self.magnitude_bits = builder.and_(bits, _every(0x7FFFFFFF))
        self.magnitude_codes = builder.and_(codes, _every(7))
        self.code_signs = builder.lshr(codes, _every(3))

    def findings(self, least: Any, most: Any) -> list[Any]:
        b, zero = self.builder, _every(0)
        low, high = self._codes(least), self._codes(most)
        other_sign = b.icmp_unsigned("!=", b.lshr(self.bits, _every(31)), self.code_signs)
        live = b.icmp_unsigned("!=", self.magnitude_codes, zero)
        below = b.icmp_unsigned("<", self.magnitude_codes, low)
        above = b.icmp_unsigned(">", self.magnitude_codes, high)
        wrong = b.or_(b.or_(below, above), b.and_(other_sign, live))
        near = b.or_(
            b.icmp_unsigned("!=", low, high), b.icmp_unsigned("==", self.bits, _every(0x80000000))
        )
        near = b.or_(near, b.and_(other_sign, b.not_(live)))
        largest = _declare(
            b.module, ir.FunctionType(_I32, [_WORDS]), "llvm.vector.reduce.umax.v16i32"
        )
        amax = b.zext(b.call(largest, [self.magnitude_bits]), _I64)
        first = b.or_(amax, self._mask(b.and_(other_sign, live), 32))
        second = b.or_(self._mask(wrong, 0), self._mask(near, 16))
        return [first, b.or_(second, self._mask(live, 32))]

    def _codes(self, factor: Any) -> Any:
        b = self.builder
        one, nothing = (ir.Constant(_FLOATS, [value] * BLOCK_SIZE) for value in (1.0, 0.0))
        factors = _splat(b, factor, _FLOATS, BLOCK_SIZE)
        scaled = b.fmul(b.bitcast(self.magnitude_bits, _FLOATS), factors)
        small = b.fcmp_ordered("<", scaled, one)
        scaled = b.fadd(scaled, b.select(small, one, nothing))
        rounded = b.lshr(b.add(b.bitcast(scaled, _WORDS), _every(1 << 21)), _every(22))
        # 1.0 is code 2 of a value, and code 0 of a value with 1 added to it.
        code = b.sub(rounded, b.select(small, _every(254), _every(252)))
        return b.select(b.icmp_unsigned("<", code, _every(7)), code, _every(7))

    def _mask(self, lanes: Any, shift: int) -> Any:
        b = self.builder
        return b.shl(b.zext(b.bitcast(lanes, _I16), _I64), ir.Constant(_I64, shift))
