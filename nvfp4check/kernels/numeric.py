"""The arithmetic of the formats inside kernels: E2M1, E4M3 and the block scales.

Contract:
    encode_e2m1   float32 to a code 0..15 in an int32: nearest, ties to even, saturates at 6, keeps
                  the sign of zero; NaN gives 7. `encode_e2m1_pairs` packs two to a byte, by
                  `cvt.rn.satfinite.e2m1x2.f32` where NATIVE, which is bit for bit the same
    decode_e2m1   a code in the low four bits of an int32 to float32, exact. `decode_e2m1_pairs`
                  takes both of a byte, by `cvt.rn.f16x2.e2m1x2` where NATIVE
    encode_e4m3   float32 to a byte in an int32: nearest, ties to even, saturates at 448; NaN of
                  either sign gives 0x7F
    decode_e4m3   a byte in an int32 to float32, exact; 0x7F and 0xFF give NaN
    scale_block   a block's scale from its largest magnitude, and what its elements are multiplied
                  or divided by, under a named convention; IEEE divisions where engines use
                  rcp.approx.ftz.f32

Integer arithmetic on the bits and float32 additions that round where the format does; no cast of
Triton to or from a small float is used, so that what the interpreter runs is what the GPU runs.
"""

import triton
import triton.language as tl

from nvfp4ref.formats import E2M1, E4M3

_E2M1_MAX: tl.constexpr = tl.constexpr(E2M1.max)
_E4M3_MAX: tl.constexpr = tl.constexpr(E4M3.max)
_E4M3_NAN: tl.constexpr = tl.constexpr(E4M3.nan_codes[0])
_E4M3_LEAST: tl.constexpr = tl.constexpr(E4M3.smallest_subnormal)
_E4M3_LEAST_NORMAL: tl.constexpr = tl.constexpr(E4M3.smallest_normal)

#: The conventions of `scale_block`.
CONVENTIONS = ("engine", "engine-vllm", "modelopt")


@triton.jit
def encode_e2m1(values):
    """Return the code nearest to each float32."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(values), _E2M1_MAX)  # NaN becomes 6 here
    steps = magnitude.to(tl.int32, bitcast=True)
    # From 1 on: keep one mantissa bit, the exponent rebiased from 127 to 1.
    normal = ((steps + 0x1FFFFF + ((steps >> 22) & 1)) >> 22) - 252
    # Below 1: an addition to 2**22, where float32 has steps of 0.5, rounds to multiples of it.
    small = (magnitude + 4194304.0).to(tl.int32, bitcast=True) & 7
    code = tl.where(magnitude < 1.0, small, normal)
    sign = (bits >> 28) & 8
    return tl.where(values == values, code | sign, 7)


@triton.jit
def encode_e2m1_pairs(even, odd, NATIVE: tl.constexpr):
    """Return one byte for two neighbours, the even one in the low nibble."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b8 byte0, byte1, byte2, byte3;
            cvt.rn.satfinite.e2m1x2.f32 byte0, $5, $1;
            cvt.rn.satfinite.e2m1x2.f32 byte1, $6, $2;
            cvt.rn.satfinite.e2m1x2.f32 byte2, $7, $3;
            cvt.rn.satfinite.e2m1x2.f32 byte3, $8, $4;
            mov.b32 $0, {byte0, byte1, byte2, byte3};
            }
            """,
            "=r,r,r,r,r,r,r,r,r",
            [even, odd],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    return (encode_e2m1(even) | (encode_e2m1(odd) << 4)).to(tl.uint8)


@triton.jit
def decode_e2m1(codes):
    """Return the float32 value of the low four bits of each int32."""
    # The three magnitude bits as exponent and mantissa of a float32, rebiased by a product.
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126


@triton.jit
def decode_e2m1_pairs(packed, NATIVE: tl.constexpr):
    """Return the float32 values of the low and of the high nibble of each byte."""
    if NATIVE:
        halves = tl.inline_asm_elementwise(
            """
            {
            .reg .b8 byte0, byte1, byte2, byte3;
            mov.b32 {byte0, byte1, byte2, byte3}, $4;
            cvt.rn.f16x2.e2m1x2 $0, byte0;
            cvt.rn.f16x2.e2m1x2 $1, byte1;
            cvt.rn.f16x2.e2m1x2 $2, byte2;
            cvt.rn.f16x2.e2m1x2 $3, byte3;
            }
            """,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
        even = (halves & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        odd = (halves >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return even.to(tl.float32), odd.to(tl.float32)
    codes = packed.to(tl.int32)
    return decode_e2m1(codes), decode_e2m1(codes >> 4)


@triton.jit
def encode_e4m3(values):
    """Return the byte nearest to each float32, as an int32."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(values), _E4M3_MAX)
    steps = magnitude.to(tl.int32, bitcast=True)
    normal = ((steps + 0x7FFFF + ((steps >> 20) & 1)) >> 20) - 960
    # Below 2**-6: an addition to 2**14, where float32 has steps of 2**-9.
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 15
    byte = tl.where(magnitude < _E4M3_LEAST_NORMAL, small, normal)
    sign = (bits >> 24) & 0x80
    return tl.where(values == values, byte | sign, _E4M3_NAN)


