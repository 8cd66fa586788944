"""The exact NVFP4 product of few rows, without ever holding the dequantised weight.

M activation rows, N weight rows, K columns, C = K/16.

Contract:
    activations  codes times block scales under `engine`: the bits of
                 `nvfp4ref.nvfp4.quantize` and `nvfp4ref.matmul.operand`, in float64
    product      float64 sum of float64 products of operand elements, in no stated order: exact, and
                 so the same bits in every order, where the certificate of `nvfp4ref.matmul` holds,
                 as for the weights of any real layer it does with 2**10 to spare
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch

from nvfp4ref import e2m1, e4m3
from nvfp4ref.formats import BLOCK_SIZE, E2M1, E4M3

#: Both values of a byte of packed codes.
_PAIRS = np.array(
    [(e2m1.VALUES[byte & 15], e2m1.VALUES[byte >> 4]) for byte in range(256)], dtype=np.float64
)
_E4M3 = np.array(e4m3.VALUES, dtype=np.float64)
_PAIRS_SQUARED = np.square(_PAIRS).astype(np.float32)
_E4M3_SQUARED = np.square(_E4M3).astype(np.float32)

# The formats as numbers that numba can compile in.
_E2M1_MAX, _E4M3_MAX = E2M1.max, E4M3.max
_E4M3_NORMAL, _E4M3_STEP = E4M3.smallest_normal, E4M3.smallest_subnormal
_E4M3_MANTISSA = E4M3.mantissa_bits

#: Fewer multiplications than this are not worth a thread of their own.
_WORK_A_THREAD = 2**21

#: More rows than this are multiplied faster by a matrix product of dequantised weights.
FEW_ROWS = 16


def engine_operand(x: torch.Tensor, input_encode_scale: torch.Tensor) -> torch.Tensor:
    """Return the operand [M, K] in float64 that an engine makes of x under its input scale."""
    encode = np.float32(input_encode_scale.item())
    values = x.to(torch.float32).contiguous()
    out = torch.empty(values.shape, dtype=torch.float64)
    rows, columns = values.shape
    source, target = values.numpy(), out.numpy()
    _over(
        lambda n: _engine_operand(source[n], encode, target[n]),
        rows,
        rows * columns,
    )
    return out


def product_of_few(
    a: torch.Tensor, packed_codes: torch.Tensor, block_scales: torch.Tensor
) -> torch.Tensor:
    """Return a [M, K] times the transposed codes and block scales of N rows, [M, N] in float64."""
    return _of_few(a, packed_codes, block_scales, _PAIRS, _E4M3)


def squares_of_few(
    a: torch.Tensor, packed_codes: torch.Tensor, block_scales: torch.Tensor
) -> torch.Tensor:
    """Return float32 a [M, K] times the squares of the same, [M, N] in float32."""
    return _of_few(a, packed_codes, block_scales, _PAIRS_SQUARED, _E4M3_SQUARED)


def _of_few(
    a: torch.Tensor, packed_codes: torch.Tensor, block_scales: torch.Tensor, pairs: Any, values: Any
) -> torch.Tensor:
    rows = len(packed_codes)
    out = torch.empty(rows, len(a), dtype=a.dtype)
    codes, scales = packed_codes.numpy(), block_scales.view(torch.uint8).numpy()
    left, target = a.contiguous().numpy(), out.numpy()
    _over(
        lambda n: _product(left, codes[n], scales[n], pairs, values, target[n]),
        rows,
        rows * a.shape[1],
    )
    return out.T


def _over(work: Callable[[slice], None], rows: int, size: int) -> None:
    """Call `work` on slices of the rows, in threads where there is enough to do."""
    threads = max(1, min(torch.get_num_threads(), rows, size // _WORK_A_THREAD))
    edges = [rows * part // threads for part in range(threads + 1)]
    slices = [slice(*edges[part : part + 2]) for part in range(threads)]
    if threads == 1:
        work(slices[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, slices))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _engine_operand(x: Any, encode: Any, out: Any) -> None:
    one = np.float32(1)
    sixth = one / np.float32(_E2M1_MAX)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], BLOCK_SIZE):
            amax = np.float32(-1)
            for k in range(start, start + BLOCK_SIZE):
                amax = max(amax, abs(x[row, k]))  # a NaN loses every comparison
            if amax < 0:  # nothing but NaN
                out[row, start : start + BLOCK_SIZE] = np.nan
                continue
            scale = _e4m3(encode * (amax * sixth))
            factor = one / (scale * (one / encode)) if amax > 0 else np.float32(0)
            for k in range(start, start + BLOCK_SIZE):
                out[row, k] = np.float64(_e2m1(x[row, k] * factor)) * np.float64(scale)


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _e4m3(value: Any) -> Any:
    """Round a float32 >= 0 to the nearest E4M3 value, ties to even, at most 448."""
    if value >= _E4M3_MAX:
        return np.float32(_E4M3_MAX)
    if value < _E4M3_NORMAL:
        step = np.float32(_E4M3_STEP)
    else:
        # The exponent of value; both powers are exact, and so are quotient and product.
        _, exponent = math.frexp(value)
        step = np.float32(2.0 ** (exponent - 1 - _E4M3_MANTISSA))
    return np.float32(np.rint(value / step) * step)


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _e2m1(value: Any) -> Any:
    """Round to the nearest E2M1 value, ties to the even code, at most 6; NaN gives 6."""
    size = abs(value)
    if size <= 0.25:
        magnitude = 0.0
    elif size < 0.75:
        magnitude = 0.5
    elif size <= 1.25:
        magnitude = 1.0
    elif size < 1.75:
        magnitude = 1.5
    elif size <= 2.5:
        magnitude = 2.0
    elif size < 3.5:
        magnitude = 3.0
    elif size <= 5.0:
        magnitude = 4.0
    else:
        magnitude = 6.0
    return -magnitude if value < 0 else magnitude


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _product(a: Any, codes: Any, scales: Any, pairs: Any, e4m3_values: Any, out: Any) -> None:
    columns = a.shape[1]
    row = np.empty(columns, dtype=a.dtype)
    for n in range(codes.shape[0]):
        for block in range(scales.shape[1]):
            scale = e4m3_values[scales[n, block]]
            for byte in range(8 * block, 8 * block + 8):
                row[2 * byte] = pairs[codes[n, byte], 0] * scale
                row[2 * byte + 1] = pairs[codes[n, byte], 1] * scale
        for m in range(a.shape[0]):
            total = a.dtype.type(0)
            for k in range(columns):
                total += a[m, k] * row[k]
            out[n, m] = total
