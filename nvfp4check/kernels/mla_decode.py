"""Absorbed latent attention of one query a sequence over a paged cache.

B sequences, H heads, L latent width, R rotary width, P pages of S tokens.

Contract:
    score      (q_latent . latent + q_rope . rope) * scale, float32 accumulator
    softmax    over the first lengths[b] tokens of a sequence; the running maximum is taken off
               before exp2, so nothing overflows
    output     weights @ latent in float32, divided by their sum, rounded to the dtype of q_latent;
               a sequence of no tokens gives zeros
    dtype      weights are rounded to the dtype of the cache before they meet it
    split      a sequence is cut every SPLIT tokens whatever else is in the batch, and its parts are
               joined in order: results do not depend on the batch, and repeat bit for bit
    beyond     pages, page numbers and tokens past the length are not read
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nvfp4check.kernels.arch import INTERPRETER, SM90, Architecture, architecture_of
from nvfp4check.kernels.launch import (
    INPUT_DTYPES,
    ceil_div,
    check_device,
    check_dtype,
    check_shape,
    declares,
    launch,
    power_of_two,
)

#: Tokens of one part of a sequence.
SPLIT = 512

_LOG2_E = 1.4426950408889634


@triton.jit
def _mla_decode_kernel(
    q_latent_ptr,
    q_rope_ptr,
    latent_ptr,
    rope_ptr,
    page_table_ptr,
    lengths_ptr,
    partial_ptr,
    maximum_ptr,
    sum_ptr,
    scale_log2,
    H,
    L,
    R,
    stride_qb,
    stride_qh,
    stride_rb,
    stride_rh,
    stride_lp,
    stride_ls,
    stride_kp,
    stride_ks,
    stride_tb,
    splits,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_l, offs_r = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    length = tl.load(lengths_ptr + b)
    first = split * SPLIT
    if first >= length:
        return
    last = tl.minimum(first + SPLIT, length)
    heads = offs_h[:, None] < H
    q_latent = tl.load(
        q_latent_ptr + b * stride_qb + offs_h[:, None] * stride_qh + offs_l[None, :],
        mask=heads & (offs_l[None, :] < L),
        other=0.0,
    )
    q_rope = tl.load(
        q_rope_ptr + b * stride_rb + offs_h[:, None] * stride_rh + offs_r[None, :],
        mask=heads & (offs_r[None, :] < R),
        other=0.0,
    )
    maximum = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_L), tl.float32)
    for start in range(first, last, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        alive = token < last
        page = tl.load(page_table_ptr + b * stride_tb + token // PAGE, mask=alive, other=0)
        slot = (token % PAGE).to(tl.int64)
        latent_rows = page.to(tl.int64) * stride_lp + slot * stride_ls
        latent = tl.load(
            latent_ptr + latent_rows[:, None] + offs_l[None, :],
            mask=alive[:, None] & (offs_l[None, :] < L),
            other=0.0,
        )
        rope_rows = page.to(tl.int64) * stride_kp + slot * stride_ks
        k_rope = tl.load(
            rope_ptr + rope_rows[:, None] + offs_r[None, :],
            mask=alive[:, None] & (offs_r[None, :] < R),
            other=0.0,
        )
        scores = tl.dot(q_latent, latent.T, input_precision=PRECISION)
        scores = tl.dot(q_rope, k_rope.T, scores, input_precision=PRECISION)
        # In units of log2: exp2 is the hardware's exponential.
        scores = tl.where(alive[None, :], scores * scale_log2, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(latent.dtype), latent, acc, input_precision=PRECISION)
        maximum = higher
    part = (b * H + offs_h) * splits + split
    tl.store(maximum_ptr + part, maximum, mask=offs_h < H)
    tl.store(sum_ptr + part, total, mask=offs_h < H)
    tl.store(
        partial_ptr + part[:, None] * L + offs_l[None, :],
        acc,
        mask=heads & (offs_l[None, :] < L),
    )


@triton.jit
def _mla_join_kernel(
    partial_ptr,
    maximum_ptr,
    sum_ptr,
    lengths_ptr,
    out_ptr,
    H,
    L,
    splits,
    SPLIT,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_l = tl.arange(0, BLOCK_L)
    parts = tl.minimum(tl.cdiv(tl.load(lengths_ptr + row // H), SPLIT), splits)
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_L,), tl.float32)
    for split in range(parts):
        part = row * splits + split
        own = tl.load(maximum_ptr + part)
        higher = tl.maximum(maximum, own)
        shrink, grow = tl.exp2(maximum - higher), tl.exp2(own - higher)
        partial = tl.load(partial_ptr + part * L + offs_l, mask=offs_l < L, other=0.0)
        acc = acc * shrink + partial * grow
        total = total * shrink + tl.load(sum_ptr + part) * grow
        maximum = higher
    values = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * L + offs_l, values.to(out_ptr.dtype.element_ty), mask=offs_l < L)


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Heads and tokens that meet in one step, and how the loop is pipelined."""

    block_h: int
    block_n: int
    warps: int
    stages: int