@triton.jit
def decode_e4m3(codes):
    """Return the float32 value of each byte in an int32."""
    bits = ((codes & 0x7F) << 20) | ((codes & 0x80) << 24)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    return tl.where((codes & 0x7F) == _E4M3_NAN, float("nan"), value)


@triton.jit
def largest_magnitude(values, POISON: tl.constexpr, NATIVE: tl.constexpr):
    """Return the largest magnitude along the last axis; a NaN is left out, or wins if POISON.

    Where all are NaN the result is NaN.
    """
    if POISON:
        # As integers the bits of magnitudes are ordered as the magnitudes are, NaN above infinity.
        bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return tl.max(bits, axis=-1).to(tl.float32, bitcast=True)
    if NATIVE:
        return tl.max(tl.abs(values), axis=-1)  # max.f32 leaves every NaN out
    # numpy's maximum, which the interpreter takes, lets a signalling NaN through.
    largest = tl.max(tl.where(values == values, tl.abs(values), -1.0), axis=-1)
    return tl.where(largest < 0.0, float("nan"), largest)


@triton.jit
def scale_block(amax, decode, CONVENTION: tl.constexpr):
    """Return the E4M3 byte of each block, as int32, and its elements' factor (or divisor)."""
    one = tl.full(amax.shape, 1.0, tl.float32)
    if CONVENTION == "modelopt":
        ideal = tl.div_rn(amax, one * (decode * _E2M1_MAX))
        ideal = tl.where(ideal == 0.0, 1.0, ideal)
        ideal = tl.where(ideal < _E4M3_LEAST, _E4M3_LEAST, ideal)
        byte = encode_e4m3(ideal)
        return byte, decode_e4m3(byte) * decode
    encode = tl.div_rn(one, one * decode)
    byte = encode_e4m3(encode * (amax * 0.16666667163372040))
    scale = decode_e4m3(byte)
    factor = tl.div_rn(one, scale * tl.div_rn(one, encode))
    if CONVENTION == "engine-vllm":
        factor = tl.where(scale == 0.0, 0.0, factor)
    else:
        factor = tl.where(amax == 0.0, 0.0, factor)
    return byte, factor


@triton.jit
def quantize_tile(
    values,
    decode,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CONVENTION: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Return packed codes [BLOCK_M, BLOCK_K/2] and scale bytes [BLOCK_M, BLOCK_K/16] of a tile."""
    blocks = tl.reshape(values, (BLOCK_M, BLOCK_K // 16, 16))
    amax = largest_magnitude(blocks, CONVENTION == "modelopt", NATIVE)
    byte, factor = scale_block(amax, decode, CONVENTION)
    if CONVENTION == "modelopt":
        scaled = tl.div_rn(blocks, tl.broadcast_to(factor[:, :, None], blocks.shape))
        scaled = tl.where(scaled == 0.0, 0.0, scaled)  # drops the sign of a zero
    else:
        scaled = blocks * factor[:, :, None]
    pairs = tl.reshape(scaled, (BLOCK_M, BLOCK_K // 2, 2))
    even, odd = tl.split(pairs)
    return encode_e2m1_pairs(even, odd, NATIVE), byte
