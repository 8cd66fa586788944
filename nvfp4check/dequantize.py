"""NVFP4 and FP8 128 x 128 to float32, bfloat16 or float16 on a CPU, at the speed of memory.

Contract:
    the bits are those of `nvfp4ref.nvfp4.dequantize` and `nvfp4ref.fp8_block.dequantize`: values
    are looked up, never computed, in a table of what every scale byte makes of every code (4,096
    values, which stay in the first-level cache), or every block scale of every E4M3 byte
    a NaN is a NaN, its payload unspecified

Kernels release the GIL and run over slices of rows in `threads` threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from nvfp4ref import e4m3, fp8_block, nvfp4, packing
from nvfp4ref.formats import BLOCK_SIZE, E2M1, FP8_BLOCK

_CODES = 1 << E2M1.bits
_BYTES = 256

#: Slices of at least so many elements are worth a thread.
_LEAST_SLICE = 1 << 20

_WORDS = {2: np.uint16, 4: np.uint32}


def dequantize_nvfp4(
    packed_codes: torch.Tensor,
    block_scales: torch.Tensor,
    global_decode_scale: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    out: torch.Tensor | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """Return the values [M, K] of packed codes [M, K/2] under block scales [M, K/16].

    Args:
        packed_codes: Two codes a byte.
        block_scales: float8_e4m3fn.
        global_decode_scale: Multiplies to decode.
        dtype: float32, bfloat16 or float16.
        out: Takes the values; new memory costs more than the arithmetic.
        threads: Slices of rows at a time.

    Raises:
        ValueError: The shapes do not belong together, or the dtype has neither 2 nor 4 bytes.
    """
    rows, half = packed_codes.shape
    columns = 2 * half
    if columns % BLOCK_SIZE or tuple(block_scales.shape) != (rows, columns // BLOCK_SIZE):
        raise ValueError(
            f"packed codes [{rows}, {half}] take block scales [{rows}, {columns // BLOCK_SIZE}], "
            f"and K a multiple of {BLOCK_SIZE}; found {list(block_scales.shape)}"
        )
    table = _words(_nvfp4_table(global_decode_scale, dtype))  # (256, 16)
    values = _room(out, rows, columns, dtype)
    codes = packed_codes.contiguous().view(torch.uint8).numpy()
    scales = block_scales.contiguous().view(torch.uint8).numpy()
    words = _words(values)

    def slice_(start: int, stop: int) -> None:
        _look_up_codes(codes[start:stop], scales[start:stop], table, words[start:stop])

    _over_rows(slice_, rows, columns, threads)
    return values


def dequantize_fp8_block(
    w: torch.Tensor,
    scale_inv: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    out: torch.Tensor | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """Return the values [N, K] of elements float8_e4m3fn [N, K] under their 128 x 128 scales.

    Args:
        w: The elements.
        scale_inv: float32, one for each block; it multiplies.
        dtype: float32, bfloat16 or float16.
        out: Takes the values; new memory costs more than the arithmetic.
        threads: Slices of rows at a time.

    Raises:
        ValueError: The shapes do not belong together, or the dtype has neither 2 nor 4 bytes.
    """
    rows, columns = w.shape
    if tuple(scale_inv.shape) != fp8_block.scale_shape(rows, columns):
        raise ValueError(
            f"a weight [{rows}, {columns}] takes scale_inv "
            f"{list(fp8_block.scale_shape(rows, columns))}, found {list(scale_inv.shape)}"
        )
    tables = _words(_fp8_tables(scale_inv, dtype))  # (blocks, 256)
    values = _room(out, rows, columns, dtype)
    elements = w.contiguous().view(torch.uint8).numpy()
    words = _words(values)
    block_rows, block_columns = FP8_BLOCK.block_shape

    def slice_(start: int, stop: int) -> None:
        _look_up_bytes(elements, tables, words, start, stop, block_rows, block_columns)

    _over_rows(slice_, rows, columns, threads)
    return values


def _nvfp4_table(global_decode_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what every scale byte makes of every code [256, 16]."""
    codes = packing.pack(torch.arange(_CODES, dtype=torch.uint8)).expand(_BYTES, -1)
    scales = torch.arange(_BYTES, dtype=torch.uint8).view(_BYTES, 1)
    return nvfp4.dequantize(codes, scales.view(torch.float8_e4m3fn), global_decode_scale, dtype)


def _fp8_tables(scale_inv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what the scale of every block makes of every byte [blocks, 256]."""
    elements = e4m3.decode(torch.arange(_BYTES, dtype=torch.uint8))
    return (elements * scale_inv.float().reshape(-1, 1)).to(dtype)


def _room(out: torch.Tensor | None, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    if out is None:
        return torch.empty(rows, columns, dtype=dtype)
    if tuple(out.shape) != (rows, columns) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"out takes {dtype} [{rows}, {columns}], contiguous; "
            f"found {out.dtype} {list(out.shape)}, strides {list(out.stride())}"
        )
    return out


def _words(values: torch.Tensor) -> npt.NDArray[Any]:
    """Return the bits of values as unsigned integers, without a copy."""
    if values.element_size() not in _WORDS:
        raise ValueError(f"values take 2 or 4 bytes here, found {values.dtype}")
    signed = torch.int16 if values.element_size() == 2 else torch.int32
    return values.view(signed).numpy().view(_WORDS[values.element_size()])


def _over_rows(work: Callable[[int, int], None], rows: int, columns: int, threads: int) -> None:
    parts = max(1, min(threads, rows, rows * columns // _LEAST_SLICE))
    edges = [rows * part // parts for part in range(parts + 1)]
    if parts == 1:
        work(0, rows)
        return
    with ThreadPoolExecutor(parts) as pool:
        for done in [pool.submit(work, *edges[part : part + 2]) for part in range(parts)]:
            done.result()


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _look_up_codes(codes: Any, scales: Any, table: Any, out: Any) -> None:
    for row in range(codes.shape[0]):
        for block in range(scales.shape[1]):
            values = table[scales[row, block]]
            for byte in range(8):
                pair = codes[row, 8 * block + byte]
                out[row, 16 * block + 2 * byte] = values[pair & 15]
                out[row, 16 * block + 2 * byte + 1] = values[pair >> 4]


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _look_up_bytes(
    elements: Any, tables: Any, out: Any, start: int, stop: int, block_rows: int, block_columns: int
) -> None:
    columns = elements.shape[1]
    across = (columns + block_columns - 1) // block_columns
    for row in range(start, stop):
        for block in range(across):
            values = tables[(row // block_rows) * across + block]
            last = min(columns, (block + 1) * block_columns)
            for column in range(block * block_columns, last):
                out[row, column] = values[elements[row, column]]
