"""Multi-head latent attention (MLA), in its direct and its absorbed form.

T tokens, packed from several sequences; S tokens in a cache; H heads; D = hidden_size;
C = kv_lora_rank; N = qk_nope_head_dim; R = qk_rope_head_dim; V = v_head_dim;
B sequences and P pages in `mla_decode`.

Contract:
    query    q_b_proj(norm(q_a_proj(x))), split by head into q_nope [T, H, N] and q_rope [T, H, R]
    latent   kv_a_proj_with_mqa(x), split into the latent [T, C], normed, and one key [T, R] that is
             rotated and shared by all heads; these two are what the cache keeps
    direct   k_nope, v = kv_b_proj(latent); score = q_nope . k_nope + q_rope . k_rope
    absorbed q_latent = q_nope W_k; score = q_latent . latent + q_rope . k_rope; the output is
             W_v of the weighted latent; W_k and W_v are the halves of kv_b_proj, dequantised
    weights  softmax(score * softmax_scale) over the token itself and those before it
    rounding linears, norm and rotation round to the dtype of x; from there to the heads' output
             all is float32 (float64 for float64), rounded once before o_proj

The two forms are equal but for rounding, unless kv_b_proj quantises its input.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from nvfp4ref.deepseek_v3.cache import LatentCache
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import Linear
from nvfp4ref.deepseek_v3.norm import arithmetic, rms_norm
from nvfp4ref.deepseek_v3.rotary import rope

#: Scores held at one time; more query rows than this allows are done in turn.
SCORES_AT_ONCE = 2**25


class AttentionForm(StrEnum):
    """Whether keys and values are unfolded from the latent, or queries folded into it."""

    DIRECT = "direct"
    ABSORBED = "absorbed"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """`self_attn` of a layer; `q_proj` stands in for the three q tensors without a q_lora_rank."""

    q_a_proj: Linear | None = None
    q_a_layernorm: torch.Tensor | None = None
    q_b_proj: Linear | None = None
    q_proj: Linear | None = None
    kv_a_proj_with_mqa: Linear
    kv_a_layernorm: torch.Tensor
    kv_b_proj: Linear
    o_proj: Linear


def attention(
    x: torch.Tensor,
    caches: Sequence[LatentCache],
    lengths: Sequence[int],
    weights: AttentionWeights,
    config: DeepseekV3Config,
    form: AttentionForm = AttentionForm.DIRECT,
) -> tuple[torch.Tensor, list[LatentCache]]:
    """Return the output [T, D] and the extended caches of packed sequences x [T, D].

    Sequence i brings `lengths[i]` new tokens, which follow those of its cache.
    """
    positions = torch.cat(
        [
            torch.arange(len(cache), len(cache) + length, device=x.device)
            for cache, length in zip(caches, lengths, strict=True)
        ]
    )
    q_nope, q_rope = queries(x, positions, weights, config)
    latent, k_rope = latents(x, positions, weights, config)
    attend = direct if form is AttentionForm.DIRECT else absorbed

    outputs, extended = [], []
    starts = itertools.accumulate(lengths, initial=0)
    for cache, start, length in zip(caches, starts, lengths, strict=False):
        new = slice(start, start + length)
        grown = cache.extended(latent[new], k_rope[new])
        outputs.append(attend(q_nope[new], q_rope[new], *grown.read(), weights.kv_b_proj, config))
        extended.append(grown)
    heads = torch.cat(outputs).to(x.dtype)  # (T, H, V)
    return weights.o_proj(heads.flatten(1)), extended


def queries(
    x: torch.Tensor, positions: torch.Tensor, weights: AttentionWeights, config: DeepseekV3Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q_nope [T, H, N] and the rotated q_rope [T, H, R]."""
    if weights.q_proj is not None:
        q = weights.q_proj(x)
    elif weights.q_a_proj and weights.q_b_proj and weights.q_a_layernorm is not None:
        compressed = weights.q_a_proj(x)
        q = weights.q_b_proj(rms_norm(compressed, weights.q_a_layernorm, config.rms_norm_eps))
    else:
        raise ValueError("attention needs q_a_proj, q_a_layernorm and q_b_proj, or q_proj")
    q = q.reshape(len(x), config.num_attention_heads, config.qk_head_dim)
    q_nope, q_rope = q[..., : config.qk_nope_head_dim], q[..., config.qk_nope_head_dim :]
    return q_nope, rope(q_rope, positions, config.rotary)


