"""Errors through causal attention of one prompt, in its direct and its absorbed form.

T tokens, H heads, N = qk_nope_head_dim, R = qk_rope_head_dim, V = v_head_dim; p the weights of a
row, s its scores, o its output; sums over the keys j that a query sees.

Contract, to first order  do = sum_j p_j (ds_j - mean ds) (v_j - o) + sum_j p_j dv_j:
    scores          var s = (var q) k**2 + q**2 (var k), times the gain, as in `linear`
    of the query    what is in q moves all scores of its row together, in a way that depends on
                    every key: unknown correlation, so sum_j p_j |ds_j| |v_j - o|, which is at most
                    sqrt(sum_j p_j var s_j) sqrt(sum_j p_j v_j**2 - o**2) by Cauchy-Schwarz
    of the keys     independent from key to key: sum_j p_j**2 var s_j (v_j - o)**2; so are the
                    roundings of a score (its sum, two to the dtype) and of its exponential
    of the values   independent from key to key: sum_j p_j**2 var v_j
    of the weights  p_j rounded to the dtype: sum_j var(p_j) v_j**2
    shared weights  where kv_b_proj is rounded when it is dequantised, that error is the same in
                    all keys: they are then held as what is in q is, and values by sum_j p_j var v_j
    row             the denominator's sum and the division are common to a row
    own             the sum over keys and one rounding to the dtype
    either form     engines unfold keys and values to prefill and decode in the latent space. Both
                    are correct: what only one rounds is counted, and where both round a score or
                    an output, the larger of the variances, as above or as in `absorbed`; but for
                    engines that are declared to attend in the direct form alone
    not covered     queries or weights p in FP8, as FlashMLA's and TensorRT-LLM's FP8 kernels have
                    them: these are codes of another width, not roundings of the dtype
"""

from dataclasses import dataclass

import torch

from nvfp4check.forward.bounds.absorbed import Absorbed
from nvfp4check.forward.bounds.uncertain import Uncertain, split_last, through_matrix
from nvfp4ref.deepseek_v3.attention import SCORES_AT_ONCE
from nvfp4ref.deepseek_v3.config import DeepseekV3Config

#: Matrices that are alive at once, for each declared arithmetic: as large as the scores, and as the
#: queries in the latent space.
_ALIVE = 28
_ALIVE_LATENT = 14


@dataclass(frozen=True, slots=True)
class Rows:
    """What attention of one prompt works on, [heads, tokens, width] and variances before that."""

    q: torch.Tensor
    q_variance: torch.Tensor
    q_common: torch.Tensor
    #: The parts that come from the latent, and the rotated part that all heads share.
    k_nope: torch.Tensor
    k_rope: torch.Tensor
    k_variance: torch.Tensor
    nope_common: torch.Tensor
    rope_common: torch.Tensor
    v: torch.Tensor
    v_variance: torch.Tensor


