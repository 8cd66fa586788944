"""The tensors that a config.json and a declared quantisation promise.

For DeepseekV3ForCausalLM (also the Kimi-K2 models that use it) and DeepseekV32ForCausalLM, whose
attention has an indexer. Layer numbers run on into the MTP layers. Which linear is stored how is
`QuantConfig.algo_of`'s answer for it, so that every recipe follows from its exclude patterns.

    hidden = hidden_size, heads = num_attention_heads, qk = qk_nope_head_dim + qk_rope_head_dim
    linear weights are [out, in]

Sources: modeling_deepseek.py of deepseek-ai/DeepSeek-V3; README_WEIGHTS.md there for the MTP layer
and the FP8 scales; inference/model.py of deepseek-ai/DeepSeek-V3.2-Exp for the indexer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nvfp4check.checkpoint.architecture import Dimensions, read_dimensions
from nvfp4check.checkpoint.quant_config import QuantConfig
from nvfp4check.checkpoint.stored_linear import ExpectedTensor, UnknownAlgorithmError, stored_linear

__all__ = ["Expected", "ExpectedTensor", "expected_tensors", "supports"]

_INDEXED_ATTENTION = "DeepseekV32ForCausalLM"
_ARCHITECTURES = ("DeepseekV3ForCausalLM", _INDEXED_ATTENTION)

#: A linear of the model: its module's name, [out, in].
_Linear = tuple[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Expected:
    """What a checkpoint of this configuration holds.

    `linears` are all that a recipe may quantise, by module name. Where `problems` says that the
    configuration is not usable, there are no tensors.
    """

    tensors: Mapping[str, ExpectedTensor] = field(default_factory=dict)
    linears: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    #: Layer numbers of the MTP layers, which follow the model's own.
    mtp_layers: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def required(self) -> int:
        """How many tensors a complete checkpoint has at least."""
        return sum(not tensor.optional for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the required tensors, each in its usual dtype."""
        return sum(tensor.nbytes for tensor in self.tensors.values() if not tensor.optional)


def supports(architecture: str | None) -> bool:
    """Whether there is a map of expected tensors for an architecture."""
    return architecture in _ARCHITECTURES


def expected_tensors(config: Mapping[str, object], quantization: QuantConfig) -> Expected:
    """List the tensors of a checkpoint; the config is untrusted, and its flaws are `problems`."""
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if architecture not in _ARCHITECTURES:
        return Expected(problems=(f"no map of tensors for architecture {architecture!r}",))
    if quantization.producer is not None and not quantization.understood:
        method = quantization.producer
        return Expected(problems=(f"no map of tensors for quantisation method {method!r}",))
    dimensions, problems = read_dimensions(config, indexer=architecture == _INDEXED_ATTENTION)
    if dimensions is None:
        return Expected(problems=tuple(problems))
    try:
        return _Builder(dimensions, quantization).build()
    except UnknownAlgorithmError as error:
        return Expected(problems=(str(error),))


