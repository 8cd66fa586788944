"""NV104 to NV107: in which form weights are stored, against what is declared.

One defect, one rule. A partner that stands there in the wrong dtype is NV104's and not missing; a
partner that the index places somewhere is NV003's; a linear with leftover scales is NV107's and
not NV106's; a scale that DeepSeek's FP8 lacks is NV801's.
"""

from collections.abc import Iterator

from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.quant_config import QuantConfig
from nvfp4check.checkpoint.rules.base import Problem, Rule, RuleContext, rule
from nvfp4check.checkpoint.rules.fp8 import DEEPSEEK_FP8
from nvfp4check.checkpoint.rules.shared import (
    Absence,
    at,
    is_nvfp4,
    kind,
    nvfp4_weights,
    usable_declaration,
)
from nvfp4check.findings import Severity

_FLOATS = frozenset(("BF16", "F16", "F32"))
#: The floats of 16 bits; a model has one of them. Less than one weight in so many of the other is
#: no mixed model.
_HALVES = ("BF16", "F16")
_FEW = 20
_FP8 = frozenset(("F8_E4M3", "F8_E5M2"))
_FP8_FORMATS = frozenset((WeightFormat.FP8, WeightFormat.FP8_BLOCK))
#: What each part of an NVFP4 weight may be stored as; the usual dtype first.
_NVFP4_DTYPES = {
    Part.CODES: ("U8", "F4"),
    Part.BLOCK_SCALES: ("F8_E4M3",),
    Part.SCALE: ("F8_E4M3",),
    # ModelOpt has written some scales of a whole tensor in bfloat16; engines read both.
    Part.GLOBAL_SCALE: ("F32", "BF16"),
    Part.INPUT_SCALE: ("F32", "BF16"),
}
#: Linears that DeepSeek's own FP8 leaves unquantised without listing them.
_PLAIN_IN_FP8 = frozenset(("lm_head", "head", "eh_proj", "weights_proj"))
#: The names that each part of a weight goes by, whatever the producer.
_NAMES = {
    Part.CODES: ("weight", "weight_packed"),
    Part.BLOCK_SCALES: ("weight_scale",),
    Part.GLOBAL_SCALE: ("weight_scale_2", "weight_global_scale"),
    Part.SCALE_INV: ("weight_scale_inv", "weight_scale"),
}
#: Parts that mean nothing without codes.
_SCALES = (
    Part.BLOCK_SCALES,
    Part.SCALE,
    Part.GLOBAL_SCALE,
    Part.SCALE_INV,
    Part.INPUT_SCALE,
    Part.PRE_QUANT_SCALE,
)


@rule(
    "NV104",
    "wrong-dtype",
    Severity.ERROR,
    fires_when="a tensor's dtype is not the one its place needs: the router's "
    "e_score_correction_bias not F32, a norm in FP8, packed codes not U8, block scales not "
    "F8_E4M3, an excluded linear left in FP8, a few F16 weights among BF16 ones",
    why="Bytes are read by the dtype that the engine's parameter has. A router bias in BF16 keeps "
    "few of its distinct values where they lie close together (238 became 8 in a reported case) "
    "and other experts are chosen; transformers 4 casts it when it loads a model in BF16.",
    repair="Copy an unquantised tensor from the source checkpoint in its own dtype (the router's "
    "bias in F32); export a quantised weight again with its scales.",
    incidents=(
        "https://github.com/sgl-project/sglang/pull/31213",
        "https://github.com/NVIDIA/TensorRT-LLM/issues/16196",
        "https://github.com/vllm-project/vllm/pull/51946",
    ),
)
def wrong_dtype(context: RuleContext) -> Iterator[Problem]:
    """Compare dtypes with what each part, and each place in the model, may have."""
    declared = usable_declaration(context.checkpoint)
    if context.expected is None:
        context.skip(
            "NV104 wrong-dtype, of tensors that are no part of NVFP4",
            f"{context.why_nothing_is_expected} (NV606)",
        )
    tensors = {} if context.expected is None else context.expected.tensors
    linears = {} if context.expected is None else context.expected.linears
    for name, weight in context.checkpoint.weights.items():
        quantisable = name not in tensors or weight.module in linears
        if quantisable and is_nvfp4(weight, declared):
            yield from _wrong_parts(weight)
        elif name in tensors:
            yield from _wrong_place(context, weight, declared)
    yield from _odd_halves(context)


def _odd_halves(context: RuleContext) -> Iterator[Problem]:
    """Report 16-bit weights of another dtype than nearly all others: the same bytes, misread."""
    by_dtype: dict[str, list[TensorEntry]] = {dtype: [] for dtype in _HALVES}
    for weight in context.checkpoint.weights.values():
        entry = weight.parts.get(Part.PLAIN)
        if entry is not None and entry.dtype in by_dtype:
            by_dtype[entry.dtype].append(entry)
    few, many = sorted(_HALVES, key=lambda dtype: len(by_dtype[dtype]))
    if _FEW * len(by_dtype[few]) > len(by_dtype[many]):
        return
    for entry in by_dtype[few]:
        yield at(
            entry,
            f"stored as {few}, expected {many} as {len(by_dtype[many]):,} other weights",
            observed=few,
            expected=many,
        )


