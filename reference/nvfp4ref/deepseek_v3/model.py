"""The whole model: embedding, decoder layers, final norm and head.

T tokens, packed from several sequences; D = hidden_size.

Contract:
    layer   x = x + self_attn(input_layernorm(x)); x = x + mlp(post_attention_layernorm(x)),
            each sum rounded to the dtype of x
    head    lm_head(norm(x)), in the dtype of x
    dtype   that of the embedded tokens is that of all activations: float64, float32 or bfloat16

Points that are recorded, one row a token: attn_input, attn_output, mlp_input, mlp_output, hidden
(the sum after the layer), and in layers with experts router_scores (sigmoid + bias, what the
choice is made by), router_experts, router_weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nvfp4ref.deepseek_v3.attention import AttentionForm, AttentionWeights, attention
from nvfp4ref.deepseek_v3.cache import CacheFormat, LatentCache
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import Linear
from nvfp4ref.deepseek_v3.moe import MlpWeights, MoeWeights, Record, ignore, mlp, moe
from nvfp4ref.deepseek_v3.norm import rms_norm

#: Hears of intermediate results: layer, point, value.
LayerRecord = Callable[[int, str, torch.Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayerWeights:
    """`model.layers.N`."""

    input_layernorm: torch.Tensor
    self_attn: AttentionWeights
    post_attention_layernorm: torch.Tensor
    mlp: MlpWeights | MoeWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """A DeepseekV3ForCausalLM without its MTP layers."""

    #: [vocabulary, D]
    embed_tokens: torch.Tensor
    layers: Sequence[DecoderLayerWeights]
    norm: torch.Tensor
    lm_head: Linear


def decoder_layer(
    x: torch.Tensor,
    caches: Sequence[LatentCache],
    lengths: Sequence[int],
    weights: DecoderLayerWeights,
    config: DeepseekV3Config,
    *,
    form: AttentionForm = AttentionForm.DIRECT,
    forced_experts: torch.Tensor | None = None,
    record: Record = ignore,
) -> tuple[torch.Tensor, list[LatentCache]]:
    """Return x [T, D] after the layer, and the caches with the new tokens."""
    attn_input = rms_norm(x, weights.input_layernorm, config.rms_norm_eps)
    record("attn_input", attn_input)
    attn_output, caches = attention(attn_input, caches, lengths, weights.self_attn, config, form)
    record("attn_output", attn_output)
    x = x + attn_output

    mlp_input = rms_norm(x, weights.post_attention_layernorm, config.rms_norm_eps)
    record("mlp_input", mlp_input)
    if isinstance(weights.mlp, MoeWeights):
        mlp_output = moe(mlp_input, weights.mlp, config, forced_experts, record)
    else:
        mlp_output = mlp(mlp_input, weights.mlp)
    record("mlp_output", mlp_output)
    x = x + mlp_output
    record("hidden", x)
    return x, list(caches)


def empty_caches(
    sequences: int,
    config: DeepseekV3Config,
    dtype: torch.dtype,
    format: CacheFormat = CacheFormat.COMPUTED,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> list[LatentCache]:
    """Return the caches of one layer before any token."""
    empty = LatentCache.empty(
        config.kv_lora_rank, config.qk_rope_head_dim, dtype, format, scale, device
    )
    return [empty] * sequences


def forward(
    tokens: Sequence[torch.Tensor],
    weights: ModelWeights,
    config: DeepseekV3Config,
    dtype: torch.dtype = torch.float32,
    *,
    caches: Sequence[Sequence[LatentCache]] | None = None,
    form: AttentionForm = AttentionForm.DIRECT,
    record: LayerRecord | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[list[LatentCache]]]:
    """Return logits [t, vocabulary] and normed hidden [t, D] of each sequence, and the caches.

    `tokens` holds the new tokens of each sequence, int64 [t]: all of a prompt (prefill), or one
    (decode) with the caches of the call before, one list a layer with one cache a sequence.
    """
    lengths = [len(sequence) for sequence in tokens]
    if caches is None:
        device = weights.embed_tokens.device
        caches = [empty_caches(len(tokens), config, dtype, device=device) for _ in weights.layers]
    x = weights.embed_tokens[torch.cat(list(tokens))].to(dtype)
    grown = []
    for layer, (its_weights, its_caches) in enumerate(zip(weights.layers, caches, strict=True)):
        x, its_grown = decoder_layer(
            x,
            its_caches,
            lengths,
            its_weights,
            config,
            form=form,
            record=partial(record, layer) if record is not None else ignore,
        )
        grown.append(its_grown)
    hidden = rms_norm(x, weights.norm, config.rms_norm_eps)
    logits = weights.lm_head(hidden)
    return list(torch.split(logits, lengths)), list(torch.split(hidden, lengths)), grown
