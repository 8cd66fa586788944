"""DeepSeek-V3's choice of experts, and their weights.

T tokens, E experts in n_group groups of SIZE, k experts a token.

Contract:
    scores   1 / (1 + exp(-logit)) in float32
    choice   by score + bias: a group counts the sum of its two best; experts outside the best
             topk_group groups are masked with -inf; then the top k. Ties go to the lower index
    weights  scores of the chosen divided by their sum + 1e-20, times scaling
    order    experts stand by falling choice score
A program holds the scores of its tokens in registers and takes the largest one after another.
"""

import torch
import triton
import triton.language as tl

from nvfp4check.kernels.arch import INTERPRETER, architecture_of
from nvfp4check.kernels.launch import (
    ceil_div,
    check_device,
    check_dtype,
    check_shape,
    declares,
    launch,
    power_of_two,
)

#: Most experts that a program holds.
MAX_EXPERTS = 4096


@triton.jit
def _without_first_largest(scores, index, axis: tl.constexpr, none: tl.constexpr):
    """Return the largest along an axis, its index, and the scores with it replaced by -inf."""
    best = tl.max(scores, axis=axis, keep_dims=True)
    place = tl.min(tl.where(scores == best, index, none), axis=axis, keep_dims=True)
    return best, place, tl.where(index == place, float("-inf"), scores)


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    T,
    scaling,
    stride_lt,
    N_GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    group = tl.arange(0, GROUPS)[None, :, None]
    member = tl.arange(0, WIDTH)[None, None, :]
    expert = group * SIZE + member
    real = (group < N_GROUP) & (member < SIZE)
    inside = real & (token < T)
    logits = tl.load(logits_ptr + token.to(tl.int64) * stride_lt + expert, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + expert, mask=real, other=0.0)
    scores = tl.div_rn(tl.full(logits.shape, 1.0, tl.float32), 1.0 + tl.exp(-logits))
    choice = tl.where(real, scores + bias, float("-inf"))

    none: tl.constexpr = GROUPS * WIDTH * SIZE  # above every index
    if N_GROUP > 1:
        first, _, rest = _without_first_largest(choice, member, 2, none)
        second = tl.max(rest, axis=2, keep_dims=True)
        group_score = tl.where(group < N_GROUP, first + second, float("-inf"))
        open_group = tl.zeros(group_score.shape, tl.int1)
        for _i in tl.static_range(TOPK_GROUP):
            _, best, group_score = _without_first_largest(group_score, group, 1, none)
            open_group = open_group | (group == best)
        choice = tl.where(open_group, choice, float("-inf"))

    # The top k, one after the other, in the order of their choice scores.
    flat: tl.constexpr = (BLOCK_T, GROUPS * WIDTH)
    choice = tl.reshape(choice, flat)
    scores = tl.reshape(tl.broadcast_to(scores, (BLOCK_T, GROUPS, WIDTH)), flat)
    index = tl.reshape(tl.broadcast_to(tl.where(real, expert, none), logits.shape), flat)
    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((BLOCK_T, SLOTS), tl.int32)
    weights = tl.zeros((BLOCK_T, SLOTS), tl.float32)
    for i in tl.static_range(TOP_K):
        _, best, choice = _without_first_largest(choice, index, 1, none)
        score = tl.sum(tl.where(index == best, scores, 0.0), axis=1, keep_dims=True)
        chosen = tl.where(slot == i, best, chosen)
        weights = tl.where(slot == i, score, weights)

    total = tl.sum(weights, axis=1, keep_dims=True) + 1e-20
    weights = tl.div_rn(weights, tl.broadcast_to(total, weights.shape)) * scaling
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    places = row.to(tl.int64) * TOP_K + slot
    kept = (row < T) & (slot < TOP_K)
    tl.store(experts_ptr + places, chosen, mask=kept)
    tl.store(weights_ptr + places, weights, mask=kept)


@declares(ties="lower-index")
def route(
    logits: torch.Tensor,
    bias: torch.Tensor,
    n_group: int,
    topk_group: int,
    top_k: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return experts int32 [T, k] and weights float32 [T, k] of router logits [T, E].

    Raises:
        ValueError: A tensor is not float32 or does not fit, the experts do not divide into groups,
            or too few stand open.
    """
    check_dtype("logits", logits, torch.float32)
    check_shape("logits", logits, None, None)
    T, E = logits.shape
    check_dtype("bias", bias, torch.float32)
    check_shape("bias", bias, E)
    check_device(logits=logits, bias=bias)
    if n_group < 1 or E % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(f"{E} experts, {topk_group} of {n_group} groups: not a division")
    size = E // n_group
    if not 1 <= top_k <= topk_group * size or (n_group > 1 and size < 2):
        raise ValueError(f"{top_k} experts a token from {topk_group} groups of {size}")
    groups, width = (power_of_two(n, most=MAX_EXPERTS) for n in (n_group, size))
    if groups * width > MAX_EXPERTS:
        raise ValueError(f"{E} experts in {n_group} groups: at most {MAX_EXPERTS} are held")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    experts = torch.empty(T, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(T, top_k, dtype=torch.float32, device=logits.device)
    block_t = power_of_two(T, most=64 if architecture_of(logits) is INTERPRETER else 1)
    launch(
        _route_kernel,
        (ceil_div(T, block_t),),
        logits,
        bias.contiguous(),
        experts,
        weights,
        T,
        float(scaling),
        logits.stride(0),
        on=logits,
        N_GROUP=n_group,
        SIZE=size,
        TOPK_GROUP=topk_group,
        TOP_K=top_k,
        GROUPS=groups,
        WIDTH=width,
        SLOTS=power_of_two(top_k, most=MAX_EXPERTS),
        BLOCK_T=block_t,
        num_warps=power_of_two(groups * width // 256, most=8),
    )
    return experts, weights