def _wrong_parts(weight: LogicalWeight) -> Iterator[Problem]:
    for part, dtypes in _NVFP4_DTYPES.items():
        entry = weight.parts.get(part)
        if entry is not None and entry.dtype not in dtypes:
            what = "block scales" if part is Part.SCALE else part.value.replace("-", " ")
            yield at(
                entry,
                f"{what} of NVFP4 stored as {entry.dtype}, expected {dtypes[0]}",
                observed=entry.dtype,
                expected=dtypes[0],
            )


def _wrong_place(
    context: RuleContext, weight: LogicalWeight, declared: QuantConfig | None
) -> Iterator[Problem]:
    assert context.expected is not None
    entry = weight.parts.get(Part.PLAIN) or weight.parts.get(Part.CODES)
    if entry is None:
        return
    if weight.module in context.expected.linears and weight.name.endswith(".weight"):
        yield from _wrong_linear(weight, entry, declared)
        return
    dtypes = context.expected.tensors[weight.name].dtypes
    accepted = dtypes if dtypes == ("F32",) else (*dtypes, *sorted(_FLOATS))
    if entry.dtype not in accepted:
        yield at(
            entry,
            f"stored as {entry.dtype}, expected {dtypes[0]}",
            observed=entry.dtype,
            expected=dtypes[0],
        )


def _wrong_linear(
    weight: LogicalWeight, entry: TensorEntry, declared: QuantConfig | None
) -> Iterator[Problem]:
    """Check a linear that is not NVFP4; unquantised though listed as NVFP4 is NV106's."""
    algo = None if declared is None else declared.algo_of(weight.module)
    native_fp8 = declared is not None and declared.producer == "deepseek-fp8"
    if native_fp8 and weight.module.rpartition(".")[2] in _PLAIN_IN_FP8:
        algo = None
    if algo is None:
        said = "nothing declares it quantised" if declared is None else "the exclude list covers it"
        if entry.dtype not in _FLOATS and weight.format is not WeightFormat.NVFP4:
            yield at(
                entry,
                f"stored as {entry.dtype}, but {said}: expected BF16",
                observed=entry.dtype,
                expected="BF16",
            )
    elif "NVFP4" in algo and weight.format in _FP8_FORMATS:
        yield at(
            entry,
            f"stored as {entry.dtype}, but declared {algo}: expected U8",
            observed=entry.dtype,
            expected="U8",
        )
    elif algo.startswith("FP8") and entry.dtype not in _FP8:
        yield at(
            entry,
            f"stored as {entry.dtype}, but declared {algo}: expected F8_E4M3",
            observed=entry.dtype,
            expected="F8_E4M3",
        )


@rule(
    "NV105",
    "quantized-though-excluded",
    Severity.ERROR,
    fires_when="a weight is stored as NVFP4, but an exclude pattern covers its module",
    why="The engine builds the module unquantised and reads packed codes as BF16, or stops at a "
    "shape that is half as wide as it expects. MTP layers are NV109's.",
    repair="Remove the pattern if the module was meant to be quantised; else restore the "
    "unquantised weight from the source.",
    incidents=(
        "https://github.com/NVIDIA/TensorRT-LLM/issues/16196",
        "https://github.com/NVIDIA/TensorRT-LLM/pull/11989",
    ),
)
def quantized_though_excluded(context: RuleContext) -> Iterator[Problem]:
    """Report codes where the exclude list promises none."""
    declared = usable_declaration(context.checkpoint)
    if declared is None or not declared.exclude:
        return
    layers = () if context.expected is None else context.expected.mtp_layers
    mtp = tuple(f"model.layers.{layer}." for layer in layers)
    for weight in context.checkpoint.weights.values():
        entry = weight.parts.get(Part.CODES)
        if entry is None or weight.format is not WeightFormat.NVFP4 or weight.name.startswith(mtp):
            continue
        if declared.excludes(weight.module):
            yield at(
                entry,
                f"stored as NVFP4, but the exclude list of {declared.source_files[0]} covers "
                "its module",
                observed=WeightFormat.NVFP4.value,
                expected="unquantised",
            )


