"""NV101, NV102, NV103 and NV109: the tensors against the architecture.

They need the map of expected tensors. The map is that of the unquantised model: a logical weight
has its place there whatever it is stored as, and how it is stored is NV104 to NV108's business.

One defect, one rule. A name that the index places somewhere is NV001, NV002 or NV003's when it is
absent; a weight of which only the codes are absent is NV107's; an MTP layer is NV109's alone.
"""

from collections.abc import Iterator

from nvfp4check.checkpoint.expected import Expected
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.quant_config import CONFIG
from nvfp4check.checkpoint.rules.base import Problem, Rule, RuleContext, counted, printable, rule
from nvfp4check.checkpoint.rules.shared import Absence, stray_shards, usable_declaration
from nvfp4check.findings import Severity

_ATTENTION_PARTS = (".k_proj", ".v_proj")
_SCALARS = (Part.GLOBAL_SCALE, Part.INPUT_SCALE)
_OPAQUE = frozenset((WeightFormat.PACKED_INT, WeightFormat.OTHER, WeightFormat.MXFP4))


def _needs_map(context: RuleContext, what: str) -> Expected | None:
    if context.expected is None:
        context.skip(what, f"{context.why_nothing_is_expected} (NV606)")
    return context.expected


def _mtp_prefixes(expected: Expected) -> tuple[str, ...]:
    return tuple(f"model.layers.{layer}." for layer in expected.mtp_layers)


@rule(
    "NV101",
    "tensor-missing",
    Severity.ERROR,
    fires_when="the architecture of config.json needs a tensor that no shard holds and no index "
    "names",
    why="An engine leaves the parameter as it was allocated: zeros, or whatever lay in memory. "
    "Some loaders warn, some do not.",
    repair="Export again, or copy the tensor from the source if it is one that quantisation leaves "
    "alone. If the model really lacks it, config.json is another model's.",
    incidents=("https://github.com/sgl-project/sglang/pull/32279",),
)
def tensor_missing(context: RuleContext) -> Iterator[Problem]:
    """Report every expected tensor that is nowhere."""
    expected = _needs_map(context, "NV101 tensor-missing")
    if expected is None:
        return
    mtp = _mtp_prefixes(expected)
    absence = Absence(context.checkpoint)
    for name, tensor in expected.tensors.items():
        if tensor.optional or name in context.checkpoint.weights or name.startswith(mtp):
            continue
        if absence.explained(*stored_names(name)):
            continue
        if absence.uncertain:
            context.skip("NV101 tensor-missing", absence.why)
            return
        yield Problem(
            f"{context.checkpoint.architecture} needs it, of shape {list(tensor.shape)}; no shard "
            "holds it",
            tensor=name,
            expected=[*tensor.shape],
        )


def stored_names(weight: str) -> tuple[str, ...]:
    """Name the stored tensors that a weight's elements may stand in."""
    return (weight, f"{weight}_packed") if weight.endswith(".weight") else (weight,)


@rule(
    "NV102",
    "tensor-unexpected",
    Severity.WARNING,
    fires_when="the architecture has no place for a tensor: leaked quantiser state (`_amax`), "
    "`base_layer` of an adapter, a layer beyond the last",
    why="An engine ignores it, or stops at a name that it does not know; vLLM stopped with a "
    "KeyError at internal scales that a ModelOpt export had leaked. A layer too many often means "
    "that config.json is another model's.",
    repair="Remove the tensor from the shard and the index, or correct num_hidden_layers and "
    "num_nextn_predict_layers in config.json.",
    incidents=(
        "https://github.com/NVIDIA/Model-Optimizer/pull/2038",
        "https://github.com/vllm-project/vllm/pull/54556",
    ),
)
def tensor_unexpected(context: RuleContext) -> Iterator[Problem]:
    """Report every tensor that the architecture does not know."""
    expected = _needs_map(context, "NV102 tensor-unexpected")
    if expected is None:
        return
    stray = stray_shards(context.checkpoint)
    for name, weight in context.checkpoint.weights.items():
        if name in expected.tensors or _is_kv_scale(weight, expected):
            continue
        for entry in weight.entries:
            if entry.shard not in stray:
                yield Problem(
                    f"{context.checkpoint.architecture} has no place for it "
                    f"({entry.dtype} {list(entry.shape)} in {printable(entry.shard)})",
                    tensor=entry.name,
                    shard=entry.shard,
                    offset=entry.start,
                )


def _is_kv_scale(weight: LogicalWeight, expected: Expected) -> bool:
    """Whether a weight is a scale of the KV cache of an attention that is there."""
    if weight.format is not WeightFormat.KV_SCALE:
        return False
    attention = weight.module
    for part in _ATTENTION_PARTS:
        attention = attention.removesuffix(part)
    return f"{attention}.o_proj" in expected.linears


