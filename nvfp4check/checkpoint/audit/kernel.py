"""One pass over a quantised weight: every code and scale byte held against the base.

Contract:
    unit       u = block scale * global scale, in float64 and exact; q = |x| / u
    nearest    the stored magnitude is that of E2M1 nearest to q, or one of two whose midpoint lies
               within `numbers.ZONE` of q; the sign is the element's
    off        not nearest, and within u of x: half the widest step of E2M1, what any rounding to a
               neighbour of the widest step may be off, and the zone, relative to x
    beyond     farther than u from x; or saturated under the largest scale byte, 0x7E, though the
               global scale should have held it
    explained  the scale byte is what some convention makes of the block's amax, or a tie away
    searched   not explained, and every code nearest under it: scales found by search are so
    differs    elements and scale bytes that a convention's float32 arithmetic, step by step and
               under the stored block scale, makes otherwise

A glance in vectors (`vector`) settles all but a few of a hundred blocks. Blocks of zeros, with
scale 0, or with a NaN are listed for `edges`; plain ones of zeros are counted by scale byte.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, cast

import numba
import numpy as np

from nvfp4check.checkpoint.audit.numbers import (
    LEAST_SCALES,
    MAGNITUDES,
    MIDPOINTS,
    SCALE_WAYS,
    SCALES,
)
from nvfp4check.checkpoint.audit.vector import bits_of, float_of, look_at_block, ones_of
from nvfp4ref.conventions import IdealScale, ZeroScale
from nvfp4ref.formats import BLOCK_SIZE

F = np.float32
U = np.uint32
W = np.uint64


class Count(IntEnum):
    """Places in the array of counts."""

    #: Blocks whose scale byte is NaN or negative: no number to hold codes against.
    VOID = 0
    UNEXPLAINED = 1
    SEARCHED = 2
    #: Of those: the scale that brings the block's amax to 4, as 4-over-6 chooses.
    OVER_FOUR = 3
    #: Elements that a searched scale saturates.
    CLIPPED = 4
    EXACT_TIES = 5
    NEAR_TIES = 6
    #: Elements within the zone of a midpoint whose code is not the nearest of exact arithmetic.
    OTHER_SIDE = 7
    OFF = 8
    BEYOND = 9
    #: Codes of zero with another sign than their element, which is not zero.
    SIGN_OF_ZERO = 10
    #: Elements -0.0 with code 8, and with code 0.
    MINUS_ZERO_8 = 11
    MINUS_ZERO_0 = 12
    #: Elements of the base that are NaN or infinite.
    NOT_FINITE = 13


COUNTS = len(Count)
_SCALINGS = 4
#: Signs of a block that must differ for it to be another's: of 16 unrelated ones three or fewer
#: differ with a probability of 1 %, and rounding changes none.
_STRANGE = W(4)
_INFINITY_BITS = U(0x7F800000)
_LARGEST = SCALES - 1
_VOID, _UNEXPLAINED, _SEARCHED = int(Count.VOID), int(Count.UNEXPLAINED), int(Count.SEARCHED)
_OVER_FOUR, _CLIPPED = int(Count.OVER_FOUR), int(Count.CLIPPED)
_EXACT, _NEAR, _OTHER = int(Count.EXACT_TIES), int(Count.NEAR_TIES), int(Count.OTHER_SIDE)
_OFF, _BEYOND, _SIGN = int(Count.OFF), int(Count.BEYOND), int(Count.SIGN_OF_ZERO)
_MINUS_8, _MINUS_0 = int(Count.MINUS_ZERO_8), int(Count.MINUS_ZERO_0)
_BY_PRODUCT, _TWICE, _QUOTIENT, _BY_PRODUCT_OF, _PRODUCT = (
    [*IdealScale].index(way)
    for way in (
        IdealScale.DIVIDE_BY_PRODUCT,
        IdealScale.DIVIDE_TWICE,
        IdealScale.MULTIPLY_QUOTIENT,
        IdealScale.MULTIPLY_BY_PRODUCT,
        IdealScale.MULTIPLY_PRODUCT,
    )
)
_ONE_BEFORE = [*ZeroScale].index(ZeroScale.ONE_BEFORE_ROUNDING)
_EIGHTH_AFTER = [*ZeroScale].index(ZeroScale.EIGHTH_AFTER_ROUNDING)
_EIGHTH = 0x20


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use; keep the machine code on disk where there is a place for it."""
    try:
        made = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no writable cache directory
        made = numba.njit(nogil=True, error_model="numpy")(function)
    return cast("Callable[..., Any]", made)