class _Builder:
    """One pass over the layers, gathering tensors."""

    def __init__(self, dimensions: Dimensions, quantization: QuantConfig) -> None:
        self.d = dimensions
        self.quantization = quantization
        self.tensors: dict[str, ExpectedTensor] = {}
        self.linears: dict[str, tuple[int, int]] = {}
        self.plain = (dimensions.dtype, "F32") if dimensions.dtype != "F32" else ("F32",)

    def build(self) -> Expected:
        d = self.d
        self._tensor("model.embed_tokens.weight", (d.vocab, d.hidden))
        self._tensor("model.norm.weight", (d.hidden,))
        self._output_head("lm_head", optional=d.tied_head)
        mtp_layers = tuple(range(d.layers, d.layers + d.mtp_layers))
        for layer in range(d.layers):
            self._layer(f"model.layers.{layer}", moe=d.is_moe(layer))
        for layer in mtp_layers:
            self._layer(f"model.layers.{layer}", moe=d.is_moe(layer))
            self._mtp(f"model.layers.{layer}")
        return Expected(self.tensors, self.linears, mtp_layers)

    def _tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        dtypes: tuple[str, ...] | None = None,
        optional: bool = False,
    ) -> None:
        self.tensors[name] = ExpectedTensor(name, dtypes or self.plain, shape, optional)

    def _linear(self, module: str, shape: tuple[int, int]) -> None:
        """Add a linear in the form its algorithm stores it."""
        self.linears[module] = shape
        for tensor in stored_linear(module, shape, self.quantization, self.plain):
            self.tensors[tensor.name] = tensor

    def _unquantised_in_fp8(self, module: str, shape: tuple[int, int]) -> None:
        """Add a linear that DeepSeek's own FP8 leaves alone without listing it."""
        if self.quantization.producer == "deepseek-fp8":
            self._tensor(f"{module}.weight", shape)
        else:
            self._linear(module, shape)

    def _output_head(self, module: str, optional: bool = False) -> None:
        if optional:
            self._tensor(f"{module}.weight", (self.d.vocab, self.d.hidden), optional=True)
        else:
            self._unquantised_in_fp8(module, (self.d.vocab, self.d.hidden))

    def _layer(self, layer: str, moe: bool) -> None:
        hidden = (self.d.hidden,)
        self._tensor(f"{layer}.input_layernorm.weight", hidden)
        self._tensor(f"{layer}.post_attention_layernorm.weight", hidden)
        self._attention(f"{layer}.self_attn")
        if moe:
            self._experts(f"{layer}.mlp")
        else:
            self._mlp(f"{layer}.mlp", self.d.intermediate)

    def _attention(self, attention: str) -> None:
        d = self.d
        if d.q_lora:
            self._tensor(f"{attention}.q_a_layernorm.weight", (d.q_lora,))
        self._tensor(f"{attention}.kv_a_layernorm.weight", (d.kv_lora,))
        for name, shape in _attention_linears(d):
            self._linear(f"{attention}.{name}", shape)
            if d.attention_bias and name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
                self._tensor(f"{attention}.{name}.bias", shape[:1])
        if d.indexer is not None and d.q_lora is not None:
            self._indexer(f"{attention}.indexer", d.indexer, d.q_lora)
        self._tensor(
            f"{attention}.rotary_emb.inv_freq", (d.qk_rope // 2,), ("F32", d.dtype), optional=True
        )
        if self.quantization.producer is not None:
            for name in ("k_proj.k_scale", "v_proj.v_scale", "k_scale", "v_scale", "q_scale"):
                self._tensor(f"{attention}.{name}", (), ("F32", d.dtype), optional=True)

    def _indexer(self, indexer: str, heads_and_size: tuple[int, int], q_lora: int) -> None:
        heads, size = heads_and_size
        self._linear(f"{indexer}.wq_b", (heads * size, q_lora))
        self._linear(f"{indexer}.wk", (size, self.d.hidden))
        self._unquantised_in_fp8(f"{indexer}.weights_proj", (heads, self.d.hidden))
        self._tensor(f"{indexer}.k_norm.weight", (size,))
        self._tensor(f"{indexer}.k_norm.bias", (size,))

    def _mlp(self, mlp: str, intermediate: int) -> None:
        for name in ("gate_proj", "up_proj"):
            self._linear(f"{mlp}.{name}", (intermediate, self.d.hidden))
        self._linear(f"{mlp}.down_proj", (self.d.hidden, intermediate))

    def _experts(self, mlp: str) -> None:
        d = self.d
        self._tensor(f"{mlp}.gate.weight", (d.experts, d.hidden))
        if d.router_bias:
            self._tensor(f"{mlp}.gate.e_score_correction_bias", (d.experts,), ("F32",))
        for expert in range(d.experts):
            self._mlp(f"{mlp}.experts.{expert}", d.moe_intermediate)
        if d.shared_experts:
            self._mlp(f"{mlp}.shared_experts", d.moe_intermediate * d.shared_experts)

    def _mtp(self, layer: str) -> None:
        d = self.d
        for name in ("enorm", "hnorm", "shared_head.norm"):
            self._tensor(f"{layer}.{name}.weight", (d.hidden,))
        self._unquantised_in_fp8(f"{layer}.eh_proj", (d.hidden, 2 * d.hidden))
        self._tensor(f"{layer}.embed_tokens.weight", (d.vocab, d.hidden))
        self._output_head(f"{layer}.shared_head.head")


def _attention_linears(d: Dimensions) -> Iterator[_Linear]:
    queries = d.heads * (d.qk_nope + d.qk_rope)
    if d.q_lora:
        yield "q_a_proj", (d.q_lora, d.hidden)
        yield "q_b_proj", (queries, d.q_lora)
    else:
        yield "q_proj", (queries, d.hidden)
    yield "kv_a_proj_with_mqa", (d.kv_lora + d.qk_rope, d.hidden)
    yield "kv_b_proj", (d.heads * (d.qk_nope + d.v_head), d.kv_lora)
    yield "o_proj", (d.hidden, d.heads * d.v_head)