@rule(
    "NV106",
    "unquantized-though-listed",
    Severity.ERROR,
    fires_when="a linear is stored unquantised though no exclude pattern covers it: an expert that "
    "met no calibration token",
    why="ModelOpt's DeepSeek script at 0.39 leaves an expert without calibration data in BF16 and "
    "does not list it. An engine that builds it quantised has no scales for it: it stops, or "
    "computes with whatever lay in their memory.",
    repair="Calibrate with more tokens, or with all tokens through all experts, and export again; "
    "or add the module to exclude_modules, if the engine can mix formats within a layer.",
    incidents=(
        "https://github.com/sgl-project/sglang/pull/9712",
        "https://github.com/sgl-project/sglang/pull/39317",
    ),
)
def unquantized_though_listed(context: RuleContext) -> Iterator[Problem]:
    """Report linears that were to be NVFP4 and are not.

    Without a map of the architecture a module counts as linear where a sibling of its kind, the
    same name with other numbers, is stored as NVFP4.
    """
    declared = usable_declaration(context.checkpoint)
    if declared is None or not declared.is_nvfp4:
        return
    kinds = {kind(weight.module) for weight in nvfp4_weights(context.checkpoint)}
    linears = None if context.expected is None else context.expected.linears
    for weight in context.checkpoint.weights.values():
        entry = weight.parts.get(Part.PLAIN)
        if entry is None or len(weight.parts) > 1 or not weight.name.endswith(".weight"):
            continue
        linear = kind(weight.module) in kinds if linears is None else weight.module in linears
        if not linear:
            continue
        algo = declared.algo_of(weight.module)
        if algo is not None and "NVFP4" in algo:
            yield at(
                entry,
                f"stored as {entry.dtype}, but {declared.source_files[0]} declares its module "
                f"{algo} and no exclude pattern covers it",
                observed=entry.dtype,
                expected=algo,
            )


@rule(
    "NV107",
    "partner-missing",
    Severity.ERROR,
    fires_when="codes stand without block scales, block scales without a global scale, an FP8 "
    "weight without its scale (DeepSeek's: NV801), or scales without codes",
    why="Codes mean nothing without their scales. A loader that fills an absent scale with ones, "
    "or leaves it uninitialised, serves the weight orders of magnitude off.",
    repair="Export the weight again, with all its tensors. Scales beside a BF16 weight are left "
    "over: the weight was exchanged after quantisation.",
    incidents=(
        "https://github.com/NVIDIA/Model-Optimizer/pull/384",
        "https://github.com/wuwangzhang1216/abliterix/pull/94",
        "https://github.com/NVIDIA/TensorRT-LLM/pull/16437",
    ),
)
def partner_missing(context: RuleContext) -> Iterator[Problem]:
    """Report weights of which a part is nowhere."""
    checkpoint = context.checkpoint
    absence = Absence(checkpoint)
    nvfp4 = checkpoint.quantization.is_nvfp4 or bool(nvfp4_weights(checkpoint))
    declared = usable_declaration(checkpoint)
    deepseek = checkpoint.quantization.producer == DEEPSEEK_FP8  # NV801
    for weight in checkpoint.weights.values():
        algo = None if declared is None else declared.algo_of(weight.module)
        fp8 = declared is None or (algo is not None and algo.startswith("FP8"))
        fp8 = fp8 and not deepseek
        missing = [
            part
            for part in _missing_parts(weight, nvfp4, fp8)
            if not absence.explained(*(f"{weight.module}.{name}" for name in _NAMES[part]))
        ]
        if not missing:
            continue
        if absence.uncertain:
            context.skip("NV107 partner-missing", absence.why)
            return
        entry = weight.parts.get(Part.CODES) or weight.entries[0]
        there = ", ".join(part.value.replace("-", " ") for part in weight.parts)
        lacking = " and no ".join(part.value.replace("-", " ") for part in missing)
        yield at(
            entry,
            f"{weight.name} has {there}, but no {lacking}",
            observed=[part.value for part in weight.parts],
            expected=[part.value for part in missing],
        )


def _missing_parts(weight: LogicalWeight, nvfp4: bool, fp8: bool) -> list[Part]:
    """List the parts that a weight lacks, given those it has.

    Where NVFP4 or FP8 has no place, a weight of its dtype is none of it, and NV104's.
    """
    parts = weight.parts
    if Part.CODES not in parts:
        return [Part.CODES] if any(part in parts for part in _SCALES) else []
    if len(weight.shape) < 2:
        return []
    if weight.format in _FP8_FORMATS and Part.GLOBAL_SCALE not in parts and fp8:
        scaled = any(part in parts for part in (Part.SCALE, Part.SCALE_INV, Part.BLOCK_SCALES))
        return [] if scaled else [Part.SCALE_INV]
    if weight.format is not WeightFormat.NVFP4 or not nvfp4:
        return []
    missing = []
    if Part.BLOCK_SCALES not in parts and Part.SCALE not in parts:
        missing.append(Part.BLOCK_SCALES)
    if Part.GLOBAL_SCALE not in parts:
        missing.append(Part.GLOBAL_SCALE)
    return missing


RULES: tuple[Rule, ...] = (
    wrong_dtype,
    quantized_though_excluded,
    unquantized_though_listed,
    partner_missing,
)