@jit
def encode_e4m3(value: Any) -> Any:
    """Nearest E4M3 byte of a float32 that is not negative, ties to even, at most 448."""
    if value >= F(464):
        return U(0x7E)
    if value < F(0.015625):  # 2**-6: steps of 2**-9 below
        return U(np.rint(value * F(512)))
    bits = bits_of(value)
    rounded = U(bits + U(0x7FFFF) + ((bits >> U(20)) & U(1)))
    return min(U((rounded >> U(20)) - U(120 << 3)), U(0x7E))


@jit
def encode_e2m1(value: Any) -> Any:
    """Magnitude code nearest to a float32 that is not negative, ties to even, at most 7."""
    code = U(0)
    for step in range(7):
        middle = F(MIDPOINTS[step])
        if value > middle or (step % 2 == 1 and value == middle):
            code = U(step + 1)
    return code


@jit
def round_to(value: Any, dtype: int) -> Any:
    """Round a float32 that is not negative to bfloat16 (1) or float16 (2), nearest even."""
    bits = bits_of(value)
    if dtype == 1:
        return float_of(U((bits + U(0x7FFF) + ((bits >> U(16)) & U(1))) & U(0xFFFF0000)))
    if dtype == 2:
        if value < F(2.0**-14):
            return F(np.rint(value * F(2.0**24)) * F(2.0**-24))
        return float_of(U((bits + U(0xFFF) + ((bits >> U(13)) & U(1))) & U(0xFFFFE000)))
    return value


@jit
def scale_byte(way: int, amax: Any, decode: Any, encode: Any, dtype: int) -> Any:
    """Scale byte that one way makes of a block's amax, which is above zero and finite."""
    six = F(6)
    ideal_kind = SCALE_WAYS[way, 0]
    if ideal_kind == _BY_PRODUCT:
        ideal = F(amax / F(six * decode))
    elif ideal_kind == _TWICE:
        ideal = F(F(amax / six) / decode)
    elif ideal_kind == _QUOTIENT:
        ideal = F(encode * round_to(F(amax / six), dtype))
    elif ideal_kind == _BY_PRODUCT_OF:
        ideal = F(amax * F(encode * F(F(1) / six)))
    else:
        ideal = F(encode * F(amax * F(F(1) / six)))
    zero_kind = SCALE_WAYS[way, 1]
    if zero_kind == _ONE_BEFORE and ideal == F(0):
        ideal = F(1)
    byte = encode_e4m3(max(ideal, LEAST_SCALES[way]))
    if zero_kind == _EIGHTH_AFTER and byte == U(0):
        byte = U(_EIGHTH)
    return byte


@jit
def element_code(scaling: int, magnitude: Any, scale: Any, decode: Any, encode: Any) -> Any:
    """Magnitude code that one way of scaling makes of an element under a block scale above zero."""
    one = F(1)
    if scaling == 0:
        scaled = F(magnitude / F(scale * decode))
    elif scaling == 1:
        scaled = F(magnitude / F(scale / encode))
    elif scaling == 2:
        scaled = F(magnitude * F(F(one / decode) / scale))
    else:
        scaled = F(magnitude * F(one / F(scale * F(one / encode))))
    return encode_e2m1(scaled)


