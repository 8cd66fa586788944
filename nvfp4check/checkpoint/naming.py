"""Stored tensors gathered into logical weights, by the names each producer gives them.

    ModelOpt            weight (U8) + weight_scale + weight_scale_2 + input_scale
                        [+ pre_quant_scale]
    compressed-tensors  weight_packed + weight_scale + weight_global_scale + input_global_scale;
                        its global scales are encode scales: reciprocals of ModelOpt's
    DeepSeek FP8        weight (F8_E4M3) + weight_scale_inv, which multiplies in spite of its name
    FP8 of the others   weight (F8_E4M3) + weight_scale, whose shape says for what each scale is:
                        the tensor, a row, or a tile of 128 x 128, which is DeepSeek's form
    plain               weight (BF16, F16, F32)

Codes hold two elements a byte, so K is twice their last dimension.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from nvfp4check.checkpoint.header import TensorEntry
from nvfp4ref.formats import FP8_BLOCK


class WeightFormat(StrEnum):
    """How the elements of a weight are stored."""

    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"
    FP8_BLOCK = "fp8-block"
    FP8 = "fp8"
    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"
    F64 = "f64"
    PACKED_INT = "packed-int"
    KV_SCALE = "kv-scale"
    OTHER = "other"


class Layout(StrEnum):
    """Whose names the tensors of a weight bear."""

    MODELOPT = "modelopt"
    COMPRESSED_TENSORS = "compressed-tensors"
    DEEPSEEK_FP8 = "deepseek-fp8"
    PLAIN = "plain"


class Part(StrEnum):
    """What a tensor is to its logical weight."""

    CODES = "codes"
    BLOCK_SCALES = "block-scales"
    GLOBAL_SCALE = "global-scale"
    INPUT_SCALE = "input-scale"
    SCALE_INV = "scale-inv"
    SCALE = "scale"
    PRE_QUANT_SCALE = "pre-quant-scale"
    ZERO_POINT = "zero-point"
    STORED_SHAPE = "stored-shape"
    K_SCALE = "k-scale"
    V_SCALE = "v-scale"
    Q_SCALE = "q-scale"
    BIAS = "bias"
    PLAIN = "plain"


#: Last component of a tensor's name -> its part, where the name alone decides.
_PARTS = {
    "weight_packed": Part.CODES,
    "weight_scale_2": Part.GLOBAL_SCALE,
    "weight_global_scale": Part.GLOBAL_SCALE,
    "input_scale": Part.INPUT_SCALE,
    "input_global_scale": Part.INPUT_SCALE,
    "weight_scale_inv": Part.SCALE_INV,
    "pre_quant_scale": Part.PRE_QUANT_SCALE,
    "weight_zero_point": Part.ZERO_POINT,
    "weight_shape": Part.STORED_SHAPE,
    "k_scale": Part.K_SCALE,
    "v_scale": Part.V_SCALE,
    "q_scale": Part.Q_SCALE,
    "bias": Part.BIAS,
}
_COMPRESSED_TENSORS_LEAVES = frozenset(
    ("weight_packed", "weight_global_scale", "input_global_scale", "weight_shape")
)
_KV_PARTS = frozenset((Part.K_SCALE, Part.V_SCALE, Part.Q_SCALE))
_PLAIN_FORMATS = {
    "BF16": WeightFormat.BF16,
    "F16": WeightFormat.F16,
    "F32": WeightFormat.F32,
    "F64": WeightFormat.F64,
}
_FP8_DTYPES = frozenset(("F8_E4M3", "F8_E5M2"))

#: Linears that engines fuse into one and then serve with one global scale: the members' last name
#: components, and the name vLLM gives the whole.
FUSED_GROUPS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "w13": ("w1", "w3"),
}


@dataclass(frozen=True, slots=True)
class LogicalWeight:
    """One weight of the model, with the stored tensors that make it up.

    `name` is the name it has in the unquantised model, `shape` its shape there. `parts` may lack
    what a sound weight has: a rule says so.
    """

    name: str
    module: str
    format: WeightFormat
    layout: Layout
    parts: Mapping[Part, TensorEntry]
    shape: tuple[int, ...]

    @property
    def global_scale_is_reciprocal(self) -> bool:
        """Whether the stored global and input scales divide (encode scales) or multiply."""
        return self.layout is Layout.COMPRESSED_TENSORS

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The stored tensors."""
        return tuple(self.parts.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all its stored tensors."""
        return sum(entry.nbytes for entry in self.parts.values())


def logical_weights(tensors: Iterable[TensorEntry]) -> dict[str, LogicalWeight]:
    """Gather tensors into logical weights, keyed and sorted by the weight's name."""
    modules: dict[str, dict[str, TensorEntry]] = {}
    weights: dict[str, LogicalWeight] = {}
    for entry in tensors:
        module, _, leaf = entry.name.rpartition(".")
        if leaf in _PARTS or leaf in ("weight", "weight_scale"):
            modules.setdefault(module, {})[leaf] = entry
        else:
            weights[entry.name] = _alone(entry, module)
    for module, leaves in modules.items():
        for weight in _weights_of(module, leaves):
            weights[weight.name] = weight
    return dict(sorted(weights.items()))


def _weights_of(module: str, leaves: dict[str, TensorEntry]) -> Iterable[LogicalWeight]:
    bias = leaves.pop("bias", None)
    if bias is not None:
        yield _alone(bias, module)
    if not leaves:
        return
    parts = {_part(leaf, entry): entry for leaf, entry in leaves.items()}
    if "weight" in leaves and "weight_packed" in leaves:
        # Both stored: the packed one is the weight, the other stands beside it.
        parts |= {Part.CODES: leaves["weight_packed"], Part.PLAIN: leaves["weight"]}
    if parts.keys() <= _KV_PARTS:
        for part, entry in parts.items():
            yield LogicalWeight(
                entry.name, module, WeightFormat.KV_SCALE, Layout.MODELOPT, {part: entry}, ()
            )
        return
    _find_tiles(parts)
    layout = _layout(leaves, parts)
    form = _format(leaves, parts)
    # Parts in one order, whatever the order in the shards.
    ordered = {part: parts[part] for part in Part if part in parts}
    yield LogicalWeight(_join(module, "weight"), module, form, layout, ordered, _shape(form, parts))


def _alone(entry: TensorEntry, module: str) -> LogicalWeight:
    form = _PLAIN_FORMATS.get(entry.dtype, WeightFormat.OTHER)
    if entry.dtype in _FP8_DTYPES:
        form = WeightFormat.FP8
    return LogicalWeight(entry.name, module, form, Layout.PLAIN, {Part.PLAIN: entry}, entry.shape)


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def _part(leaf: str, entry: TensorEntry) -> Part:
    if leaf == "weight":
        return Part.PLAIN if entry.dtype in _PLAIN_FORMATS else Part.CODES
    if leaf == "weight_scale":
        return Part.SCALE if entry.dtype in _PLAIN_FORMATS else Part.BLOCK_SCALES
    return _PARTS[leaf]


def _find_tiles(parts: dict[Part, TensorEntry]) -> None:
    """Take an FP8 weight's scales for those of its tiles where their shape says so.

    ModelOpt's shape, [N/128, 1, K/128, 1], becomes [N/128, K/128]: the same bytes.
    """
    codes, scale = parts.get(Part.CODES), parts.get(Part.SCALE)
    if codes is None or scale is None or codes.dtype not in _FP8_DTYPES or len(codes.shape) != 2:
        return
    sides = zip(codes.shape, FP8_BLOCK.block_shape, strict=True)
    down, across = (-(-size // side) for size, side in sides)
    if Part.SCALE_INV not in parts and scale.shape in ((down, across), (down, 1, across, 1)):
        parts[Part.SCALE_INV] = replace(parts.pop(Part.SCALE), shape=(down, across))


def _layout(leaves: Mapping[str, TensorEntry], parts: Mapping[Part, TensorEntry]) -> Layout:
    if not _COMPRESSED_TENSORS_LEAVES.isdisjoint(leaves):
        return Layout.COMPRESSED_TENSORS
    if "weight_scale_inv" in leaves:
        return Layout.DEEPSEEK_FP8
    if Part.PLAIN in parts and len(parts) == 1:
        return Layout.PLAIN
    return Layout.MODELOPT


def _format(leaves: Mapping[str, TensorEntry], parts: Mapping[Part, TensorEntry]) -> WeightFormat:
    if "weight_shape" in leaves:
        return WeightFormat.PACKED_INT
    stored = parts.get(Part.PLAIN)
    codes = parts.get(Part.CODES)
    block_scales = parts.get(Part.BLOCK_SCALES)
    if codes is None and stored is not None:
        return _PLAIN_FORMATS[stored.dtype]
    if codes is None:
        if Part.SCALE_INV in parts:
            return WeightFormat.FP8_BLOCK
        nvfp4 = Part.GLOBAL_SCALE in parts or block_scales is not None
        return WeightFormat.NVFP4 if nvfp4 else WeightFormat.OTHER
    if codes.dtype in _FP8_DTYPES:
        return WeightFormat.FP8_BLOCK if Part.SCALE_INV in parts else WeightFormat.FP8
    if codes.dtype in ("U8", "I8", "F4"):
        mxfp4 = block_scales is not None and block_scales.dtype in ("U8", "F8_E8M0")
        return WeightFormat.MXFP4 if mxfp4 else WeightFormat.NVFP4
    return WeightFormat.PACKED_INT if codes.dtype == "I32" else WeightFormat.OTHER


def _shape(form: WeightFormat, parts: Mapping[Part, TensorEntry]) -> tuple[int, ...]:
    stored = parts.get(Part.CODES) or parts.get(Part.PLAIN)
    if stored is None:
        return ()
    packed = form in (WeightFormat.NVFP4, WeightFormat.MXFP4) and stored.dtype != "F4"
    if packed and stored.shape:
        return (*stored.shape[:-1], 2 * stored.shape[-1])
    return stored.shape