@rule(
    "NV103",
    "wrong-shape",
    Severity.ERROR,
    fires_when="a weight's shape is not config.json's, two codes to a byte taken into account, or "
    "a scale of the whole tensor has more than one element",
    why="A loader that checks shapes stops; one that copies what fits, or that reads codes of one "
    "to a byte as two, serves another matrix.",
    repair="Compare with the source model: a transposed or unpacked tensor is the exporter's "
    "fault, sizes that differ throughout mean that config.json is another model's.",
    incidents=(
        "https://github.com/unslothai/unsloth-zoo/pull/1114",
        "https://github.com/NVIDIA/TensorRT-LLM/issues/9503",
    ),
)
def wrong_shape(context: RuleContext) -> Iterator[Problem]:
    """Compare the logical shape of every weight with the architecture's."""
    for weight in context.checkpoint.weights.values():
        yield from _wrong_scalars(weight)
    expected = _needs_map(context, "NV103 wrong-shape")
    if expected is None:
        return
    for name, weight in context.checkpoint.weights.items():
        tensor = expected.tensors.get(name)
        entry = weight.parts.get(Part.PLAIN) or weight.parts.get(Part.CODES)
        if tensor is None or entry is None:
            continue
        # Only a linear can be packed; elsewhere bytes are a matter of dtype (NV104).
        shape = weight.shape if weight.module in expected.linears else entry.shape
        if tensor.accepts_shape(shape):
            continue
        if weight.format in _OPAQUE:
            context.skip(
                f"NV103 shapes of weights stored as {weight.format.value}",
                "how many elements they hold is not known from the shape",
            )
            continue
        found, wanted = list(entry.shape), list(tensor.shape)
        packed = shape != entry.shape
        if packed and tensor.shape:
            wanted = [*tensor.shape[:-1], -(-tensor.shape[-1] // 2)]
        yield Problem(
            f"shape {found}, expected {wanted}{_shape_hint(weight, entry.shape, tensor.shape)}",
            tensor=entry.name,
            shard=entry.shard,
            offset=entry.start,
            observed=[*found],
            expected=[*wanted],
        )


def _shape_hint(weight: LogicalWeight, stored: tuple[int, ...], logical: tuple[int, ...]) -> str:
    if weight.format is WeightFormat.NVFP4 and stored == logical:
        return ": one code to a byte, not packed"
    if weight.shape == logical[::-1]:
        return ": transposed"
    return ""


def _wrong_scalars(weight: LogicalWeight) -> Iterator[Problem]:
    """Report scales of a whole two-dimensional weight that are not one number."""
    if len(weight.shape) != 2:
        return
    for part in _SCALARS:
        entry = weight.parts.get(part)
        if entry is not None and entry.numel != 1:
            yield Problem(
                f"{part.value} of shape {list(entry.shape)}, expected one element",
                tensor=entry.name,
                shard=entry.shard,
                offset=entry.start,
                observed=[*entry.shape],
                expected=[],
            )


@rule(
    "NV109",
    "mtp-inconsistent",
    Severity.ERROR,
    fires_when="num_nextn_predict_layers promises layers that are absent or incomplete, or that "
    "are quantised although an exclude pattern covers them",
    why="transformers does not model the MTP layers and drops them when it saves, so whatever goes "
    "through it loses them without a word; an engine asked for speculative decoding then fails or "
    "drafts from uninitialised weights. SGLang builds the MTP layer of an FP4 DeepSeek in BF16, "
    "whatever is stored.",
    repair="Copy the MTP layers from the source checkpoint, unquantised, into the shards and the "
    "index, and exclude them (`model.layers.61*`). Or set num_nextn_predict_layers to 0 and say "
    "in the model card that they are gone.",
    incidents=(
        "https://github.com/vllm-project/llm-compressor/issues/2735",
        "https://github.com/sgl-project/sglang/pull/7376",
        "https://github.com/vllm-project/compressed-tensors/pull/756",
    ),
)
def mtp_inconsistent(context: RuleContext) -> Iterator[Problem]:
    """Hold the MTP layers against the promise, one after the other."""
    expected = _needs_map(context, "NV109 mtp-inconsistent")
    if expected is None or not expected.mtp_layers:
        return
    yield from _absent_mtp_layers(context, expected)
    declared = usable_declaration(context.checkpoint)
    prefixes = _mtp_prefixes(expected)
    if declared is None:
        return
    for name, weight in context.checkpoint.weights.items():
        entry = weight.parts.get(Part.CODES)
        if entry is None or weight.format is not WeightFormat.NVFP4:
            continue
        if name.startswith(prefixes) and declared.excludes(weight.module):
            yield Problem(
                "belongs to an MTP layer that the exclude list leaves unquantised, but is stored "
                "as NVFP4",
                tensor=entry.name,
                shard=entry.shard,
                offset=entry.start,
                observed=weight.format.value,
                expected="unquantised",
            )


def _absent_mtp_layers(context: RuleContext, expected: Expected) -> Iterator[Problem]:
    checkpoint = context.checkpoint
    absence = Absence(checkpoint)
    for layer, prefix in zip(expected.mtp_layers, _mtp_prefixes(expected), strict=True):
        needed = [
            tensor
            for name, tensor in expected.tensors.items()
            if name.startswith(prefix) and not tensor.optional
        ]
        missing = [
            tensor
            for tensor in needed
            if tensor.name not in checkpoint.weights
            and not absence.explained(*stored_names(tensor.name))
        ]
        if missing and absence.uncertain:
            context.skip("NV109 mtp-inconsistent", absence.why)
        elif len(missing) == len(needed):
            yield Problem(
                f"num_nextn_predict_layers promises MTP layer {layer}, but none of its "
                f"{counted(len(needed), 'weight')} is there",
                tensor=prefix.rstrip("."),
                shard=CONFIG,
                count=len(needed),
                observed=0,
                expected=len(needed),
            )
        else:
            for tensor in missing:
                yield Problem(
                    f"MTP layer {layer} needs it, of shape {list(tensor.shape)}; no shard holds it",
                    tensor=tensor.name,
                    expected=[*tensor.shape],
                )


RULES: tuple[Rule, ...] = (tensor_missing, tensor_unexpected, wrong_shape, mtp_inconsistent)
