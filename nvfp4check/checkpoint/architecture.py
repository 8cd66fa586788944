"""The sizes that config.json gives, read without trusting them.

A size that is missing, no whole number, negative or absurd is a problem with its name; the model
is then not described at all. What would make more tensors than any model has is refused before a
name is made.
"""

from collections.abc import Mapping
from dataclasses import dataclass

#: Larger than any dimension of any model; a product of two still fits 64 bits.
_MAX_SIZE = 1 << 30
#: Kimi-K2 has 280,000 in NVFP4.
MAX_TENSORS = 3_000_000
_TENSORS_A_LINEAR = 4
#: Rough upper count of what a layer has beside its experts.
_TENSORS_A_LAYER = 64

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """The sizes of a DeepSeek-V3 model."""

    hidden: int
    intermediate: int
    moe_intermediate: int
    layers: int
    mtp_layers: int
    heads: int
    q_lora: int | None
    kv_lora: int
    qk_nope: int
    qk_rope: int
    v_head: int
    vocab: int
    #: Zero where no layer is a mixture of experts.
    experts: int
    shared_experts: int
    first_dense: int
    moe_every: int
    router_bias: bool
    attention_bias: bool
    tied_head: bool
    dtype: str
    #: Heads and head size of DeepSeek-V3.2's indexer.
    indexer: tuple[int, int] | None

    def is_moe(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts; an MTP layer counts on from the last."""
        return self.experts > 0 and layer >= self.first_dense and layer % self.moe_every == 0


class _Sizes:
    """Typed reading of a config that notes every problem."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self.config = config
        self.problems: list[str] = []

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.config.get(name)
        if value is None and default is not None:
            return default
        if type(value) is int and least <= value <= _MAX_SIZE:
            return value
        found = "missing" if value is None else repr(value)
        found = found if len(found) <= 40 else found[:37] + "..."
        self.problems.append(
            f"config.json: {name} is {found}, expected a whole number from {least} to {_MAX_SIZE}"
        )
        return least

    def optional_size(self, name: str) -> int | None:
        return None if self.config.get(name) is None else self.size(name)

    def flag(self, name: str) -> bool:
        return self.config.get(name) is True

    def dtype(self) -> str:
        value = self.config.get("torch_dtype", self.config.get("dtype")) or "bfloat16"
        if isinstance(value, str) and value in _DTYPES:
            return _DTYPES[value]
        self.problems.append(
            f"config.json: torch_dtype is {str(value)[:40]!r}, expected one of {', '.join(_DTYPES)}"
        )
        return "BF16"


def read_dimensions(
    config: Mapping[str, object], *, indexer: bool
) -> tuple[Dimensions | None, list[str]]:
    """Read the sizes of a DeepSeek-V3 model; None, with the reasons, where they cannot be used."""
    sizes = _Sizes(config)
    experts = sizes.size("n_routed_experts", default=0, least=0)
    q_lora = sizes.optional_size("q_lora_rank")
    method = config.get("topk_method")
    hidden = sizes.size("hidden_size")
    intermediate = sizes.size("intermediate_size")
    heads = (sizes.size("index_n_heads"), sizes.size("index_head_dim")) if indexer else None
    if indexer and q_lora is None:
        sizes.problems.append("config.json: q_lora_rank is missing, and the indexer needs it")
    dimensions = Dimensions(
        hidden=hidden,
        intermediate=intermediate,
        moe_intermediate=sizes.size("moe_intermediate_size") if experts else intermediate,
        layers=sizes.size("num_hidden_layers"),
        mtp_layers=sizes.size("num_nextn_predict_layers", default=0, least=0),
        heads=sizes.size("num_attention_heads"),
        q_lora=q_lora,
        kv_lora=sizes.size("kv_lora_rank"),
        qk_nope=sizes.size("qk_nope_head_dim"),
        qk_rope=sizes.size("qk_rope_head_dim"),
        v_head=sizes.size("v_head_dim"),
        vocab=sizes.size("vocab_size"),
        experts=experts,
        shared_experts=sizes.size("n_shared_experts", default=0, least=0),
        first_dense=sizes.size("first_k_dense_replace", default=0, least=0),
        moe_every=sizes.size("moe_layer_freq", default=1),
        # transformers' own class drops topk_method and always has the bias.
        router_bias=method in (None, "noaux_tc"),
        attention_bias=sizes.flag("attention_bias"),
        tied_head=sizes.flag("tie_word_embeddings"),
        dtype=sizes.dtype(),
        indexer=heads,
    )
    layers = dimensions.layers + dimensions.mtp_layers
    count = layers * (3 * experts * _TENSORS_A_LINEAR + _TENSORS_A_LAYER)
    if count > MAX_TENSORS:
        sizes.problems.append(
            f"config.json: {layers:,} layers of {experts:,} experts would make up to {count:,} "
            f"tensors, expected at most {MAX_TENSORS:,}"
        )
    return (None if sizes.problems else dimensions), sizes.problems
