"""How large and how small the keys and values of a layer can be, by its weights alone.

Contract:
    normed    x = u * w, u of root mean square 1 at most (a norm's eps only lessens it), by
              `input_layernorm`, `kv_a_layernorm` or `k_norm` with weight w [d]
    linear    of a normed input: |y_j| <= sqrt(d) * |W_j o w| + |b_j| (Cauchy and Schwarz)
    latent    of a normed one itself: |c_i| <= sqrt(d) * |w_i|
    rotation  of pairs by RoPE: at most sqrt(2) times the largest, times YaRN's factor for cosine
              and sine, attention_factor or 1 + mscale ln(factor)/10, where that is more than 1
    most      the largest of these over all that one scale is for
    least     some element of every token's latent is at least 1/sqrt(mean(1 / w^2)): if all were
              smaller, the squares of c_i / w_i could not add up to d
    in between, whatever a producer calibrated on, an amax lies; but for `SLACK`, the roundings
    with which activations are computed
None where a layer is not of this form, or a weight is stored otherwise.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint

if TYPE_CHECKING:
    import torch

#: Norm, product, rotation and cast, each to bfloat16: four unit roundoffs of 2**-8.
SLACK = 4 * 2.0**-8

#: Architectures whose norms multiply by their weight as it stands, as far as they are known.
_PLAIN_NORMS = re.compile(
    r"(?:Deepseek|Kimi|Glm4Moe|GlmMoe|Llama|Mistral|Mixtral|Qwen2|Qwen3(?:Moe)?For)"
)
_ATTENTION = re.compile(r"(.*?\.self_attn)(?:\.|$)")
_WIDE = 1 << 22


@dataclass(frozen=True, slots=True)
class Reach:
    """What the largest magnitude of a layer's keys or values is at most, and at least."""

    most: float
    least: float


def reach_of(checkpoint: Checkpoint, scale: LogicalWeight, part: Part) -> Reach | None:
    """Bound what a scale of the key-value cache is for, None where nothing is known.

    Raises:
        StorageError: A weight cannot be read.
    """
    attention = _ATTENTION.match(f"{scale.module}.")
    if attention is None or not _PLAIN_NORMS.match(checkpoint.architecture or ""):
        return None
    layer = _Layer(checkpoint, attention[1])
    try:
        return layer.latent() if layer.is_latent else layer.heads(part)
    except ValueError:
        return None