def decode_tile(arch: Architecture, heads: int, itemsize: int) -> DecodeTile:
    """Return the tile for an element of 2 bytes or of 4, which take products of full precision."""
    if arch is INTERPRETER:
        return DecodeTile(power_of_two(heads, least=16, most=64), 64, 4, 1)
    if itemsize == 4:
        return DecodeTile(16, 16, 4, 1)
    # More heads at once would read the cache less often, and spill.
    tokens = 16 if arch.shared_memory < SM90.shared_memory else 32
    return DecodeTile(power_of_two(heads, least=16, most=32), tokens, 8, 2)


@declares(intermediate="bfloat16", batch_invariant=True)
def mla_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return the weighted latent [B, H, L] of one query a sequence, in the dtype of q_latent.

    Raises:
        ValueError: The shapes, dtypes or devices do not fit together.
    """
    check_dtype("q_latent", q_latent, *INPUT_DTYPES)
    check_shape("q_latent", q_latent, None, None, None)
    B, H, L = q_latent.shape
    for name, tensor in (
        ("q_rope", q_rope),
        ("latent_pages", latent_pages),
        ("rope_pages", rope_pages),
    ):
        check_dtype(name, tensor, q_latent.dtype)
    check_shape("q_rope", q_rope, B, H, None)
    R = q_rope.shape[2]
    check_shape("latent_pages", latent_pages, None, None, L)
    check_shape("rope_pages", rope_pages, *latent_pages.shape[:2], R)
    check_dtype("page_table", page_table, torch.int32)
    check_shape("page_table", page_table, B, None)
    check_dtype("lengths", lengths, torch.int32)
    check_shape("lengths", lengths, B)
    check_device(
        q_latent=q_latent,
        q_rope=q_rope,
        latent_pages=latent_pages,
        rope_pages=rope_pages,
        page_table=page_table,
        lengths=lengths,
    )
    page = latent_pages.shape[1]
    q_latent, q_rope, latent_pages, rope_pages, page_table, lengths = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        for tensor in (q_latent, q_rope, latent_pages, rope_pages, page_table, lengths)
    )
    # By the width of the page table, not by the lengths, which lie on the GPU.
    splits = max(1, ceil_div(page_table.shape[1] * page, SPLIT))
    device = q_latent.device
    partial = torch.empty(B, H, splits, L, dtype=torch.float32, device=device)
    maximum = torch.empty(B, H, splits, dtype=torch.float32, device=device)
    total = torch.empty(B, H, splits, dtype=torch.float32, device=device)
    out = torch.empty(B, H, L, dtype=q_latent.dtype, device=device)
    tile = decode_tile(architecture_of(q_latent), H, q_latent.element_size())
    block_l = power_of_two(L, least=16, most=4096)
    launch(
        _mla_decode_kernel,
        (B, ceil_div(H, tile.block_h), splits),
        q_latent,
        q_rope,
        latent_pages,
        rope_pages,
        page_table,
        lengths,
        partial,
        maximum,
        total,
        float(scale) * _LOG2_E,
        H,
        L,
        R,
        q_latent.stride(0),
        q_latent.stride(1),
        q_rope.stride(0),
        q_rope.stride(1),
        latent_pages.stride(0),
        latent_pages.stride(1),
        rope_pages.stride(0),
        rope_pages.stride(1),
        page_table.stride(0),
        splits,
        on=q_latent,
        PAGE=page,
        SPLIT=SPLIT,
        BLOCK_H=tile.block_h,
        BLOCK_N=tile.block_n,
        BLOCK_L=block_l,
        BLOCK_R=power_of_two(R, least=16, most=4096),
        PRECISION="ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    launch(
        _mla_join_kernel,
        (B * H,),
        partial,
        maximum,
        total,
        lengths,
        out,
        H,
        L,
        splits,
        SPLIT,
        on=q_latent,
        BLOCK_L=block_l,
    )
    return out
