"""Rows of group e times expert e, both in NVFP4: the product of a mixture of experts.

M rows sorted by expert, N output features, K contracted, E experts, C = K/16.

Contract:
    arithmetic  of each group as `nvfp4check.kernels.matmul`
    groups      expert_offsets [E+1] says where each begins; they are read on the GPU, never waited
                for by the CPU, and groups may be empty
    native      the weight's 128 rows are the tensor core's rows, streamed by TMA with swizzled
                scales; the tokens are its columns, BLOCK_T of them, so that a group of few rows
                wastes little. Elsewhere both are decoded to float16
    neighbours  a tile reads rows of its own group only

A persistent grid walks the tiles that the offsets make; their number is at most
ceil(M / BLOCK_T) + E for each 128 features.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nvfp4check.kernels.arch import architecture_of, multiprocessors
from nvfp4check.kernels.launch import (
    INPUT_DTYPES,
    ceil_div,
    check_device,
    check_dtype,
    check_shape,
    launch,
    power_of_two,
    rows_of,
)
from nvfp4check.kernels.matmul import (
    POINTER_CONFIG,
    check_swizzled,
    few_config,
    scale_descriptor,
    tma_reads,
)
from nvfp4check.kernels.matmul_kernels import decode_halves, load_scale_tile, store_tile
from nvfp4check.kernels.swizzle import swizzle
from nvfp4ref.formats import BLOCK_SIZE, SCALE_TILE_ROWS


@triton.jit
def _group_of(tile, offsets_ptr, experts, tiles_n, BLOCK_T: tl.constexpr, EXPERTS: tl.constexpr):
    """Return the expert, first row, last row and feature tile of a tile; expert = -1 past all."""
    offs_e = tl.arange(0, EXPERTS)
    first = tl.load(offsets_ptr + offs_e, mask=offs_e < experts, other=0)
    last = tl.load(offsets_ptr + offs_e + 1, mask=offs_e < experts, other=0)
    tiles = (last - first + BLOCK_T - 1) // BLOCK_T * tiles_n
    end = tl.cumsum(tiles, axis=0)
    mine = (tile >= end - tiles) & (tile < end)
    expert = tl.max(tl.where(mine, offs_e, -1), axis=0)
    own = tile - tl.sum(tl.where(mine, end - tiles, 0), axis=0)
    # Tiles of one group go feature by feature, so that its tokens stay in cache.
    row = tl.sum(tl.where(mine, first, 0), axis=0) + own // tiles_n * BLOCK_T
    stop = tl.sum(tl.where(mine, last, 0), axis=0)
    return expert, row, stop, own % tiles_n


@triton.jit
def _grouped_matmul_kernel(
    b_desc,
    b_scale_desc,
    a_ptr,
    a_scale_ptr,
    alpha_ptr,
    offsets_ptr,
    out_ptr,
    N,
    K,
    experts,
    max_tiles,
    padded_n,
    stride_am,
    stride_asm,
    stride_om,
    PROGRAMS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), max_tiles, PROGRAMS):
        expert, row, stop, pid_n = _group_of(tile, offsets_ptr, experts, tiles_n, BLOCK_T, EXPERTS)
        if expert >= 0:
            offs_t = row + tl.arange(0, BLOCK_T)
            mine = offs_t[:, None] < stop
            a_rows = a_ptr + offs_t.to(tl.int64)[:, None] * stride_am
            a_scale_rows = a_scale_ptr + offs_t.to(tl.int64)[:, None] * stride_asm
            acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
            for k in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
                offs_byte = k * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
                offs_c = k * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)[None, :]
                b = b_desc.load([expert * N + pid_n * BLOCK_N, k * (BLOCK_K // 2)])
                b_scale = load_scale_tile(
                    b_scale_desc,
                    expert * padded_n + pid_n * BLOCK_N,
                    k * BLOCK_K,
                    BLOCK_N,
                    BLOCK_K,
                )
                a = tl.load(a_rows + offs_byte, mask=mine & (offs_byte < K // 2), other=0)
                a_scale = tl.load(a_scale_rows + offs_c, mask=mine & (offs_c < K // 16), other=0)
                a_scale = a_scale.to(tl.float8e4nv, bitcast=True)
                acc = tl.dot_scaled(b, b_scale, "e2m1", a.T, a_scale, "e2m1", acc)
            offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
            alpha = tl.load(alpha_ptr + expert)
            store_tile(acc, alpha, out_ptr, offs_n, offs_t, N, stop, 1, stride_om)


@triton.jit
def _grouped_matmul_pointer_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    alpha_ptr,
    offsets_ptr,
    out_ptr,
    N,
    K,
    experts,
    stride_am,
    stride_asm,
    stride_be,
    stride_bn,
    stride_bse,
    stride_bsn,
    stride_om,
    EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    expert, row, stop, pid_n = _group_of(
        tl.program_id(0), offsets_ptr, experts, tl.cdiv(N, BLOCK_N), BLOCK_T, EXPERTS
    )
    if expert < 0:
        return
    offs_t = row + tl.arange(0, BLOCK_T)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_t, rows_n = offs_t.to(tl.int64)[:, None], offs_n.to(tl.int64)[:, None]
    own = expert.to(tl.int64)
    places_a = (rows_t * stride_am, rows_t * stride_asm)
    places_b = (own * stride_be + rows_n * stride_bn, own * stride_bse + rows_n * stride_bsn)
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
        a_even, a_odd = decode_halves(
            a_ptr, a_scale_ptr, places_a, offs_t[:, None] < stop, k, K, BLOCK_T, BLOCK_K
        )
        b_even, b_odd = decode_halves(
            b_ptr, b_scale_ptr, places_b, offs_n[:, None] < N, k, K, BLOCK_N, BLOCK_K
        )
        acc = tl.dot(a_even, b_even.T, acc)
        acc = tl.dot(a_odd, b_odd.T, acc)
    alpha = tl.load(alpha_ptr + expert)
    store_tile(acc, alpha, out_ptr, offs_t, offs_n, stop, N, stride_om, 1)


def swizzle_experts(b_scales: torch.Tensor) -> torch.Tensor:
    """Return block scales [E, N, C] in 128x4 tiles, each expert's rows padded to whole tiles.

    Do it once for weights that stay.

    Raises:
        ValueError: The scales are not [E, N, C] in float8_e4m3fn.
    """
    check_dtype("b_scales", b_scales, torch.float8_e4m3fn)
    check_shape("b_scales", b_scales, None, None, None)
    E, N, C = b_scales.shape
    raw = b_scales.view(torch.uint8)
    padding = -N % SCALE_TILE_ROWS
    if padding:
        raw = torch.nn.functional.pad(raw, (0, 0, 0, padding))
    return swizzle(raw.reshape(E * (N + padding), C)).view(torch.float8_e4m3fn)


def grouped_matmul(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    expert_offsets: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return [M, N]: rows expert_offsets[e] to expert_offsets[e+1] of A times expert e.

    Scales are row-major; where the hardware wants the weight's swizzled that is done on the way,
    once for every call: `swizzle_experts` and `grouped_matmul_swizzled` do it once for all.

    Raises:
        ValueError: The shapes, dtypes or devices do not fit together.
    """
    N, K, E = _check(a_codes, a_scales, b_codes, alpha, expert_offsets, dtype)
    check_dtype("b_scales", b_scales, torch.float8_e4m3fn)
    check_shape("b_scales", b_scales, E, N, K // BLOCK_SIZE)
    check_device(a_codes=a_codes, b_scales=b_scales)
    if architecture_of(a_codes).multiplies_nvfp4 and _tma_reads_experts(b_codes):
        swizzled = swizzle_experts(b_scales)
        return _grouped_native(a_codes, a_scales, b_codes, swizzled, alpha, expert_offsets, dtype)
    return _grouped_pointer(a_codes, a_scales, b_codes, b_scales, alpha, expert_offsets, dtype)


def grouped_matmul_swizzled(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    expert_offsets: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return what `grouped_matmul` does, of weights whose scales `swizzle_experts` made.

    Raises:
        ValueError: The shapes, dtypes or devices do not fit together, or the device does not
            multiply NVFP4 natively.
    """
    N, K, E = _check(a_codes, a_scales, b_codes, alpha, expert_offsets, dtype)
    check_dtype("b_scales", b_scales, torch.float8_e4m3fn)
    columns = ceil_div(K, 64) * 4
    check_swizzled(
        "b_scales", b_scales, E * ceil_div(N, SCALE_TILE_ROWS) * SCALE_TILE_ROWS * columns
    )
    if not architecture_of(a_codes).multiplies_nvfp4 or not _tma_reads_experts(b_codes):
        raise ValueError(
            "swizzled scales are for tensor cores that multiply NVFP4, and codes whose rows begin "
            "on 16 bytes: use grouped_matmul"
        )
    return _grouped_native(a_codes, a_scales, b_codes, b_scales, alpha, expert_offsets, dtype)


def _check(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    alpha: torch.Tensor,
    expert_offsets: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[int, int, int]:
    check_dtype("a_codes", a_codes, torch.uint8)
    check_shape("a_codes", a_codes, None, None)
    check_dtype("b_codes", b_codes, torch.uint8)
    check_shape("b_codes", b_codes, None, None, a_codes.shape[1])
    M, (E, N), K = a_codes.shape[0], b_codes.shape[:2], a_codes.shape[1] * 2
    if K % BLOCK_SIZE:
        raise ValueError(f"a_codes: {K} codes a row, expected a multiple of {BLOCK_SIZE}")
    check_dtype("a_scales", a_scales, torch.float8_e4m3fn)
    check_shape("a_scales", a_scales, M, K // BLOCK_SIZE)
    check_dtype("alpha", alpha, torch.float32)
    check_shape("alpha", alpha, E)
    check_dtype("expert_offsets", expert_offsets, torch.int32)
    check_shape("expert_offsets", expert_offsets, E + 1)
    check_device(
        a_codes=a_codes,
        a_scales=a_scales,
        b_codes=b_codes,
        alpha=alpha,
        expert_offsets=expert_offsets,
    )
    if dtype not in INPUT_DTYPES:
        raise ValueError(f"dtype {dtype}: expected float32, bfloat16 or float16")
    return N, K, E


def _tma_reads_experts(b_codes: torch.Tensor) -> bool:
    stacked = b_codes.stride(0) == b_codes.shape[1] * b_codes.stride(1)
    return stacked and b_codes.numel() > 0 and tma_reads(b_codes[0])


def _rows_of_a_tile(rows: int, experts: int, least: int, most: int) -> int:
    """Return BLOCK_T: the power of two that holds the rows of an average group."""
    return power_of_two(ceil_div(rows, max(experts, 1)), least=least, most=most)


def _grouped_native(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    expert_offsets: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    (M, K), (E, N) = (a_codes.shape[0], a_codes.shape[1] * 2), b_codes.shape[:2]
    config = few_config(architecture_of(a_codes))
    block_t = _rows_of_a_tile(M, E, 16, config.block_n)
    tiles = (ceil_div(M, block_t) + E) * ceil_div(N, config.block_m)
    programs = min(tiles, multiprocessors(a_codes.device))
    padded_n = ceil_div(N, SCALE_TILE_ROWS) * SCALE_TILE_ROWS
    codes, linear = rows_of(a_codes), rows_of(a_scales).view(torch.uint8)
    stacked = b_codes.as_strided((E * N, K // 2), (b_codes.stride(1), 1))
    out = torch.empty(M, N, dtype=dtype, device=a_codes.device)
    launch(
        _grouped_matmul_kernel,
        (programs if M else 0,),
        TensorDescriptor.from_tensor(stacked, [config.block_m, config.block_k // 2]),
        scale_descriptor(b_scales, E * padded_n, K, (config.block_m, config.block_k)),
        codes,
        linear,
        alpha.contiguous(),
        expert_offsets.contiguous(),
        out,
        N,
        K,
        E,
        tiles,
        padded_n,
        codes.stride(0),
        linear.stride(0),
        out.stride(0),
        on=a_codes,
        PROGRAMS=programs,
        EXPERTS=power_of_two(E, most=1 << 14),
        BLOCK_N=config.block_m,
        BLOCK_T=block_t,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def _grouped_pointer(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    expert_offsets: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    (M, K), (E, N) = (a_codes.shape[0], a_codes.shape[1] * 2), b_codes.shape[:2]
    config = POINTER_CONFIG
    block_t = _rows_of_a_tile(M, E, 16, config.block_m)
    block_n = power_of_two(N, least=16, most=config.block_n)
    a, a_linear = rows_of(a_codes), rows_of(a_scales).view(torch.uint8)
    b, b_linear = rows_of(b_codes), rows_of(b_scales).view(torch.uint8)
    out = torch.empty(M, N, dtype=dtype, device=a_codes.device)
    tiles = (ceil_div(M, block_t) + E) * ceil_div(N, block_n)
    launch(
        _grouped_matmul_pointer_kernel,
        (tiles if M else 0,),
        a,
        a_linear,
        b,
        b_linear,
        alpha.contiguous(),
        expert_offsets.contiguous(),
        out,
        N,
        K,
        E,
        a.stride(0),
        a_linear.stride(0),
        b.stride(0),
        b.stride(1),
        b_linear.stride(0),
        b_linear.stride(1),
        out.stride(0),
        on=a_codes,
        EXPERTS=power_of_two(E, most=1 << 14),
        BLOCK_N=block_n,
        BLOCK_T=block_t,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        num_warps=config.warps if block_t * block_n >= 1 << 13 else 4,
        num_stages=config.stages,
    )
    return out
