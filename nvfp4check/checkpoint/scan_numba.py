"""The counting of `scan_tally`, compiled by numba: the speed of memory instead of a tenth of it.

Where the processor has the instructions, by `nvfp4check.checkpoint.scan_fused`. Elsewhere a piece
of blocks that fits the first-level cache is gone through three times:
    1. each word of 16 codes becomes one number that holds three counts (block, sum of squares,
       sum of codes), by vector table look-ups and byte sums where the processor has them
    2. these numbers are added up by scale byte
    3. the histogram of codes comes from counting bits: four words are turned into their four bit
       planes, and the counts of the planes' 15 products determine the counts of the 16 codes

Contract:
    identical to `count_with_numpy` in every count

Importing this module imports numba; `counter` in `nvfp4check.checkpoint.scan` decides.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.core import config as _config
from numba.extending import intrinsic

from nvfp4check.checkpoint.scan_fused import count_fused
from nvfp4check.checkpoint.scan_packed import (
    BIAS,
    BIASED,
    COUNT_SHIFT,
    FLUSH,
    SUM_SHIFT,
    TABLE_PITCH,
    TABLES,
    flush,
    jit,
)
from nvfp4check.checkpoint.scan_tally import CODE_BYTES, HALVES, Bytes, Tally

#: Blocks in a piece: 16 KiB of codes and of packed numbers.
_PIECE = 2048
#: Blocks that one step of the loops takes; the rest of a weight is padded with zero blocks.
_STEP = 32
_SQUARES = [half * half for half in HALVES] * 2

_U = np.uint64
_numba: Any = _config
_declare: Any = cgutils.get_or_insert_function
_intrinsic: Callable[..., Any] = intrinsic
_M1, _M3, _M5, _M7 = (_U(0x1111111111111111 * n) for n in (1, 3, 5, 7))
_MA, _MC = _U(0xAAAAAAAAAAAAAAAA), _U(0xCCCCCCCCCCCCCCCC)


def _features() -> dict[str, bool]:
    """Name what the processor has that is compiled for, as far as it is allowed or known."""
    if not _numba.ENABLE_AVX:
        return {}
    if _numba.CPU_FEATURES is not None:
        named = _numba.CPU_FEATURES.split(",")
        return {name[1:]: True for name in named if name.startswith("+")}
    if _numba.CPU_NAME:
        return {}  # another processor than this one
    return dict(binding.get_host_cpu_features())


def _vector_bytes() -> int:
    """Bytes of the widest vector with byte look-ups, 0 where none is known or allowed."""
    features = _features()
    return 64 if features.get("avx512bw") else 32 if features.get("avx2") else 0


def _can_fuse() -> bool:
    """Whether this processor has what `scan_fused` needs."""
    features = _features()
    needed = ("avx512vbmi", "avx512vpopcntdq")
    return VECTOR_BYTES == 64 and all(features.get(feature) for feature in needed)


VECTOR_BYTES = _vector_bytes()
_LOOK_UP = {64: "llvm.x86.avx512.pshuf.b.512", 32: "llvm.x86.avx2.pshuf.b"}
_ADD_BYTES = {64: "llvm.x86.avx512.psad.bw.512", 32: "llvm.x86.avx2.psad.bw"}


@_intrinsic
def _ones(typing_context: Any, word: Any) -> Any:
    """Number of bits set in a uint64."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), lower


def _pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any, form: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), form.as_pointer())