def attended(
    q_nope: Uncertain,
    q_rope: Uncertain,
    unfolded: Uncertain,
    k_rope: Uncertain,
    absorbed: Absorbed,
    config: DeepseekV3Config,
    *,
    shared_weights: bool,
) -> Uncertain:
    """Return the error of the heads' outputs [T, H V] of one prompt.

    q_nope is [T, H N], q_rope [T, H R], unfolded [T, H (N + V)], k_rope [T, R].
    """
    rows = _rows(q_nope, q_rope, unfolded, k_rope, config)
    heads, tokens = rows.q.shape[:2]
    width = _ALIVE * tokens + _ALIVE_LATENT * config.kv_lora_rank
    step = max(1, SCORES_AT_ONCE // (heads * width * len(absorbed.roundings)))
    parts = [
        _some(rows, slice(start, min(start + step, tokens)), absorbed, shared_weights)
        for start in range(0, tokens, step)
    ]
    value, variance, common = (
        torch.cat([part[i] for part in parts], dim=-1 if i == 2 else -2) for i in range(3)
    )
    total = variance + common.unsqueeze(-1) * value.square()  # a row is a head's, not a token's
    return Uncertain(
        value.transpose(0, 1).flatten(1),
        total.transpose(-3, -2).flatten(-2),
        torch.zeros_like(q_nope.common),
    )


def _rows(
    q_nope: Uncertain,
    q_rope: Uncertain,
    unfolded: Uncertain,
    k_rope: Uncertain,
    config: DeepseekV3Config,
) -> Rows:
    heads, width = config.num_attention_heads, config.qk_nope_head_dim

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return split_last(x, heads, -1).transpose(-3, -2)

    def shared(x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(-3).expand(*x.shape[:-2], heads, *x.shape[-2:])

    both, both_variance = by_head(unfolded.value), by_head(unfolded.variance)
    own = unfolded.common[:, :, None, :, None]
    v = both[..., width:]
    return Rows(
        q=torch.cat((by_head(q_nope.value), by_head(q_rope.value)), dim=-1),
        q_variance=torch.cat((by_head(q_nope.variance), by_head(q_rope.variance)), dim=-1),
        q_common=q_nope.common,
        k_nope=both[..., :width],
        k_rope=shared(k_rope.value),
        k_variance=torch.cat((both_variance[..., :width], shared(k_rope.variance)), dim=-1),
        nope_common=unfolded.common,
        rope_common=k_rope.common,
        v=v,
        v_variance=both_variance[..., width:] + own * v.square(),
    )


def _some(
    rows: Rows,
    part: slice,
    absorbed: Absorbed,
    shared_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return output [H, t, V], variance [A, KINDS, H, t, V], common [A, KINDS, H, t] of queries."""
    scale, roundings = absorbed.softmax_scale, absorbed.roundings
    seen = slice(0, part.stop)
    width = rows.k_nope.shape[-1]
    q, v = rows.q[:, part], rows.v[:, seen]
    k_nope, k_rope = rows.k_nope[:, seen], rows.k_rope[:, seen]
    nope = q[..., :width] @ k_nope.mT * scale  # (H, t, S)
    rope = q[..., width:] @ k_rope.mT * scale
    scores = nope + rope
    token = torch.arange(part.stop, device=q.device)
    later = token > token[part].unsqueeze(1)
    p = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
    out = p @ v

    k2 = torch.cat((k_nope, k_rope), dim=-1).square()
    q2 = q.square()
    rope_squares = q2[..., width:] @ k2[..., width:].mT * scale**2
    squares = q2[..., :width] @ k2[..., :width].mT * scale**2 + rope_squares
    gain = (scores.square() / squares).nan_to_num(1.0).clamp(min=1.0)
    of_query = through_matrix(rows.q_variance[..., part, :] @ k2.mT * scale**2, gain)
    of_query = of_query + rows.q_common[:, :, None, part, None] * scores.square()
    of_key = through_matrix(q2 @ rows.k_variance[..., seen, :].mT * scale**2, gain)
    of_key = of_key + rows.nope_common[:, :, None, None, seen] * nope.square()
    of_key = of_key + rows.rope_common[:, :, None, None, seen] * rope.square()
    own = (
        roundings.of_sum(q.shape[-1], scores, squares)
        + roundings.of_output(scores, 2)
        + roundings.of_internal(scores, 2)  # scaled, and less the row's largest
        + roundings.of_functions(torch.ones_like(scores))
    )
    absorbed_scores = scores
    if absorbed.declared:
        absorbed_scores, of_latent_query, absorbed_own = absorbed.scores(
            q[..., :width], rope, rope_squares
        )
        own = torch.maximum(own, absorbed_own)
        of_query = of_query + of_latent_query
    if shared_weights:
        of_query, of_key = of_query + of_key, own
    else:
        of_key = of_key + own

    p2, v2 = p.square(), v.square()
    spread = (p @ v2 - out.square()).clamp(min=0.0)
    variance = (p * of_query).sum(-1, keepdim=True) * spread
    weighted = p2 * of_key
    variance = variance + (
        weighted @ v2 - 2 * out * (weighted @ v) + out.square() * weighted.sum(-1, keepdim=True)
    ).clamp(min=0.0)
    variance = variance + (p if shared_weights else p2) @ rows.v_variance[..., seen, :]
    variance = variance + roundings.of_output(p) @ v2
    variance = through_matrix(variance, torch.ones_like(out))
    last = roundings.of_sum(part.stop, out, p2 @ v2) + roundings.of_output(out)
    if absorbed.declared:
        absorbed_p = absorbed_scores.masked_fill(later, float("-inf")).softmax(dim=-1)
        last = torch.maximum(last, absorbed.output(absorbed_p, out))
    variance = variance + last
    ones = torch.ones_like(out[..., 0])
    common = roundings.of_sum(part.stop, ones, ones) + roundings.of_internal(ones, 2)
    return out, variance, common
