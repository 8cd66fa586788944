"""alpha * A B^T of two NVFP4 operands.

M rows of A, N rows of B, K contracted, C = K/16.

Contract:
    product       E2M1 * E4M3 scale, exact in each path; summed in float32 in the order of the
                  tensor core; times alpha in float32; rounded to the dtype, nearest even
    native        `tl.dot_scaled` of E2M1 with E4M3 scales: tcgen05.mma kind::mxf4nvf4 on sm_100 and
                  sm_103, mma.sync kind::mxf4nvf4 on sm_120, the repaired interpreter on a CPU
    sixteen bit   elsewhere (Hopper) both operands are decoded to float16, which holds every
                  element exactly (at most 6 significant bits, 2**-10 to 2688), and multiplied there
    padding       of the scales is never multiplied: swizzled here it is zero; a caller's swizzled
                  scales need K to be a multiple of 64, so that they have none along K
    NaN           in a scale makes its row (or column) of the product NaN

A tile is BLOCK_M rows by BLOCK_N columns; programs walk the tiles in a persistent grid. For few
rows of A the operands change places, for a tensor core's tile has 128 rows: those of the weight.
"""

from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from nvfp4check.kernels.arch import INTERPRETER, Architecture, architecture_of, multiprocessors
from nvfp4check.kernels.launch import (
    INPUT_DTYPES,
    ceil_div,
    check_device,
    check_dtype,
    check_scalar,
    check_shape,
    launch,
    power_of_two,
    rows_of,
)
from nvfp4check.kernels.matmul_kernels import (
    _matmul_few_kernel,
    _matmul_pointer_kernel,
    _matmul_tma_kernel,
)
from nvfp4check.kernels.swizzle import swizzle
from nvfp4ref.formats import BLOCK_SIZE, SCALE_TILE_COLUMNS, SCALE_TILE_ROWS

#: Elements along K that one 128x4 tile of scales covers.
SCALE_TILE_K = SCALE_TILE_COLUMNS * BLOCK_SIZE