def latents(
    x: torch.Tensor, positions: torch.Tensor, weights: AttentionWeights, config: DeepseekV3Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normed latent [T, C] and the rotated key [T, R] that all heads share."""
    both = weights.kv_a_proj_with_mqa(x)
    latent, k_rope = both[:, : config.kv_lora_rank], both[:, config.kv_lora_rank :]
    latent = rms_norm(latent, weights.kv_a_layernorm, config.rms_norm_eps)
    return latent, rope(k_rope.unsqueeze(1), positions, config.rotary).squeeze(1)


def direct(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_proj: Linear,
    config: DeepseekV3Config,
) -> torch.Tensor:
    """Return the heads' outputs [T, H, V] of the last T of the S tokens in latent and k_rope."""
    heads = config.num_attention_heads
    unfolded = kv_b_proj(latent).reshape(len(latent), heads, -1)  # (S, H, N + V)
    k_nope = unfolded[..., : config.qk_nope_head_dim]
    v = unfolded[..., config.qk_nope_head_dim :]
    k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, heads, -1)), dim=-1)  # (S, H, N + R)
    q = torch.cat((q_nope, q_rope), dim=-1)  # (T, H, N + R)
    wide = arithmetic(q.dtype)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    return _causal(q, k, v, config.softmax_scale)


def absorbed(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_proj: Linear,
    config: DeepseekV3Config,
) -> torch.Tensor:
    """Return what `direct` returns, with keys and values left in the latent space."""
    wide = arithmetic(q_nope.dtype)
    halves = kv_b_proj.dequantized(q_nope.dtype).to(wide)
    halves = halves.reshape(config.num_attention_heads, -1, config.kv_lora_rank)  # (H, N + V, C)
    w_k, w_v = halves[:, : config.qk_nope_head_dim], halves[:, config.qk_nope_head_dim :]
    q_latent = torch.einsum("thn,hnc->thc", q_nope.to(wide), w_k)
    q = torch.cat((q_latent, q_rope.to(wide)), dim=-1)  # (T, H, C + R)
    k = torch.cat((latent, k_rope), dim=-1).to(wide).unsqueeze(1)  # (S, 1, C + R)
    out_latent = _causal(q, k, latent.to(wide).unsqueeze(1), config.softmax_scale)
    return torch.einsum("thc,hvc->thv", out_latent, w_v)


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """Return softmax(q k^T) v, [T, H, V]; query t is token S - T + t and sees no later token.

    k [S, H, *] and v [S, H, *] have all heads, or one that all share.
    """
    tokens, keys = q.shape[0], k.shape[0]
    rows = max(1, SCORES_AT_ONCE // (q.shape[1] * keys))
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)  # heads first
    token = torch.arange(keys, device=q.device)
    outputs = []
    for start in range(0, tokens, rows):
        scores = q[:, start : start + rows] @ k.transpose(1, 2) * softmax_scale  # (H, rows, S)
        own = token[keys - tokens + start :][: scores.shape[1]].unsqueeze(1)
        scores = scores.masked_fill(token > own, float("-inf"))
        outputs.append(scores.softmax(dim=-1) @ v)
    return torch.cat(outputs, dim=1).transpose(0, 1)


def mla_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return the weighted latent [B, H, C] of one new query a sequence, in the dtype of q_latent.

    q_latent [B, H, C] and q_rope [B, H, R] attend to the first lengths[b] tokens of sequence b,
    their own among them. The tokens lie in latent_pages [P, tokens a page, C] and rope_pages
    [P, tokens a page, R]; page_table [B, pages a sequence] lists the pages of each in order.
    Computed in float64, rounded once. A sequence of no tokens gives zeros.
    """
    page = latent_pages.shape[1]
    outputs = []
    for b, length in enumerate(lengths.tolist()):
        pages = page_table[b, : -(-length // page)].long()
        latent = latent_pages[pages].flatten(0, 1)[:length].double()  # (S, C)
        k_rope = rope_pages[pages].flatten(0, 1)[:length].double()  # (S, R)
        scores = q_latent[b].double() @ latent.T + q_rope[b].double() @ k_rope.T  # (H, S)
        outputs.append((scores * scale).softmax(dim=-1) @ latent)
    return torch.stack(outputs).to(q_latent.dtype)
