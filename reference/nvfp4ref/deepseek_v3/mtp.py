"""Multi-token prediction: layers that guess tokens beyond the next.

T rows, packed from several sequences; D = hidden_size. Row i of a sequence has seen tokens up to
i, is given token i + 1, and predicts token i + 2. Of several layers, each is given the token after
that of the layer before it, and so predicts one further.

Contract:
    x       eh_proj([enorm(embed(token i + 1)); hnorm(h_i)]), h_i the trunk's state after its final
            norm; a further layer takes the state of the one before, after that one's norm, as vLLM
            and SGLang pass it on
    block   a decoder layer with experts, causal over the rows, row i at position i
    logits  shared_head.head(shared_head.norm(block(x)))

vLLM and SGLang put zeros in the place of the embedding at position 0; nothing is zeroed here.
Source: DeepSeek-V3 technical report, 2.2.
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
class MtpLayerWeights:
    """`model.layers.N` for N from num_hidden_layers on, without the vocabulary at both ends."""

    enorm: torch.Tensor
    hnorm: torch.Tensor
    eh_proj: Linear
    block: DecoderLayerWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpWeights:
    """A whole `model.layers.N`; embed_tokens and head hold the same values as the trunk's."""

    embed_tokens: torch.Tensor
    layer: MtpLayerWeights
    #: `shared_head.norm`
    norm: torch.Tensor
    #: `shared_head.head`
    head: Linear


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
    x, caches = mtp_layer(
        hidden, embedded, caches, lengths, weights.layer, config, form=form, record=record
    )
    return weights.head(rms_norm(x, weights.norm, config.rms_norm_eps)), caches


def mtp_layer(
    hidden: torch.Tensor,
    embedded: torch.Tensor,
    caches: Sequence[LatentCache],
    lengths: Sequence[int],
    weights: MtpLayerWeights,
    config: DeepseekV3Config,
    *,
    form: AttentionForm = AttentionForm.DIRECT,
    forced_experts: torch.Tensor | None = None,
    record: Record = ignore,
) -> tuple[torch.Tensor, list[LatentCache]]:
    """Return the state [T, D] before the head's norm, and the extended caches.

    `hidden` [T, D] is the state before this layer after its norm, `embedded` [T, D] the embedding
    of the tokens that follow.
    """
    halves = (
        rms_norm(embedded, weights.enorm, config.rms_norm_eps),
        rms_norm(hidden, weights.hnorm, config.rms_norm_eps),
    )
    x = weights.eh_proj(torch.cat(halves, dim=-1))
    record("eh_proj", x)
    return decoder_layer(
        *(x, caches, lengths, weights.block, config),
        form=form,
        forced_experts=forced_experts,
        record=record,
    )
