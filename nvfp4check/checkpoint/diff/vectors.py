"""Vectors of 64 bytes in LLVM's words, for whatever processor there is.

Contract:
    look up    a byte of the table of sixteen that lies in its own lane, by an index of 0 to 15
    sum        of the eight bytes of each 64-bit word, unsigned
    products   of unsigned bytes up to 12 and signed ones of -12 to 12, summed by 64-bit words

All are exact. Where the processor has AVX-512 or AVX2 each is an instruction or two; elsewhere a
byte is looked up at a time, and sums are made of shifts and a multiplication.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types

from nvfp4check.checkpoint.scan_numba import VECTOR_BYTES

_cg: Any = cgutils

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F64 = ir.DoubleType()

#: Blocks whose codes fill a vector.
GROUP = 8
BYTES = ir.VectorType(I8, 64)
WORDS = ir.VectorType(I64, GROUP)
DOUBLES = ir.VectorType(F64, GROUP)
#: One byte for each block of a group.
OCTETS = ir.VectorType(I8, GROUP)
#: Bytes of a table, and of a lane: the codes of one block, a byte each.
TABLE = 16
LANE = ir.VectorType(I8, TABLE)

_SHORTS = ir.VectorType(I16, 32)
_LOOK_UP = {
    64: "llvm.x86.avx512.pshuf.b.512",
    32: "llvm.x86.avx2.pshuf.b",
    16: "llvm.x86.ssse3.pshuf.b.128",
}
_SUM = {64: "llvm.x86.avx512.psad.bw.512", 32: "llvm.x86.avx2.psad.bw"}
_MULTIPLY = {64: "llvm.x86.avx512.pmaddubs.w.512", 32: "llvm.x86.avx2.pmadd.ub.sw"}
_ADD_PAIRS = {64: "llvm.x86.avx512.pmaddw.d.512", 32: "llvm.x86.avx2.pmadd.wd"}
#: A factor that adds up the shorts of a word in its uppermost, and a mask of bytes.
_FIELDS, _EVERY_OTHER = 0x0001000100010001, 0x00FF00FF00FF00FF
#: The most that two products can be.
_BIAS = 2 * 12 * 12


class Vectors:
    """Writes vector code with a builder."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def declared(self, name: str, kind: Any, *arguments: Any) -> Any:
        """Name an intrinsic function of LLVM."""
        form = ir.FunctionType(kind, arguments)
        return _cg.get_or_insert_function(self.b.module, form, name)

    def at(self, pointer: Any, place: Any) -> Any:
        """Go on from a pointer."""
        return self.b.gep(pointer, [number(place)])

    def load(self, place: Any, kind: Any) -> Any:
        """Load from any address."""
        return self.b.load(self.b.bitcast(place, kind.as_pointer()), align=1)

    def store(self, vector: Any, place: Any) -> None:
        """Store to any address."""
        self.b.store(vector, self.b.bitcast(place, vector.type.as_pointer()), align=1)

    def room(self, kind: Any) -> Any:
        """Make a vector that is counted in, of zeros."""
        return _cg.alloca_once_value(self.b, ir.Constant(kind, None))

    def add(self, place: Any, more: Any) -> None:
        """Add to what is held at a place."""
        self.b.store(self.b.add(self.b.load(place), more), place)

    def raise_to(self, place: Any, other: Any) -> None:
        """Keep the larger of what is held and another, unsigned."""
        held = self.b.load(place)
        self.b.store(self.b.select(self.b.icmp_unsigned(">", other, held), other, held), place)

    def any(self, mask: Any) -> Any:
        """Whether a mask chooses anything."""
        bits = self.b.bitcast(mask, ir.IntType(mask.type.count))
        return self.b.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    def chosen(self, mask: Any) -> Any:
        """How many elements a mask chooses, as int64."""
        count = self.b.ctpop(self.b.bitcast(mask, ir.IntType(mask.type.count)))
        return count if count.type == I64 else self.b.zext(count, I64)

    def total(self, words: Any) -> Any:
        """Sum all elements of a vector of words."""
        name = f"llvm.vector.reduce.add.v{words.type.count}i64"
        return self.b.call(self.declared(name, I64, words.type), [words])

    def part(self, vector: Any, places: Sequence[int]) -> Any:
        """Choose elements of a vector."""
        return self.b.shuffle_vector(vector, vector, order(places))

    def joined(self, parts: Sequence[Any]) -> Any:
        """Put vectors one after another, two and two."""
        while len(parts) > 1:
            parts = [
                self.b.shuffle_vector(one, two, order(range(2 * one.type.count)))
                for one, two in zip(parts[::2], parts[1::2], strict=True)
            ]
        return parts[0]

    def repeated(self, lane: Any) -> Any:
        """Fill a vector with four times the same lane."""
        return self.part(lane, [*range(TABLE)] * (BYTES.count // TABLE))

    def splat(self, scalar: Any, kind: Any) -> Any:
        """Fill a vector with one number."""
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.part(first, [0] * kind.count)

    def _call(self, names: dict[int, str], kind: Any, arguments: list[Any]) -> Any:
        """Call an instruction for whole vectors, or for half ones; `kind` is that of elements."""

        def call(sides: list[Any]) -> Any:
            result = ir.VectorType(kind, 8 * VECTOR_BYTES // kind.width)
            function = self.declared(names[VECTOR_BYTES], result, *(side.type for side in sides))
            return self.b.call(function, sides)

        if VECTOR_BYTES == 64:
            return call(arguments)
        made = []
        for half in (0, 1):
            sizes = [vector.type.count // 2 for vector in arguments]
            pieces = [range(half * size, (half + 1) * size) for size in sizes]
            made.append(call([*map(self.part, arguments, pieces)]))
        return self.joined(made)

    def look_up(self, table: Any, index: Any) -> Any:
        """Look bytes up: 64 in four tables that lie in a vector, or 16 in one."""
        b = self.b
        if VECTOR_BYTES and index.type == LANE:
            function = self.declared(_LOOK_UP[TABLE], LANE, LANE, LANE)
            return b.call(function, [table, index])
        if VECTOR_BYTES:
            return self._call(_LOOK_UP, I8, [table, index])
        held = _cg.alloca_once(b, table.type)
        b.store(table, held)
        data = b.bitcast(held, I8.as_pointer())
        found = ir.Constant(index.type, ir.Undefined)
        for lane in range(index.type.count):
            place = b.zext(b.extract_element(index, ir.Constant(I32, lane)), I64)
            byte = b.load(self.at(self.at(data, lane // TABLE * TABLE), place))
            found = b.insert_element(found, byte, ir.Constant(I32, lane))
        return found

    def in_table(self, entries: Sequence[int], index: Any) -> Any:
        """Look bytes up in one table that is known."""
        table = [entry & 0xFF for entry in entries] * (index.type.count // TABLE)
        return self.look_up(ir.Constant(index.type, table), index)

    def sum(self, vector: Any) -> Any:
        """Sum the bytes of each word."""
        b = self.b
        if VECTOR_BYTES:
            return self._call(_SUM, I64, [vector, every(BYTES, 0)])
        words, mask = b.bitcast(vector, WORDS), every(WORDS, _EVERY_OTHER)
        pairs = b.add(b.and_(words, mask), b.and_(b.lshr(words, every(WORDS, 8)), mask))
        return b.lshr(b.mul(pairs, every(WORDS, _FIELDS)), every(WORDS, 48))

    def products(self, pairs: Sequence[tuple[Any, Any]]) -> Any:
        """Sum by words the products of two pairs of vectors, an unsigned and a signed one each."""
        b = self.b
        if not VECTOR_BYTES:
            return self._products_by_fields(pairs)
        made = [self._call(_MULTIPLY, I16, [*pair]) for pair in pairs]
        halves = self._call(_ADD_PAIRS, I32, [b.add(*made), every(_SHORTS, 1)])
        words, half = b.bitcast(halves, WORDS), every(WORDS, 32)
        return b.add(b.ashr(b.shl(words, half), half), b.ashr(words, half))

    def _products_by_fields(self, pairs: Sequence[tuple[Any, Any]]) -> Any:
        b = self.b
        wide, words = ir.VectorType(I16, 64), ir.VectorType(I64, 16)
        made = [b.mul(b.zext(one, wide), b.sext(two, wide)) for one, two in pairs]
        positive = b.bitcast(b.add(b.add(*made), every(wide, _BIAS)), words)
        fields = b.lshr(b.mul(positive, every(words, _FIELDS)), every(words, 48))
        even, odd = (self.part(fields, range(start, 16, 2)) for start in (0, 1))
        return b.sub(b.add(even, odd), every(WORDS, 8 * _BIAS))

    def lanes(self, low: Any, high: Any) -> tuple[Any, Any]:
        """Bring the codes of every block into a lane: blocks 0 2 4 6, and 1 3 5 7."""
        b = self.b
        low, high = b.bitcast(low, WORDS), b.bitcast(high, WORDS)
        made = []
        for first in (0, 1):
            places = [place for lane in range(first, GROUP, 2) for place in (lane, lane + GROUP)]
            made.append(b.bitcast(b.shuffle_vector(low, high, order(places)), BYTES))
        return made[0], made[1]


def number(value: Any) -> Any:
    """Give an int64, if it is not one already."""
    return ir.Constant(I64, value) if isinstance(value, int) else value


def every(kind: Any, value: float) -> Any:
    """Give a vector of one number."""
    return ir.Constant(kind, [value] * kind.count)


def order(places: Sequence[int]) -> Any:
    """Give the places of elements, for a shuffle."""
    return ir.Constant(ir.VectorType(I32, len(places)), [*places])


def pointers(context: Any, builder: Any, signature: Any, arguments: Any) -> list[Any]:
    """Give the first elements of all arguments that are arrays, None for the others."""
    return [
        context.make_array(kind)(context, builder, value).data
        if isinstance(kind, types.Array)
        else None
        for kind, value in zip(signature.args, arguments, strict=True)
    ]
