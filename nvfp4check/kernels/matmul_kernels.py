"""The kernels behind `nvfp4check.kernels.matmul`, and what they share with the grouped ones.

M rows, N columns, K contracted; a tile is BLOCK_M x BLOCK_N, BLOCK_K at a time.

Contract:
    tma      codes and swizzled scales by descriptor, zero beyond the edges; `tl.dot_scaled`
    few      the weight is A, by descriptor; the tokens are B, by pointer, with linear scales
    pointer  both by pointer, decoded to float16, which is exact; `tl.dot`
    store    alpha times the float32 accumulator, rounded to the dtype of the output
"""

import triton
import triton.language as tl

from nvfp4check.kernels.numeric import decode_e2m1, decode_e4m3


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return the tile row and column of an index, GROUP rows at a time so that B is reused."""
    per_group = GROUP * tiles_n
    first = index // per_group * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + index % per_group % rows, index % per_group // rows


@triton.jit
def load_scale_tile(desc, row, k, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return block scales [ROWS, BLOCK_K/16] from swizzled tiles; row and k count elements."""
    tiles = desc.load([0, row // 128, k // 64, 0, 0])
    tiles = tl.reshape(tiles, (ROWS // 128, BLOCK_K // 64, 32, 4, 4))
    return tl.reshape(tl.permute(tiles, (0, 3, 2, 1, 4)), (ROWS, BLOCK_K // 16))


@triton.jit
def store_tile(acc, alpha, out_ptr, offs_m, offs_n, M, N, stride_om, stride_on):
    """Store alpha times the accumulator in the dtype of the output."""
    values = (acc * alpha).to(out_ptr.dtype.element_ty)
    places = offs_m.to(tl.int64)[:, None] * stride_om + offs_n.to(tl.int64)[None, :] * stride_on
    tl.store(out_ptr + places, values, mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


@triton.jit
def _matmul_tma_kernel(
    a_desc,
    a_scale_desc,
    b_desc,
    b_scale_desc,
    alpha_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_om,
    stride_on,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    alpha = tl.load(alpha_ptr)
    for tile in tl.range(
        tl.program_id(0),
        tiles_m * tiles_n,
        PROGRAMS,
        flatten=not SPECIALIZE,
        warp_specialize=SPECIALIZE,
    ):
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
            a = a_desc.load([pid_m * BLOCK_M, k * (BLOCK_K // 2)])
            b = b_desc.load([pid_n * BLOCK_N, k * (BLOCK_K // 2)])
            a_scale = load_scale_tile(a_scale_desc, pid_m * BLOCK_M, k * BLOCK_K, BLOCK_M, BLOCK_K)
            b_scale = load_scale_tile(b_scale_desc, pid_n * BLOCK_N, k * BLOCK_K, BLOCK_N, BLOCK_K)
            acc = tl.dot_scaled(a, a_scale, "e2m1", b.T, b_scale, "e2m1", acc)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        store_tile(acc, alpha, out_ptr, offs_m, offs_n, M, N, stride_om, stride_on)


@triton.jit
def _matmul_few_kernel(
    a_desc,
    a_scale_desc,
    b_ptr,
    b_scale_ptr,
    alpha_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_bn,
    stride_bsn,
    stride_om,
    stride_on,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # A is the weight, streamed once by TMA; B the few tokens, with linear scales.
    pid_m = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = offs_n[:, None] < N
    b_rows = b_ptr + offs_n.to(tl.int64)[:, None] * stride_bn
    b_scale_rows = b_scale_ptr + offs_n.to(tl.int64)[:, None] * stride_bsn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
        offs_byte = k * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
        offs_c = k * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)[None, :]
        a = a_desc.load([pid_m * BLOCK_M, k * (BLOCK_K // 2)])
        a_scale = load_scale_tile(a_scale_desc, pid_m * BLOCK_M, k * BLOCK_K, BLOCK_M, BLOCK_K)
        b = tl.load(b_rows + offs_byte, mask=in_rows & (offs_byte < K // 2), other=0)
        b_scale = tl.load(b_scale_rows + offs_c, mask=in_rows & (offs_c < K // 16), other=0)
        b_scale = b_scale.to(tl.float8e4nv, bitcast=True)
        acc = tl.dot_scaled(a, a_scale, "e2m1", b.T, b_scale, "e2m1", acc)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    store_tile(acc, tl.load(alpha_ptr), out_ptr, offs_m, offs_n, M, N, stride_om, stride_on)


@triton.jit
def decode_halves(
    codes_ptr, scale_ptr, offs, inside, k, K, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return the even and the odd elements [ROWS, BLOCK_K/2] of a tile in float16, exact.

    `offs` are the row offsets in bytes of the codes and of the scales.
    """
    offs_codes, offs_scales = offs
    offs_byte = k * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
    offs_c = k * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)[None, :]
    packed = tl.load(
        codes_ptr + offs_codes + offs_byte, mask=inside & (offs_byte < K // 2), other=0
    ).to(tl.int32)
    scale_bytes = tl.load(
        scale_ptr + offs_scales + offs_c, mask=inside & (offs_c < K // 16), other=0
    )
    scales = decode_e4m3(scale_bytes.to(tl.int32))[:, :, None]  # one for 8 bytes
    bytes_: tl.constexpr = (ROWS, BLOCK_K // 16, 8)
    tile: tl.constexpr = (ROWS, BLOCK_K // 2)
    even = tl.reshape(tl.reshape(decode_e2m1(packed), bytes_) * scales, tile)
    odd = tl.reshape(tl.reshape(decode_e2m1(packed >> 4), bytes_) * scales, tile)
    return even.to(tl.float16), odd.to(tl.float16)


@triton.jit
def _matmul_pointer_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    alpha_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_am,
    stride_asm,
    stride_bn,
    stride_bsn,
    stride_om,
    stride_on,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m, rows_n = offs_m.to(tl.int64)[:, None], offs_n.to(tl.int64)[:, None]
    places_a = (rows_m * stride_am, rows_m * stride_asm)
    places_b = (rows_n * stride_bn, rows_n * stride_bsn)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
        a_even, a_odd = decode_halves(
            a_ptr, a_scale_ptr, places_a, offs_m[:, None] < M, k, K, BLOCK_M, BLOCK_K
        )
        b_even, b_odd = decode_halves(
            b_ptr, b_scale_ptr, places_b, offs_n[:, None] < N, k, K, BLOCK_N, BLOCK_K
        )
        # Even elements meet even ones and odd meet odd: nothing needs to be interleaved.
        acc = tl.dot(a_even, b_even.T, acc)
        acc = tl.dot(a_odd, b_odd.T, acc)
    store_tile(acc, tl.load(alpha_ptr), out_ptr, offs_m, offs_n, M, N, stride_om, stride_on)
