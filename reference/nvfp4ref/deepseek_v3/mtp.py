"""Multi-token prediction: the layer that guesses the token after the next.

T tokens, packed from several sequences; D = hidden_size. Row i of a sequence has seen tokens up to
i, is given token i + 1, and predicts token i + 2.

Contract:
    x       eh_proj([enorm(embed(token i + 1)); hnorm(h_i)]), h_i the trunk's state after its final
            norm, as vLLM and SGLang pass it on
    block   a decoder layer with experts, causal over the rows, row i at position i
    logits  shared_head.head(shared_head.norm(block(x)))

No embedding is zeroed at position 0, as vLLM does. Source: DeepSeek-V3 technical report, 2.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nvfp4ref.deepseek_v3.attention import AttentionForm
from nvfp4ref.deepseek_v3.cache import LatentCache
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import Linear
from nvfp4ref.deepseek_v3.model import DecoderLayerWeights, decoder_layer
from nvfp4ref.deepseek_v3.moe import Record, ignore
from nvfp4ref.deepseek_v3.norm import rms_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedHeadWeights:
    """`shared_head` of an MTP layer; its head holds the same values as the trunk's."""

    norm: torch.Tensor
    head: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpWeights:
    """`model.layers.N` for N from num_hidden_layers on."""

    embed_tokens: torch.Tensor
    enorm: torch.Tensor
    hnorm: torch.Tensor
    eh_proj: Linear
    block: DecoderLayerWeights
    shared_head: SharedHeadWeights


def mtp(
    hidden: torch.Tensor,
    next_tokens: torch.Tensor,
    caches: Sequence[LatentCache],
    lengths: Sequence[int],
    weights: MtpWeights,
    config: DeepseekV3Config,
    *,
    form: AttentionForm = AttentionForm.DIRECT,
    record: Record = ignore,
) -> tuple[torch.Tensor, list[LatentCache]]:
    """Return logits [T, vocabulary] of the token after the next, and the extended caches.

    `hidden` [T, D] is the trunk's state after its final norm, `next_tokens` [T] the tokens that
    follow.
    """
    embedded = weights.embed_tokens[next_tokens].to(hidden.dtype)
    halves = (
        rms_norm(embedded, weights.enorm, config.rms_norm_eps),
        rms_norm(hidden, weights.hnorm, config.rms_norm_eps),
    )
    x = weights.eh_proj(torch.cat(halves, dim=-1))
    record("eh_proj", x)
    x, caches = decoder_layer(x, caches, lengths, weights.block, config, form=form, record=record)
    normed = rms_norm(x, weights.shared_head.norm, config.rms_norm_eps)
    return weights.shared_head.head(normed), list(caches)