#: TMA wants rows that begin on 16 bytes: K a multiple of 32.
_TMA_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulConfig:
    """How a product is cut into tiles and pipelined."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    group: int = 8
    #: Give loads, tensor core and epilogue warps of their own.
    specialize: bool = False


#: Many rows, native. Two float32 accumulators of 128 x 128 and the scales fill tensor memory.
TMA_CONFIG = MatmulConfig(block_m=128, block_n=128, block_k=256, stages=4, warps=4)
#: sm_120 has 99 KB of shared memory and keeps the accumulator in registers.
TMA_CONFIG_SM120 = MatmulConfig(block_m=128, block_n=128, block_k=256, stages=2, warps=8)
#: The same as `TMA_CONFIG` with warps of their own for loads, tensor core and epilogue. Not the
#: default: what Triton makes of it compiles, and was not run.
SPECIALIZED_CONFIG = MatmulConfig(
    block_m=128, block_n=128, block_k=256, stages=4, warps=4, specialize=True
)
#: Few rows of A, native: block_n is the most of them in a tile.
FEW_CONFIG = MatmulConfig(block_m=128, block_n=64, block_k=256, stages=4, warps=4)
FEW_CONFIG_SM120 = MatmulConfig(block_m=128, block_n=32, block_k=256, stages=3, warps=4)
#: Decoded to float16.
POINTER_CONFIG = MatmulConfig(block_m=128, block_n=128, block_k=64, stages=3, warps=8)

#: At most this many rows of A count as few.
FEW_ROWS = 64


def scale_descriptor(flat: torch.Tensor, rows: int, k: int, block: tuple[int, int]) -> Any:
    """Return the TMA descriptor of swizzled scales for tiles of (rows, K) elements."""
    tiles = flat.view(
        1, ceil_div(rows, SCALE_TILE_ROWS), ceil_div(k, SCALE_TILE_K), 2, SCALE_TILE_ROWS * 2
    )
    shape = [1, block[0] // SCALE_TILE_ROWS, block[1] // SCALE_TILE_K, 2, SCALE_TILE_ROWS * 2]
    return TensorDescriptor.from_tensor(tiles, shape)


def _check(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[int, int, int]:
    """Return M, N and K of operands whose codes, dtypes and devices fit together."""
    for name, codes, scales in (("a", a_codes, a_scales), ("b", b_codes, b_scales)):
        check_dtype(f"{name}_codes", codes, torch.uint8)
        check_shape(f"{name}_codes", codes, None, a_codes.shape[-1])
        check_dtype(f"{name}_scales", scales, torch.float8_e4m3fn)
    check_scalar("alpha", alpha)
    check_device(
        a_codes=a_codes, a_scales=a_scales, b_codes=b_codes, b_scales=b_scales, alpha=alpha
    )
    if dtype not in INPUT_DTYPES:
        raise ValueError(f"dtype {dtype}: expected float32, bfloat16 or float16")
    K = a_codes.shape[1] * 2
    if K % BLOCK_SIZE:
        raise ValueError(f"a_codes: {K} codes a row, expected a multiple of {BLOCK_SIZE}")
    return a_codes.shape[0], b_codes.shape[0], K


def matmul(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    config: MatmulConfig | None = None,
) -> torch.Tensor:
    """Return alpha * A B^T [M, N] of operands with row-major block scales.

    Scales are swizzled on the way where the hardware wants them so; `matmul_swizzled` takes them
    as they should be kept. `config` names the tiles of the kernel for many rows, also for few.

    Raises:
        ValueError: The shapes, dtypes or devices do not fit together.
    """
    M, N, K = _check(a_codes, a_scales, b_codes, b_scales, alpha, dtype)
    check_shape("a_scales", a_scales, M, K // BLOCK_SIZE)
    check_shape("b_scales", b_scales, N, K // BLOCK_SIZE)
    arch = architecture_of(a_codes)
    if not arch.multiplies_nvfp4 or not (tma_reads(a_codes) and tma_reads(b_codes)):
        return _matmul_pointer(a_codes, a_scales, b_codes, b_scales, alpha, dtype)
    if M <= FEW_ROWS and config is None:
        return _matmul_few(a_codes, a_scales, b_codes, swizzle(b_scales), alpha, dtype)
    return _matmul_tma(a_codes, swizzle(a_scales), b_codes, swizzle(b_scales), alpha, dtype, config)


def matmul_swizzled(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    config: MatmulConfig | None = None,
) -> torch.Tensor:
    """Return alpha * A B^T [M, N] of operands with flat block scales in 128x4 tiles.

    Raises:
        ValueError: The shapes, dtypes or devices do not fit together, K is not a multiple of 64,
            or the device does not multiply NVFP4 natively.
    """
    M, N, K = _check(a_codes, a_scales, b_codes, b_scales, alpha, dtype)
    if K % SCALE_TILE_K:
        raise ValueError(f"K = {K}: swizzled scales have no padding along K in multiples of 64")
    for name, scales, rows in (("a_scales", a_scales, M), ("b_scales", b_scales, N)):
        check_swizzled(name, scales, ceil_div(rows, SCALE_TILE_ROWS) * SCALE_TILE_ROWS * K // 16)
    if not architecture_of(a_codes).multiplies_nvfp4:
        raise ValueError("swizzled scales are for tensor cores that multiply NVFP4: use matmul")
    if not (tma_reads(a_codes) and tma_reads(b_codes)):
        raise ValueError("a_codes and b_codes must begin on 16 bytes and have contiguous rows")
    return _matmul_tma(a_codes, a_scales, b_codes, b_scales, alpha, dtype, config)


def check_swizzled(name: str, scales: torch.Tensor, size: int) -> None:
    """Raise ValueError unless TMA can read flat scales: of the size, contiguous, on 16 bytes."""
    check_shape(name, scales, size)
    if scales.stride(0) != 1 or scales.data_ptr() % _TMA_BYTES:
        raise ValueError(f"{name}: must be contiguous and begin on {_TMA_BYTES} bytes")


def tma_reads(codes: torch.Tensor) -> bool:
    """Whether TMA can read packed codes: rows contiguous, each beginning on 16 bytes."""
    return (
        codes.numel() > 0
        and codes.stride(-1) == 1
        and codes.stride(0) % _TMA_BYTES == 0
        and codes.data_ptr() % _TMA_BYTES == 0
    )


def _matmul_tma(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    dtype: torch.dtype,
    config: MatmulConfig | None = None,
) -> torch.Tensor:
    M, N, K = a_codes.shape[0], b_codes.shape[0], a_codes.shape[1] * 2
    arch = architecture_of(a_codes)
    config = config or default_tma_config(arch)
    out = torch.empty(M, N, dtype=dtype, device=a_codes.device)
    tiles = ceil_div(M, config.block_m) * ceil_div(N, config.block_n)
    programs = min(tiles, multiprocessors(a_codes.device))
    half_k = config.block_k // 2
    launch(
        _matmul_tma_kernel,
        (programs,),
        TensorDescriptor.from_tensor(a_codes, [config.block_m, half_k]),
        scale_descriptor(a_scales, M, K, (config.block_m, config.block_k)),
        TensorDescriptor.from_tensor(b_codes, [config.block_n, half_k]),
        scale_descriptor(b_scales, N, K, (config.block_n, config.block_k)),
        alpha,
        out,
        M,
        N,
        K,
        out.stride(0),
        out.stride(1),
        on=a_codes,
        PROGRAMS=programs,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        STAGES=config.stages,
        SPECIALIZE=config.specialize,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def default_tma_config(arch: Architecture) -> MatmulConfig:
    """Return the tiles of an architecture with native NVFP4."""
    return TMA_CONFIG if arch.tensor_memory_columns or arch is INTERPRETER else TMA_CONFIG_SM120


def few_config(arch: Architecture) -> MatmulConfig:
    """Return the tiles for few rows of an architecture with native NVFP4."""
    return FEW_CONFIG if arch.tensor_memory_columns or arch is INTERPRETER else FEW_CONFIG_SM120


def _matmul_few(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    M, N, K = a_codes.shape[0], b_codes.shape[0], a_codes.shape[1] * 2
    config = few_config(architecture_of(a_codes))
    out = torch.empty(M, N, dtype=dtype, device=a_codes.device)
    linear = rows_of(a_scales).view(torch.uint8)
    block_n = power_of_two(M, least=16, most=config.block_n)
    launch(
        _matmul_few_kernel,
        (ceil_div(N, config.block_m), ceil_div(M, block_n)),
        TensorDescriptor.from_tensor(b_codes, [config.block_m, config.block_k // 2]),
        scale_descriptor(b_scales, N, K, (config.block_m, config.block_k)),
        a_codes,
        linear,
        alpha,
        out,
        N,
        M,
        K,
        a_codes.stride(0),
        linear.stride(0),
        out.stride(1),
        out.stride(0),
        on=a_codes,
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def _matmul_pointer(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    M, N, K = a_codes.shape[0], b_codes.shape[0], a_codes.shape[1] * 2
    config = POINTER_CONFIG
    block_m = power_of_two(M, least=16, most=config.block_m)
    block_n = power_of_two(N, least=16, most=config.block_n)
    a_codes, b_codes = rows_of(a_codes), rows_of(b_codes)
    a_linear, b_linear = (rows_of(scales).view(torch.uint8) for scales in (a_scales, b_scales))
    out = torch.empty(M, N, dtype=dtype, device=a_codes.device)
    launch(
        _matmul_pointer_kernel,
        (ceil_div(M, block_m) * ceil_div(N, block_n),),
        a_codes,
        a_linear,
        b_codes,
        b_linear,
        alpha,
        out,
        M,
        N,
        K,
        a_codes.stride(0),
        a_linear.stride(0),
        b_codes.stride(0),
        b_linear.stride(0),
        out.stride(0),
        out.stride(1),
        on=a_codes,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        STAGES=config.stages,
        num_warps=config.warps if block_m * block_n >= 1 << 13 else 4,
        num_stages=config.stages,
    )
    return out
