"""From the names of a checkpoint to the weights of the reference.

Whoever reads a checkpoint offers a `WeightSource`; the functions below know which names belong to
which part. `StateDict` is the plain source: every tensor in memory, formats told by their names.

Contract of the formats, by the tensors beside `<module>.weight`:
    weight_scale_2 (ModelOpt)             NVFP4, both scales multiply
    weight_packed, weight_global_scale    NVFP4 of compressed-tensors, both scales divide: the
                                          multiplier is their float32 reciprocal
    weight_scale_inv                      DeepSeek's FP8 in tiles of 128 x 128, it multiplies
    weight_scale alone                    FP8 with one scale, or one for each row; it multiplies.
                                          With input_scale the input is quantised by that, else as
                                          the source is told
    nothing                               BF16, FP16 or float32
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from nvfp4ref.deepseek_v3.attention import AttentionWeights
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import (
    Fp8BlockLinear,
    Fp8Linear,
    Linear,
    LinearMode,
    Nvfp4Linear,
    PlainLinear,
)
from nvfp4ref.deepseek_v3.model import DecoderLayerWeights, ModelWeights
from nvfp4ref.deepseek_v3.moe import Experts, GateWeights, MlpWeights, MoeWeights
from nvfp4ref.deepseek_v3.mtp import MtpLayerWeights, MtpWeights
from nvfp4ref.fp8 import Fp8Activations


class WeightSource(Protocol):
    """Gives weights by their checkpoint names."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as stored."""
        ...

    def linear(self, module: str) -> Linear:
        """Return the weight of a linear layer, in whatever format it is stored."""
        ...

    def experts(self, prefix: str) -> Experts:
        """Return the experts `<prefix>.<index>.gate_proj` and so on."""
        ...


def model_weights(source: WeightSource, config: DeepseekV3Config) -> ModelWeights:
    """Return the trunk of the model."""
    return ModelWeights(
        embed_tokens=source.tensor("model.embed_tokens.weight"),
        layers=[layer_weights(source, i, config) for i in range(config.num_hidden_layers)],
        norm=source.tensor("model.norm.weight"),
        lm_head=source.linear("lm_head"),
    )


def layer_weights(
    source: WeightSource, layer: int, config: DeepseekV3Config
) -> DecoderLayerWeights:
    """Return one decoder layer."""
    prefix = f"model.layers.{layer}"
    return DecoderLayerWeights(
        input_layernorm=source.tensor(f"{prefix}.input_layernorm.weight"),
        self_attn=attention_weights(source, f"{prefix}.self_attn", config),
        post_attention_layernorm=source.tensor(f"{prefix}.post_attention_layernorm.weight"),
        mlp=moe_weights(source, f"{prefix}.mlp", config)
        if config.is_moe(layer)
        else mlp_weights(source, f"{prefix}.mlp"),
    )


def attention_weights(
    source: WeightSource, prefix: str, config: DeepseekV3Config
) -> AttentionWeights:
    """Return `self_attn` of a layer."""
    compressed = config.q_lora_rank is not None
    return AttentionWeights(
        q_proj=None if compressed else source.linear(f"{prefix}.q_proj"),
        q_a_proj=source.linear(f"{prefix}.q_a_proj") if compressed else None,
        q_a_layernorm=source.tensor(f"{prefix}.q_a_layernorm.weight") if compressed else None,
        q_b_proj=source.linear(f"{prefix}.q_b_proj") if compressed else None,
        kv_a_proj_with_mqa=source.linear(f"{prefix}.kv_a_proj_with_mqa"),
        kv_a_layernorm=source.tensor(f"{prefix}.kv_a_layernorm.weight"),
        kv_b_proj=source.linear(f"{prefix}.kv_b_proj"),
        o_proj=source.linear(f"{prefix}.o_proj"),
    )


def mlp_weights(source: WeightSource, prefix: str) -> MlpWeights:
    """Return a dense MLP or one expert."""
    return MlpWeights(
        gate_proj=source.linear(f"{prefix}.gate_proj"),
        up_proj=source.linear(f"{prefix}.up_proj"),
        down_proj=source.linear(f"{prefix}.down_proj"),
    )


def moe_weights(source: WeightSource, prefix: str, config: DeepseekV3Config) -> MoeWeights:
    """Return `mlp` of a layer with experts."""
    return MoeWeights(
        gate=GateWeights(
            weight=source.tensor(f"{prefix}.gate.weight"),
            e_score_correction_bias=source.tensor(f"{prefix}.gate.e_score_correction_bias"),
        ),
        experts=source.experts(f"{prefix}.experts"),
        shared_experts=mlp_weights(source, f"{prefix}.shared_experts")
        if config.n_shared_experts
        else None,
    )