@jit
def _judge_scale(
    byte: int, amax_bits: Any, numbers: Any, counts: Any, scale_differs: Any
) -> tuple[bool, bool]:
    """Hold a scale byte against every way; say whether it is explained, and whether it clips."""
    _, _, _, sure, outside, decode_encode, dtype, _ = numbers
    amax = float_of(amax_bits)
    explained = outside[byte, 0] <= amax_bits <= outside[byte, 1]
    is_sure = sure[byte, 0] <= amax_bits <= sure[byte, 1]
    for way in range(SCALE_WAYS.shape[0]):
        if is_sure and SCALE_WAYS[way, 0] != _QUOTIENT:
            continue
        made = scale_byte(way, amax, decode_encode[0], decode_encode[1], dtype)
        if made == U(byte):
            explained = True
        else:
            scale_differs[way] += 1
    clips = amax_bits > outside[byte, 1]
    if byte == _LARGEST:
        explained = True
    if not explained:
        counts[_UNEXPLAINED] += 1
        # amax / 4 instead of amax / 6: bounds are 6 times a midpoint's unit.
        as_if = bits_of(F(amax * F(1.5)))
        if outside[byte, 0] <= as_if <= outside[byte, 1]:
            counts[_OVER_FOUR] += 1
    return explained, clips


@jit
def _judge_near(
    bits: Any, code: Any, byte: int, numbers: Any, counts: Any, code_differs: Any
) -> None:
    """Decide an element at a tie, or a zero, by exact arithmetic and by every convention's."""
    units, _, _, _, _, decode_encode, _, zone = numbers
    magnitude_bits = U(bits & U(0x7FFFFFFF))
    stored = U(code & U(7))
    if magnitude_bits == U(0):
        counts[_MINUS_8 if code == U(8) else _MINUS_0] += 1
        return
    other_sign = (bits >> U(31)) != (code >> U(3))
    if other_sign:
        counts[_SIGN] += 1
    magnitude = float_of(magnitude_bits)
    unit = units[byte]
    scale = F(unit / np.float64(decode_encode[0]))
    for scaling in range(_SCALINGS):
        made = element_code(scaling, magnitude, scale, decode_encode[0], decode_encode[1])
        if made != stored or other_sign:
            code_differs[scaling] += 1
    exact = np.float64(magnitude)
    for step in range(7):
        tie = MIDPOINTS[step] * unit
        if abs(exact - tie) <= 4 * zone * tie:
            if exact == tie:
                counts[_EXACT] += 1
            else:
                counts[_NEAR] += 1
                nearest = step + 1 if exact > tie else step
                if stored != U(nearest):
                    counts[_OTHER] += 1


@jit
def _judge_wrong(
    bits: Any,
    code: Any,
    place: int,
    unit: float,
    zone: float,
    counts: Any,
    places: Any,
    worst: Any,
) -> None:
    """Measure how far an element that is not nearest lies from what its code means."""
    value = np.float64(float_of(bits))
    meant = MAGNITUDES[code & U(7)] * unit
    if code >= U(8):
        meant = -meant
    distance = abs(value - meant) / unit
    worst[0] = max(worst[0], distance)
    kind = 1 if distance > 1 + zone * max(1.0, abs(value) / unit) else 0
    counts[_BEYOND if kind else _OFF] += 1
    if places[kind] < 0:
        places[kind] = place


