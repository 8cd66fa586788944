"""The fields of config.json that the arithmetic of DeepSeek-V3 depends on, by their own names.

Contract:
    softmax scale    (qk_nope_head_dim + qk_rope_head_dim)**-0.5, times m(mscale_all_dim)**2 under
                     YaRN with mscale_all_dim, where m(s) = 0.1 * s * ln(factor) + 1
    rotary factor    m(mscale) / m(mscale_all_dim) on cosine and sine; m(1) where either is absent

Both are 192**-0.5 * 1.3689**2 and 1.0 in the published model, whose two mscales are 1.0.
Sources: DeepSeek-V3's config.json, modeling_deepseek.py and inference/model.py.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any, Self


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return YaRN's m: 0.1 * mscale * ln(factor) + 1, and 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """`rope_scaling` of type yarn."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @property
    def rotary_factor(self) -> float:
        """What cosine and sine are multiplied with."""
        if self.mscale and self.mscale_all_dim:
            numerator = yarn_mscale(self.factor, self.mscale)
            return numerator / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)

    @property
    def softmax_factor(self) -> float:
        """What the softmax scale is multiplied with."""
        if not self.mscale_all_dim:
            return 1.0
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryConfig:
    """The rotary embedding: its width, base and stretching."""

    qk_rope_head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: YarnConfig | None = None

    @classmethod
    def of(cls, source: "RotaryConfig | Mapping[str, Any] | object") -> Self:
        """Return the rotary part of a config object, or of a mapping of its fields.

        transformers 5 keeps theta and the scaling in one `rope_parameters`; both forms are read.

        Raises:
            ValueError: A field is missing, or the scaling is of a type other than yarn.
        """
        if isinstance(source, cls):
            return source
        found = dict(source) if isinstance(source, Mapping) else _attributes(source)
        if found.get("qk_rope_head_dim") is None:
            raise ValueError("the rotary configuration lacks qk_rope_head_dim")
        scaling = found.get("rope_parameters") or found.get("rope_scaling")
        if isinstance(scaling, Mapping):
            theta = scaling.get("rope_theta", found.get("rope_theta", 10000.0))
        else:
            theta = found.get("rope_theta", 10000.0)
        width = found["qk_rope_head_dim"]
        if type(width) is not int or width < 2 or width % 2:
            raise ValueError(f"qk_rope_head_dim is {width!r}, expected an even number")
        _require_number("rope_theta", theta, least=1.0)
        return cls(
            qk_rope_head_dim=width,
            rope_theta=float(theta),
            rope_scaling=scaling if isinstance(scaling, YarnConfig) else _yarn(scaling),
        )


def _attributes(source: object) -> dict[str, Any]:
    names = ("qk_rope_head_dim", "rope_theta", "rope_scaling", "rope_parameters")
    return {name: getattr(source, name) for name in names if hasattr(source, name)}


def _yarn(scaling: Mapping[str, Any] | None) -> YarnConfig | None:
    if not scaling:
        return None
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rope_scaling has type {kind!r}; DeepSeek-V3 has yarn, or none")
    missing = [
        name for name in ("factor", "original_max_position_embeddings") if name not in scaling
    ]
    if missing:
        raise ValueError(f"rope_scaling of type yarn lacks {', '.join(missing)}")
    known = {field.name for field in fields(YarnConfig)}
    found = {name: value for name, value in scaling.items() if name in known}
    for name, value in found.items():
        if value is not None or not name.startswith("mscale"):
            _require_number(f"rope_scaling.{name}", value)
    return YarnConfig(**found)


def _require_number(name: str, value: object, least: float = 0.0) -> None:
    """Refuse what is no finite number above `least`.

    Raises:
        ValueError: So it is.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least < float(value) < float("inf"):  # type: ignore[arg-type]
        raise ValueError(f"config.json has {name} {value!r}, expected a number above {least:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV3Config:
    """config.json of a DeepseekV3ForCausalLM."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    #: None: queries come from one `q_proj`, as in DeepSeek-V2-Lite.
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    rotary: RotaryConfig
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    first_k_dense_replace: int
    moe_layer_freq: int
    num_nextn_predict_layers: int
    rms_norm_eps: float

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Return the fields of a parsed config.json.

        Raises:
            ValueError: A field is missing, or asks for arithmetic that DeepSeek-V3 does not have.
        """
        defaults: dict[str, Any] = {
            "q_lora_rank": None,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "moe_layer_freq": 1,
            "num_nextn_predict_layers": 0,
            "rms_norm_eps": 1e-6,
        }
        names = [field.name for field in fields(cls) if field.name != "rotary"]
        found = {**defaults, **{name: config[name] for name in names if name in config}}
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        for name, only in _ONLY.items():
            if config.get(name, only) != only:
                raise ValueError(f"config.json has {name} {config[name]!r}; supported is {only!r}")
        for field in fields(cls):
            _check_field(field, found)
        result = cls(rotary=RotaryConfig.of(config), **found)
        result._check_groups()
        return result

    def _check_groups(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"config.json: {self.n_routed_experts} experts do not divide into "
                f"{self.n_group} groups"
            )
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if not 1 <= self.topk_group <= self.n_group or self.num_experts_per_tok > reachable:
            raise ValueError(
                f"config.json: {self.num_experts_per_tok} experts a token out of "
                f"{self.topk_group} of {self.n_group} groups, which hold {reachable}"
            )

    @property
    def qk_rope_head_dim(self) -> int:
        """Width of the part of a head that is rotated."""
        return self.rotary.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied with before the softmax."""
        scaling = self.rotary.rope_scaling
        return float(self.qk_head_dim**-0.5 * (1.0 if scaling is None else scaling.softmax_factor))

    def is_moe(self, layer: int) -> bool:
        """Whether this layer has experts; the MTP layers all have."""
        if layer >= self.num_hidden_layers:
            return True
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


def _check_field(field: "Field[Any]", found: Mapping[str, Any]) -> None:
    """Refuse a value that is not of the field's type, or below what makes sense.

    Raises:
        ValueError: So it is.
    """
    name = field.name
    if name == "rotary" or (name == "q_lora_rank" and found[name] is None):
        return
    value = found[name]
    if field.type is bool:
        if not isinstance(value, bool):
            raise ValueError(f"config.json has {name} {value!r}, expected true or false")
    elif field.type is float:
        _require_number(name, value)
    elif type(value) is not int or value < _least(name):
        raise ValueError(
            f"config.json has {name} {value!r}, expected a whole number from {_least(name)} on"
        )


def _least(name: str) -> int:
    return 0 if name in _MAY_BE_ZERO else 1


_MAY_BE_ZERO = ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")

#: Fields that have one supported value where they are present.
_ONLY = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
