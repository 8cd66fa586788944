"""Stored weights to values, at the speed of memory on a CPU.

N rows, K columns.

Contract:
    nvfp4      value = code * (block scale * global decode scale), both products rounded to float32
    fp8 block  value = element * scale of its tile of 128 x 128, rounded to float32
    dtype      float32; float64, which holds it; bfloat16, rounded once more to nearest even
    NaN        a scale or element NaN gives NaN; its payload is free

Bit-exact with `nvfp4ref.nvfp4.dequantize` and `nvfp4ref.fp8_block.dequantize`, NaN payloads aside.
With a global scale of 1 the NVFP4 values are those that the exact product multiplies.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import numpy.typing as npt
import torch

from nvfp4ref import e2m1, e4m3
from nvfp4ref.formats import BLOCK_SIZE, FP8_BLOCK
from nvfp4ref.fp8_block import scale_shape

Bytes = npt.NDArray[np.uint8]

#: Both values of a byte of packed codes.
_PAIRS = np.array(
    [(e2m1.VALUES[byte & 15], e2m1.VALUES[byte >> 4]) for byte in range(256)], dtype=np.float32
)
_E4M3 = np.array(e4m3.VALUES, dtype=np.float32)

#: Fewer values than this are not worth a thread of their own.
_VALUES_A_THREAD = 2**20

#: numpy's dtype for each torch dtype written; bfloat16 is written as its bits.
_DTYPES: dict[torch.dtype, type[np.generic]] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.uint16,
}


def nvfp4(
    packed_codes: Bytes,
    block_scales: Bytes,
    global_decode_scale: float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the values [N, K] of packed codes [N, K/2] under block scales [N, K/16], as bytes.

    Raises:
        ValueError: The scales do not belong to the codes, or the dtype is none of the three.
    """
    rows, columns = packed_codes.shape[0], 2 * packed_codes.shape[1]
    if block_scales.shape != (rows, columns // BLOCK_SIZE) or columns % BLOCK_SIZE:
        raise ValueError(
            f"packed codes {packed_codes.shape} take block scales "
            f"{(rows, columns // BLOCK_SIZE)}, found {block_scales.shape}"
        )
    scale = np.float32(global_decode_scale)
    out = np.empty((rows, columns), dtype=_dtype(dtype))
    kernel = _nvfp4_to_bfloat16 if dtype == torch.bfloat16 else _nvfp4_to_float
    _in_threads(
        lambda n: kernel(packed_codes[n], block_scales[n], scale, _PAIRS, _E4M3, out[n]),
        rows,
        columns,
    )
    return _tensor(out, dtype)


def fp8_block(
    elements: Bytes, scale_inv: npt.NDArray[np.float32], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the values [N, K] of E4M3 elements [N, K], as bytes, under the scales of their tiles.

    Raises:
        ValueError: The scales are not one a tile, or the dtype is none of the three.
    """
    rows, columns = elements.shape
    if scale_inv.shape != scale_shape(rows, columns):
        raise ValueError(
            f"elements {elements.shape} take scale_inv {scale_shape(rows, columns)}, "
            f"found {scale_inv.shape}"
        )
    out = np.empty((rows, columns), dtype=_dtype(dtype))
    kernel = _fp8_to_bfloat16 if dtype == torch.bfloat16 else _fp8_to_float
    height, width = FP8_BLOCK.block_shape
    _in_threads(
        lambda n: kernel(elements[n], scale_inv[n.start // height :], height, width, _E4M3, out[n]),
        rows,
        columns,
    )
    return _tensor(out, dtype)


def _in_threads(work: Callable[[slice], None], rows: int, columns: int) -> None:
    """Call `work` on slices of the rows that together are all, on several threads if many."""
    threads = min(torch.get_num_threads(), rows * columns // _VALUES_A_THREAD)
    if threads <= 1:
        return work(slice(0, rows))
    height = FP8_BLOCK.block_shape[0]  # a slice begins at the border of a tile
    step = -(-rows // (threads * height)) * height
    slices = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    with ThreadPoolExecutor(len(slices)) as pool:
        list(pool.map(work, slices))
    return None


def _dtype(dtype: torch.dtype) -> type[np.generic]:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype}; choose one of {', '.join(map(str, _DTYPES))}")
    return _DTYPES[dtype]


def _tensor(out: npt.NDArray[np.generic], dtype: torch.dtype) -> torch.Tensor:
    values = torch.from_numpy(out)
    return values.view(torch.bfloat16) if dtype == torch.bfloat16 else values


@numba.njit(cache=True, nogil=True, inline="always")
def _nvfp4_row(codes, scales, global_scale, pairs, e4m3_values, out):  # type: ignore[no-untyped-def]
    for block in range(scales.shape[0]):
        scale = np.float32(e4m3_values[scales[block]] * global_scale)
        for byte in range(8 * block, 8 * block + 8):
            out[2 * byte] = pairs[codes[byte], 0] * scale
            out[2 * byte + 1] = pairs[codes[byte], 1] * scale


@numba.njit(cache=True, nogil=True, inline="always")
def _fp8_row(elements, scales, width, e4m3_values, out):  # type: ignore[no-untyped-def]
    for tile in range(scales.shape[0]):
        scale = scales[tile]
        for k in range(tile * width, min((tile + 1) * width, elements.shape[0])):
            out[k] = e4m3_values[elements[k]] * scale


@numba.njit(cache=True, nogil=True, inline="always")
def _to_bfloat16(bits, out):  # type: ignore[no-untyped-def]
    """Round float32 bits to nearest, ties to even; NaN stays NaN."""
    for k in range(bits.shape[0]):
        u = bits[k]
        odd = (u >> np.uint32(16)) & np.uint32(1)
        rounded = (u + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        is_nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[k] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)


@numba.njit(cache=True, nogil=True)
def _nvfp4_to_float(codes, scales, global_scale, pairs, e4m3_values, out):  # type: ignore[no-untyped-def]
    for n in range(codes.shape[0]):
        _nvfp4_row(codes[n], scales[n], global_scale, pairs, e4m3_values, out[n])


@numba.njit(cache=True, nogil=True)
def _nvfp4_to_bfloat16(codes, scales, global_scale, pairs, e4m3_values, out):  # type: ignore[no-untyped-def]
    for n in range(codes.shape[0]):
        row = np.empty(out.shape[1], dtype=np.float32)
        _nvfp4_row(codes[n], scales[n], global_scale, pairs, e4m3_values, row)
        _to_bfloat16(row.view(np.uint32), out[n])


@numba.njit(cache=True, nogil=True)
def _fp8_to_float(elements, scales, height, width, e4m3_values, out):  # type: ignore[no-untyped-def]
    for n in range(elements.shape[0]):
        _fp8_row(elements[n], scales[n // height], width, e4m3_values, out[n])


@numba.njit(cache=True, nogil=True)
def _fp8_to_bfloat16(elements, scales, height, width, e4m3_values, out):  # type: ignore[no-untyped-def]
    for n in range(elements.shape[0]):
        row = np.empty(out.shape[1], dtype=np.float32)
        _fp8_row(elements[n], scales[n // height], width, e4m3_values, row)
        _to_bfloat16(row.view(np.uint32), out[n])