@jit
def audit_rows(
    source: Any,
    codes: Any,
    scales: Any,
    first_row: int,
    numbers: Any,
    tallies: Any,
    row_signs: Any,
    edge_blocks: Any,
    extreme: bool,
) -> tuple[int, Any]:
    """Audit rows of a weight; return how many edge blocks were listed, and the largest magnitude.

    Args:
        source: The base's elements [rows, K]: bfloat16 as uint16 or float32 as uint32.
        codes: Packed codes [rows, K/2].
        scales: Scale bytes [rows, C].
        first_row: Number of the first of these rows in the weight.
        numbers: Fields of `Numbers`.
        tallies: Counts, scale bytes and codes that differ by way, plain blocks of zeros by scale
            byte, places of the first wrong elements, and the largest distance.
        row_signs: For each row, live elements with another sign than their code, live ones, and
            blocks with `_STRANGE` or more of the first.
        edge_blocks: Room for the numbers of all these blocks.
        extreme: List every block as an edge.
    """
    units, factors, inside, _, outside, _, _, zone = numbers
    counts, scale_differs, code_differs, zero_blocks, places, worst = tallies
    columns = scales.shape[1]
    largest = W(0)
    edges = 0
    for row in range(scales.shape[0]):
        elements, packed = source[row], codes[row]
        signs = W(0)
        live = W(0)
        strange = W(0)
        for block in range(columns):
            at = 8 * block
            word = W(packed[at]) | (W(packed[at + 1]) << W(8))
            word |= (W(packed[at + 2]) << W(16)) | (W(packed[at + 3]) << W(24))
            word |= (W(packed[at + 4]) << W(32)) | (W(packed[at + 5]) << W(40))
            word |= (W(packed[at + 6]) << W(48)) | (W(packed[at + 7]) << W(56))
            byte = int(scales[row, block])
            known = byte if byte < SCALES else 0
            one, two = look_at_block(
                elements, BLOCK_SIZE * block, word, factors[known, 0], factors[known, 1]
            )
            amax_bits = U(one & W(0xFFFFFFFF))
            if byte >= SCALES:
                counts[_VOID] += 1
                continue
            other_signs = ones_of(one >> W(32))
            signs += other_signs
            live += ones_of(two >> W(32))
            strange += W(other_signs >= _STRANGE)
            if byte == 0 or amax_bits == U(0) or amax_bits >= _INFINITY_BITS or extreme:
                if amax_bits < _INFINITY_BITS:
                    largest = max(largest, W(amax_bits))
                if word == W(0) and two >> W(16) == W(0) and amax_bits == U(0):
                    zero_blocks[byte] += 1
                else:
                    edge_blocks[edges] = row * columns + block
                    edges += 1
                continue
            largest = max(largest, W(amax_bits))
            explained, clips = True, False
            if amax_bits < inside[byte, 0] or amax_bits > inside[byte, 1]:
                explained, clips = _judge_scale(byte, amax_bits, numbers, counts, scale_differs)
            masks = two & W(0xFFFFFFFF)
            if masks != W(0):
                for lane in range(BLOCK_SIZE):
                    chosen = masks >> W(lane)
                    if chosen & W(0x10001) == W(0):
                        continue
                    raw = elements[BLOCK_SIZE * block + lane]
                    bits = U(U(raw) << U(16)) if source.itemsize == 2 else U(raw)
                    code = U((word >> W(4 * lane)) & W(15))
                    if chosen & W(1):
                        for scaling in range(_SCALINGS):
                            code_differs[scaling] += 1
                        place = (first_row + row) * columns * BLOCK_SIZE + BLOCK_SIZE * block + lane
                        _judge_wrong(bits, code, place, units[byte], zone, counts, places, worst)
                    else:
                        _judge_near(bits, code, byte, numbers, counts, code_differs)
            if not explained and masks & W(0xFFFF) == W(0):
                counts[_SEARCHED] += 1
            if clips and masks & W(0xFFFF) == W(0):
                limit = outside[byte, 1]
                for lane in range(BLOCK_SIZE):
                    raw = elements[BLOCK_SIZE * block + lane]
                    bits = U(U(raw) << U(16)) if source.itemsize == 2 else U(raw)
                    if U(bits & U(0x7FFFFFFF)) > limit:
                        if byte == _LARGEST:
                            code = U((word >> W(4 * lane)) & W(15))
                            place = (first_row + row) * columns + block
                            place = place * BLOCK_SIZE + lane
                            _clip(bits, place, units[byte], counts, places, worst)
                        else:
                            counts[_CLIPPED] += 1
        row_signs[row, 0] += signs
        row_signs[row, 1] += live
        row_signs[row, 2] += strange
    return edges, largest


@jit
def _clip(bits: Any, place: int, unit: float, counts: Any, places: Any, worst: Any) -> None:
    """Count an element that the largest scale saturates."""
    value = np.float64(float_of(U(bits & U(0x7FFFFFFF))))
    worst[0] = max(worst[0], value / unit - MAGNITUDES[7])
    counts[_BEYOND] += 1
    if places[1] < 0:
        places[1] = place