def mtp_weights(source: WeightSource, layer: int, config: DeepseekV3Config) -> MtpWeights:
    """Return an MTP layer; `layer` counts on from the last decoder layer."""
    prefix = f"model.layers.{layer}"
    return MtpWeights(
        embed_tokens=source.tensor(f"{prefix}.embed_tokens.weight"),
        layer=mtp_layer_weights(source, layer, config),
        norm=source.tensor(f"{prefix}.shared_head.norm.weight"),
        head=source.linear(f"{prefix}.shared_head.head"),
    )


def mtp_layer_weights(
    source: WeightSource, layer: int, config: DeepseekV3Config
) -> MtpLayerWeights:
    """Return an MTP layer without its embedding and its head."""
    prefix = f"model.layers.{layer}"
    return MtpLayerWeights(
        enorm=source.tensor(f"{prefix}.enorm.weight"),
        hnorm=source.tensor(f"{prefix}.hnorm.weight"),
        eh_proj=source.linear(f"{prefix}.eh_proj"),
        block=layer_weights(source, layer, config),
    )


class StateDict:
    """A source over tensors in memory, by their checkpoint names."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        mode: LinearMode = LinearMode.STORED,
        power_of_two_scales: bool = False,
        fp8_activations: Fp8Activations = Fp8Activations.NONE,
    ) -> None:
        self._tensors = tensors
        self._mode = mode
        self._power_of_two_scales = power_of_two_scales
        #: Of FP8 weights that have no input scale.
        self._fp8_activations = fp8_activations

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as stored.

        Raises:
            ValueError: There is none of this name.
        """
        if name not in self._tensors:
            raise ValueError(f"no tensor {name} among {len(self._tensors)}")
        return self._tensors[name]

    def linear(self, module: str) -> Linear:
        """Return the weight of a linear layer, in the format its tensors tell.

        Raises:
            ValueError: A tensor is missing.
        """
        beside = {
            name: self._tensors[f"{module}.{name}"]
            for name in (
                "weight_packed",
                "weight_scale_2",
                "weight_scale_inv",
                "weight_global_scale",
                "input_scale",
                "input_global_scale",
                "pre_quant_scale",
            )
            if f"{module}.{name}" in self._tensors
        }
        if "weight_packed" in beside:
            return Nvfp4Linear(
                packed_codes=beside["weight_packed"],
                block_scales=self.tensor(f"{module}.weight_scale"),
                global_decode_scale=_reciprocal(self.tensor(f"{module}.weight_global_scale")),
                input_decode_scale=_reciprocal(beside["input_global_scale"])
                if "input_global_scale" in beside
                else None,
                input_encode_scale=_scalar(beside["input_global_scale"])
                if "input_global_scale" in beside
                else None,
                mode=self._mode,
            )
        weight = self.tensor(f"{module}.weight")
        if "weight_scale_2" in beside:
            return Nvfp4Linear(
                packed_codes=weight,
                block_scales=self.tensor(f"{module}.weight_scale"),
                global_decode_scale=_scalar(beside["weight_scale_2"]),
                input_decode_scale=_scalar(beside["input_scale"])
                if "input_scale" in beside
                else None,
                pre_quant_scale=beside.get("pre_quant_scale"),
                mode=self._mode,
            )
        if "weight_scale_inv" in beside:
            return Fp8BlockLinear(
                weight=weight,
                weight_scale_inv=beside["weight_scale_inv"],
                power_of_two_scales=self._power_of_two_scales,
                mode=self._mode,
            )
        if f"{module}.weight_scale" in self._tensors:
            static = "input_scale" in beside
            return Fp8Linear(
                weight=weight,
                weight_scale=self.tensor(f"{module}.weight_scale"),
                activations=Fp8Activations.STATIC if static else self._fp8_activations,
                input_scale=_scalar(beside["input_scale"]) if static else None,
                mode=self._mode,
            )
        return PlainLinear(weight)

    def experts(self, prefix: str) -> Experts:
        """Return the experts `<prefix>.<index>.gate_proj` and so on."""

        def weights_of(chosen: Sequence[int]) -> Iterator[MlpWeights]:
            for expert in chosen:
                yield mlp_weights(self, f"{prefix}.{expert}")

        return weights_of


def _scalar(scale: torch.Tensor) -> torch.Tensor:
    return scale.reshape(()).to(torch.float32)


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    return 1.0 / _scalar(scale)
