"""BFloat16 values by way of FP8 128 x 128: what a producer sees that quantises an FP8 conversion.

Contract:
    as `nvfp4ref.fp8_block.quantize` and then `dequantize` to bfloat16, bit for bit, for finite
    values; blocks with a NaN or an infinity are left as they are
    scale    amax of the block / 448, or 1 where the block is zero; a float32, or rounded up to a
             power of two
    element  E4M3(w / scale) * scale, every step rounded to float32, the last one to bfloat16
"""

from typing import Any

import numpy as np

from nvfp4check.checkpoint.audit.kernel import encode_e4m3, jit, round_to
from nvfp4check.checkpoint.audit.vector import bits_of, float_of
from nvfp4ref import e4m3
from nvfp4ref.formats import E4M3, FP8_BLOCK

F = np.float32
U = np.uint32
_HEIGHT, _WIDTH = FP8_BLOCK.block_shape
_VALUES = np.array(e4m3.MAGNITUDES, np.float32)
_MAX = np.float32(E4M3.max)


@jit
def by_way_of_fp8(words: Any, power_of_two: bool, out: Any) -> None:
    """Take rows of bfloat16 (uint16), whole blocks high but for the last, through FP8."""
    rows, columns = words.shape
    for top in range(0, rows, _HEIGHT):
        bottom = min(rows, top + _HEIGHT)
        for left in range(0, columns, _WIDTH):
            right = min(columns, left + _WIDTH)
            amax_bits = U(0)
            for row in range(top, bottom):
                for column in range(left, right):
                    bits = U(U(words[row, column]) << U(16))
                    amax_bits = max(amax_bits, U(bits & U(0x7FFFFFFF)))
            scale = F(float_of(amax_bits) / _MAX)
            if scale == F(0):
                scale = F(1)
            if power_of_two:
                bits = bits_of(scale)
                if bits & U(0x7FFFFF):
                    scale = float_of(U((bits & U(0x7F800000)) + U(0x800000)))
            for row in range(top, bottom):
                for column in range(left, right):
                    word = words[row, column]
                    if amax_bits >= U(0x7F800000):
                        out[row, column] = word
                        continue
                    magnitude = float_of(U(U(word & np.uint16(0x7FFF)) << U(16)))
                    value = _VALUES[encode_e4m3(F(magnitude / scale))]
                    kept = round_to(F(value * scale), 1)
                    sign = U(word) & U(0x8000)
                    out[row, column] = np.uint16((bits_of(kept) >> U(16)) | sign)