@_intrinsic
def _word(typing_context: Any, octets: Any, block: Any) -> Any:
    """Bytes 8 * block to 8 * block + 7, the first one lowest, at any address."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        at = builder.mul(arguments[1], ir.Constant(word, CODE_BYTES))
        place = _pointer(context, builder, signature.args[0], arguments[0], at, word)
        return builder.load(place, align=1)

    return types.uint64(octets, types.int64), lower


@_intrinsic
def _pack_vector(typing_context: Any, codes: Any, first: Any, numbers: Any, seen: Any) -> Any:
    """Pack the numbers of one vector of blocks, and note blocks that are live without a six."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = VECTOR_BYTES // CODE_BYTES
        words = ir.VectorType(ir.IntType(64), lanes)
        octets = ir.VectorType(ir.IntType(8), VECTOR_BYTES)
        look_up = _declare(
            builder.module, ir.FunctionType(octets, [octets, octets]), _LOOK_UP[VECTOR_BYTES]
        )
        add_bytes = _declare(
            builder.module, ir.FunctionType(words, [octets, octets]), _ADD_BYTES[VECTOR_BYTES]
        )

        def every(value: int) -> Any:
            return ir.Constant(words, [value] * lanes)

        def table(entries: list[int], index: Any) -> Any:
            whole = ir.Constant(octets, entries * (VECTOR_BYTES // 16))
            return builder.call(look_up, [whole, index])

        def in_words(value: Any) -> Any:
            return builder.call(add_bytes, [value, ir.Constant(octets, [0] * VECTOR_BYTES)])

        def place(argument: int, at: Any) -> Any:
            return _pointer(
                context, builder, signature.args[argument], arguments[argument], at, words
            )

        block = arguments[1]
        start = builder.mul(block, ir.Constant(block.type, CODE_BYTES))
        codes_here = builder.load(place(0, start), align=1)
        nibbles = every(0x0F0F0F0F0F0F0F0F)
        low = builder.bitcast(builder.and_(codes_here, nibbles), octets)
        shifted = builder.lshr(codes_here, every(4))
        high = builder.bitcast(builder.and_(shifted, nibbles), octets)
        squares = builder.add(in_words(table(_SQUARES, low)), in_words(table(_SQUARES, high)))
        sums = in_words(builder.add(table(BIASED, low), table(BIASED, high)))
        number = builder.or_(squares, builder.shl(sums, every(SUM_SHIFT)))
        number = builder.or_(number, every(1 << COUNT_SHIFT))
        target = builder.and_(block, ir.Constant(block.type, _PIECE - 1))
        builder.store(number, place(2, target), align=8)

        twice = builder.and_(codes_here, builder.lshr(codes_here, every(1)))
        sixes = builder.and_(twice, builder.lshr(codes_here, every(2)))
        sixes = builder.and_(sixes, every(int(_M1)))
        live = builder.and_(codes_here, every(int(_M7)))
        unfilled = builder.and_(
            builder.icmp_unsigned("==", sixes, every(0)),
            builder.icmp_unsigned("!=", live, every(0)),
        )
        # Four places in turn, so that one vector need not wait for the one before.
        slot = builder.and_(block, ir.Constant(block.type, _STEP - 1))
        note = place(3, slot)
        before = builder.load(note, align=8)
        builder.store(builder.select(unfilled, every(1), before), note, align=8)
        return context.get_dummy_value()

    return types.void(codes, types.int64, numbers, seen), lower


@jit
def _pack_vectors(codes: Any, first: int, blocks: int, numbers: Any, seen: Any) -> None:
    lanes = VECTOR_BYTES // CODE_BYTES
    for block in range(first, first + blocks, lanes):
        _pack_vector(codes, block, numbers, seen)


@jit
def _pack_words(codes: Any, first: int, blocks: int, numbers: Any, seen: Any) -> None:
    """The same for any processor, by counting bits: squares and sums are sums of bit products."""
    unfilled = _U(0)
    for i in range(blocks):
        word = _word(codes, first + i)
        b0, b1, b2 = word & _M1, (word >> _U(1)) & _M1, (word >> _U(2)) & _M1
        b01, b02, b12 = b0 & b1, b0 & b2, b1 & b2
        b012 = b01 & b2
        n0, n1, n2 = _ones(b0), _ones(b1), _ones(b2)
        n01, n02, n12, n012 = _ones(b01), _ones(b02), _ones(b12), _ones(b012)
        squares = n0 + _U(4) * (n1 + n01) + _U(16) * n2 + _U(19) * n02
        squares += _U(44) * n12 + _U(56) * n012
        magnitude = n0 + n02 + _U(2) * (n1 + n12 + n012) + _U(4) * n2
        sign = (word >> _U(3)) & _M1
        minus = (sign << _U(4)) - sign
        ones = _ones((b0 | (b02 << _U(1))) & minus)
        twos = _ones((b1 | (b12 << _U(1)) | (b012 << _U(2))) & minus)
        negative = ones + _U(2) * twos + _U(4) * _ones(b2 & sign)
        total = magnitude + _U(16 * BIAS) - _U(2) * negative
        numbers[i] = squares | (total << _U(SUM_SHIFT)) | _U(1 << COUNT_SHIFT)
        unfilled |= _U(b012 == _U(0)) & _U((word & _M7) != _U(0))
    seen[0] |= unfilled


@jit
def _add_by_scale(scales: Any, first: int, blocks: int, numbers: Any, tables: Any) -> None:
    # Eight tables in turn: a scale byte that comes twice in a row does not wait for its own store.
    t0, t1, t2, t3 = tables[0], tables[1], tables[2], tables[3]
    t4, t5, t6, t7 = tables[4], tables[5], tables[6], tables[7]
    last = _U(255)
    for group in range(blocks // 8):
        eight = _word(scales, first // 8 + group)
        i = _U(8 * group)  # unsigned: no index is counted from the end
        t0[eight & last] += numbers[i]
        t1[(eight >> _U(8)) & last] += numbers[i + _U(1)]
        t2[(eight >> _U(16)) & last] += numbers[i + _U(2)]
        t3[(eight >> _U(24)) & last] += numbers[i + _U(3)]
        t4[(eight >> _U(32)) & last] += numbers[i + _U(4)]
        t5[(eight >> _U(40)) & last] += numbers[i + _U(5)]
        t6[(eight >> _U(48)) & last] += numbers[i + _U(6)]
        t7[eight >> _U(56)] += numbers[i + _U(7)]


@jit
def _count_bits(codes: Any, first: int, blocks: int, counts: Any) -> None:
    """Count set bits of the products of bit planes; `counts[s]` is that of the set s of planes."""
    quarter = blocks // 4
    c1 = c2 = c4 = c8 = c3 = c5 = c9 = c6 = c10 = c12 = c7 = c11 = c13 = c14 = c15 = _U(0)
    for i in range(first, first + quarter):
        wa, wb = _word(codes, i), _word(codes, i + quarter)
        wc, wd = _word(codes, i + 2 * quarter), _word(codes, i + 3 * quarter)
        ab_low, ab_high = (wa & _M3) | ((wb & _M3) << _U(2)), ((wa >> _U(2)) & _M3) | (wb & _MC)
        cd_low, cd_high = (wc & _M3) | ((wd & _M3) << _U(2)), ((wc >> _U(2)) & _M3) | (wd & _MC)
        p0 = (ab_low & _M5) | ((cd_low & _M5) << _U(1))
        p1 = ((ab_low >> _U(1)) & _M5) | (cd_low & _MA)
        p2 = (ab_high & _M5) | ((cd_high & _M5) << _U(1))
        p3 = ((ab_high >> _U(1)) & _M5) | (cd_high & _MA)
        p01, p02, p12, p23 = p0 & p1, p0 & p2, p1 & p2, p2 & p3
        c1 += _ones(p0)
        c2 += _ones(p1)
        c4 += _ones(p2)
        c8 += _ones(p3)
        c3 += _ones(p01)
        c5 += _ones(p02)
        c9 += _ones(p0 & p3)
        c6 += _ones(p12)
        c10 += _ones(p1 & p3)
        c12 += _ones(p23)
        c7 += _ones(p01 & p2)
        c11 += _ones(p01 & p3)
        c13 += _ones(p02 & p3)
        c14 += _ones(p12 & p3)
        c15 += _ones(p01 & p23)
    for plane_set, count in enumerate(
        (_U(0), c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15)
    ):
        counts[plane_set] += count


_pack = _pack_vectors if VECTOR_BYTES else _pack_words


@jit
def _count(codes: Any, scales: Any, joint: Any, bits: Any, seen: Any) -> None:
    numbers = np.empty(_PIECE, np.uint64)
    tables = np.zeros((TABLES, TABLE_PITCH), np.uint64)
    for first in range(0, scales.size, _PIECE):
        blocks = min(_PIECE, scales.size - first)
        _pack(codes, first, blocks, numbers, seen)
        _add_by_scale(scales, first, blocks, numbers, tables)
        _count_bits(codes, first, blocks, bits)
        if (first + _PIECE) % FLUSH == 0:
            flush(tables, joint)
    flush(tables, joint)


#: From counts of "at least these planes" to those of "exactly these", by inclusion and exclusion.
_EXACTLY = np.array(
    [
        [(-1) ** (more ^ these).bit_count() if more & these == these else 0 for more in range(16)]
        for these in range(16)
    ]
)
_counts_of_steps = count_fused if _can_fuse() else _count


def count_with_numba(codes: Bytes, scales: Bytes, tally: Tally) -> None:
    """Add blocks to a tally."""
    count_by_steps(_counts_of_steps, codes, scales, tally)


def count_by_steps(counter: Callable[..., Any], codes: Bytes, scales: Bytes, tally: Tally) -> None:
    """Add blocks to a tally by a compiled counter of whole steps."""
    whole = scales.size - scales.size % _STEP
    _count_steps(counter, codes[: CODE_BYTES * whole], scales[:whole], tally)
    rest = scales.size - whole
    if rest:
        padded_codes = np.zeros(CODE_BYTES * _STEP, np.uint8)
        padded_scales = np.zeros(_STEP, np.uint8)
        padded_codes[: CODE_BYTES * rest] = codes[CODE_BYTES * whole :]
        padded_scales[:rest] = scales[whole:]
        _count_steps(counter, padded_codes, padded_scales, tally)
        tally.codes[0] -= 16 * (_STEP - rest)
        tally.joint[0, 0] -= _STEP - rest


def _count_steps(counter: Callable[..., Any], codes: Bytes, scales: Bytes, tally: Tally) -> None:
    bits = np.zeros(16, np.uint64)
    seen = np.zeros(_STEP, np.uint64)
    # One kind of array, read-only, so that only one version is compiled.
    codes, scales = codes.view(), scales.view()
    codes.flags.writeable = scales.flags.writeable = False
    counter(codes, scales, tally.joint, bits, seen)
    counts = bits.view(np.int64)
    counts[0] = 16 * scales.size
    tally.codes += _EXACTLY @ counts
    tally.has_unfilled |= bool(seen.any())