class _Layer:
    """The weights around one attention."""

    def __init__(self, checkpoint: Checkpoint, attention: str) -> None:
        self._checkpoint = checkpoint
        self._weights = checkpoint.weights
        self._attention = attention
        self.is_latent = f"{attention}.kv_a_layernorm.weight" in self._weights

    def latent(self) -> Reach:
        """Bound the normed latent, and the rotated part of the key beside it."""
        norm = self._vector(f"{self._attention}.kv_a_layernorm.weight")
        size = norm.numel()
        reach = math.sqrt(size) * float(norm.abs().max())
        inverse = float((norm**-2).mean())
        least = 1 / math.sqrt(inverse) if math.isfinite(inverse) else 0.0
        rotated = self._linear("kv_a_proj_with_mqa", first=size) * self._rotation
        return Reach(max(reach, rotated), least)

    def heads(self, part: Part) -> Reach:
        """Bound the keys or the values of all heads."""
        if part is Part.V_SCALE:
            return Reach(self._linear("v_proj"), 0.0)
        name = f"{self._attention}.k_norm.weight"
        if name in self._weights:
            norm = self._vector(name)
            reach = math.sqrt(norm.numel()) * float(norm.abs().max())
        else:
            reach = self._linear("k_proj")
        return Reach(reach * self._rotation, 0.0)

    @property
    def _rotation(self) -> float:
        return math.sqrt(2) * max(map(_stretch, _scalings(self._checkpoint.config or {})))

    def _linear(self, leaf: str, first: int = 0) -> float:
        """Bound the outputs of a linear of the layer's normed input, from one row on."""
        weight = self._weights.get(f"{self._attention}.{leaf}.weight")
        if weight is None or len(weight.shape) != 2:
            raise ValueError(f"no {leaf}")
        norm = self._vector(f"{self._attention.rpartition('.')[0]}.input_layernorm.weight")
        rows, columns = weight.shape
        if norm.numel() != columns or first >= rows:
            raise ValueError(f"{leaf} has another shape")
        by = norm.double()
        scale = weight.parts.get(Part.PRE_QUANT_SCALE)
        if scale is not None:
            by = by * self._checkpoint.torch(scale).double()
        bias = self._weights.get(f"{self._attention}.{leaf}.bias")
        shift = 0.0 if bias is None else float(self._vector(bias.name).abs().max())
        most = 0.0
        step = max(1, _WIDE // columns // 128) * 128
        for start in range(first // 128 * 128, rows, step):
            values = self._rows(weight, start, min(start + step, rows)).double() * by
            if start < first:
                values = values[first - start :]
            most = max(most, float(values.norm(dim=1).max()))
        return math.sqrt(columns) * most + shift

    def _vector(self, name: str) -> "torch.Tensor":
        weight = self._weights.get(name)
        if weight is None or Part.PLAIN not in weight.parts or len(weight.shape) != 1:
            raise ValueError(f"no {name}")
        values = self._checkpoint.torch(weight.parts[Part.PLAIN]).double()
        if not values.numel() or not bool(values.isfinite().all()):
            raise ValueError(f"{name} is not finite")
        return values

    def _rows(self, weight: LogicalWeight, start: int, stop: int) -> "torch.Tensor":
        """Read rows of a linear, whole FP8 blocks from a border on.

        Raises:
            ValueError: It is stored in a form that is not read here.
            StorageError: It cannot be read.
        """
        import torch

        from nvfp4check.checkpoint.audit.sources import Reader, Source, why_no_source
        from nvfp4check.dequantize import dequantize_nvfp4
        from nvfp4ref.formats import BLOCK_SIZE

        reader = Reader(self._checkpoint)
        if weight.format is not WeightFormat.NVFP4:
            why = why_no_source(weight)
            if why is not None:
                raise ValueError(why)
            values = Source(reader, weight).tensor(start, stop, torch.float32)
        else:
            columns = weight.shape[1]
            parts = weight.parts
            if not {Part.CODES, Part.BLOCK_SCALES, Part.GLOBAL_SCALE} <= parts.keys():
                raise ValueError("a part is missing")
            codes = reader.rows(parts[Part.CODES], start, stop, columns // 2)
            scales = reader.rows(parts[Part.BLOCK_SCALES], start, stop, columns // BLOCK_SIZE)
            stored = torch.tensor(self._checkpoint.scalar(parts[Part.GLOBAL_SCALE]))
            values = dequantize_nvfp4(
                torch.from_numpy(codes.copy()),
                torch.from_numpy(scales.copy()).view(torch.float8_e4m3fn),
                stored.reciprocal() if weight.global_scale_is_reciprocal else stored,
            )
        if not bool(values.isfinite().all()):
            raise ValueError("an element is not finite")
        return values


def _scalings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield all that a config says of RoPE, as transformers 4 and 5 write it; an empty one first.

    It may stand in `text_config`, and be told by kind of layer.
    """
    yield {}
    for place in (config, config.get("text_config")):
        if isinstance(place, Mapping):
            for found in (place.get("rope_scaling"), place.get("rope_parameters")):
                if isinstance(found, Mapping):
                    yield found
                    yield from (kind for kind in found.values() if isinstance(kind, Mapping))


def _stretch(scaling: Mapping[str, Any]) -> float:
    """Bound the factor of cosine and sine."""
    factor, mscale, stated = (
        _number(scaling.get(name)) for name in ("factor", "mscale", "attention_factor")
    )
    return max(1.0, stated, 1 + max(1.0, mscale) * math.log(max(1.0, factor)) / 10)


def _number(value: object) -> float:
    """Read a number of a config; 0 where it is none."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return 0.0
    return float(value)
