"""NV301 to NV306: the scales that hold for a whole tensor."""

import math
import statistics
from collections.abc import Iterator

from nvfp4check.checkpoint.naming import LogicalWeight, Part
from nvfp4check.checkpoint.rules.base import (
    Problem,
    Rule,
    RuleContext,
    RuleLevel,
    counted,
    printable,
    rule,
)
from nvfp4check.checkpoint.rules.siblings import (
    at_part,
    decode_scale,
    experts,
    is_valid_scale,
    nvfp4_scans,
    stored_scalar,
    with_global_scale,
)
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.findings import Severity

_GITHUB = "https://github.com/"

#: Standard deviations of weights that trained models have.
_LEAST_SD, _LARGEST_SD = 1e-4, 1.0
#: An input scale above this one means activations beyond float16's largest number, 65504.
_LARGEST_INPUT_SCALE = 65504 / 2688
#: An input scale on the wrong side of 1 is taken for a reciprocal when its inverse lies within
#: this many powers of two of the other weights' median, and itself three times as far away.
_NEAR_BITS = 2.0
_FAR_BITS = 3 * _NEAR_BITS
#: An expert's input scale is far when it is 8 times its siblings' median or an eighth of it, and
#: six robust standard deviations away. Eight times too small clips all but the smallest of a
#: block's sixteen magnitudes' range; eight times too large costs a block three of the fifteen
#: powers of two that E4M3 scales span as normal numbers. Six deviations of a normal
#: distribution come by chance twice in 10**9.
_OUTLIER_BITS = 3.0
_OUTLIER_DEVIATIONS = 6.0
#: Median absolute deviation to standard deviation, for a normal distribution.
_MAD_TO_SD = 1.4826
_FEWEST_SIBLINGS = 5


def why_invalid(value: float) -> str | None:
    """Say why a stored scale cannot be used, or None when it can."""
    if math.isnan(value):
        return "is NaN"
    if math.isinf(value):
        return "is infinite"
    if value <= 0:
        return "is zero" if value == 0 else "is negative"
    return None if is_valid_scale(value) else "is subnormal"


def observed_scale(value: float) -> float | str:
    """Give a value that JSON can hold."""
    return value if math.isfinite(value) else str(value)


@rule(
    "NV301",
    "global-scale-invalid",
    Severity.ERROR,
    fires_when="a global scale is zero, negative, infinite, NaN or subnormal",
    why="Every element of the weight is multiplied by it. ModelOpt writes 0 for an all-zero "
    "weight, and quantisers write infinity for a reciprocal of 0; kernels that flush subnormals "
    "read one as 0.",
    repair="Recompute it as amax/2688 (compressed-tensors: 2688/amax). An all-zero weight stays "
    "unquantised, or takes global scale 1 with codes 0.",
    incidents=(
        f"{_GITHUB}vllm-project/compressed-tensors/pull/595",
        f"{_GITHUB}kekzl/imp/pull/113",
    ),
    level=RuleLevel.BYTES,
)
def global_scale_invalid(context: RuleContext) -> Iterator[Problem]:
    """Check every global scale."""
    for weight in with_global_scale(context.checkpoint):
        value = stored_scalar(context.checkpoint, weight, Part.GLOBAL_SCALE)
        why = why_invalid(value) if value is not None else None
        if value is not None and why is not None:
            yield Problem(
                f"global scale {why} ({value:g}), expected a positive normal number",
                observed=observed_scale(value),
                **at_part(weight, Part.GLOBAL_SCALE),
            )


@rule(
    "NV302",
    "global-scale-convention",
    Severity.ERROR,
    fires_when="a global scale is the reciprocal of what its format stores: above 1 in ModelOpt's, "
    "below 1 in compressed-tensors'",
    why="ModelOpt stores amax/2688, which multiplies; compressed-tensors stores 2688/amax, which "
    "divides. Read the wrong way the weight is off by the square of the scale, some 10**8. Weights "
    "with a magnitude of 2688 do not exist.",
    repair="Invert the scale when converting between the two formats, and only then.",
    incidents=(
        f"{_GITHUB}modular/modular/issues/6600",
        f"{_GITHUB}vllm-project/vllm/pull/35733",
    ),
    level=RuleLevel.BYTES,
)
def global_scale_convention(context: RuleContext) -> Iterator[Problem]:
    """Check on which side of 1 every global scale lies."""
    for weight in with_global_scale(context.checkpoint):
        value = stored_scalar(context.checkpoint, weight, Part.GLOBAL_SCALE)
        if value is not None and is_valid_scale(value) and decode_scale(weight, value) > 1:
            side = "at least 1" if weight.global_scale_is_reciprocal else "at most 1"
            yield Problem(
                f"global scale {value:g} is a reciprocal for {weight.layout}: it means a largest "
                f"weight of {decode_scale(weight, value) * 2688:g}",
                observed=value,
                expected=side,
                **at_part(weight, Part.GLOBAL_SCALE),
            )


@rule(
    "NV303",
    "decoded-magnitude",
    Severity.WARNING,
    fires_when="the standard deviation of a decoded weight lies outside [1e-4, 1]",
    why="Trained linears lie within; a weight outside was decoded with a wrong scale: an exponent "
    "offset applied twice, a scale not applied, the bytes of a scale taken for a number.",
    repair="Compare with the same weight of a sibling layer and of the base model; the ratio of "
    "the two deviations names the factor that is wrong.",
    incidents=(
        f"{_GITHUB}vllm-project/compressed-tensors/pull/538",
        f"{_GITHUB}wuwangzhang1216/abliterix/pull/94",
    ),
    level=RuleLevel.BYTES,
)
def decoded_magnitude(context: RuleContext) -> Iterator[Problem]:
    """Check the exact standard deviation of every scanned weight."""
    for weight, scan in nvfp4_scans(context):
        stored = stored_scalar(context.checkpoint, weight, Part.GLOBAL_SCALE)
        if stored is None or not is_valid_scale(stored) or scan.is_zero or not scan.finite:
            continue  # NV107, NV301, NV402, NV201
        scale = decode_scale(weight, stored)
        sd = scan.sd * scale
        if scale <= 1 and not _LEAST_SD <= sd <= _LARGEST_SD:
            yield Problem(
                f"decoded weight has standard deviation {sd:.3g}, mean {scan.mean * scale:.3g}",
                observed=sd,
                expected=f"{_LEAST_SD:g} to {_LARGEST_SD:g}",
                **at_part(weight, Part.CODES),
            )


@rule(
    "NV304",
    "input-scale-invalid",
    Severity.ERROR,
    fires_when="an input scale, or a factor of a pre_quant_scale, is zero, negative, infinite or "
    "NaN, or an input scale is missing where activations are quantised with stored scales",
    why="Engines divide by it: zero makes the module's input infinite, and a missing one is read "
    "from memory that nobody set. It happens to experts that met no calibration token, and shows "
    "only on prompts that reach them.",
    repair="Calibrate with more data or all experts, or give the expert the largest input scale of "
    "its siblings, as ModelOpt does.",
    incidents=(
        f"{_GITHUB}vllm-project/vllm/issues/45212",
        f"{_GITHUB}vllm-project/compressed-tensors/pull/595",
        f"{_GITHUB}vllm-project/vllm/pull/52501",
    ),
    level=RuleLevel.BYTES,
)
def input_scale_invalid(context: RuleContext) -> Iterator[Problem]:
    """Check that every input scale that is needed is there and usable."""
    declared = context.checkpoint.quantization
    needed = declared.quantizes_activations is True and declared.static_input_scale
    for weight in with_global_scale(context.checkpoint):
        if Part.CODES not in weight.parts:
            continue  # scales without codes: NV107
        yield from _bad_factors(context, weight)
        if Part.INPUT_SCALE not in weight.parts:
            if needed:
                yield Problem(
                    "no input scale, although activations are quantised",
                    **at_part(weight, Part.INPUT_SCALE),
                )
            continue
        value = stored_scalar(context.checkpoint, weight, Part.INPUT_SCALE)
        why = why_invalid(value) if value is not None else None
        if value is not None and why is not None and why != "is subnormal":
            yield Problem(
                f"input scale {why} ({value:g}), expected a positive number",
                observed=observed_scale(value),
                **at_part(weight, Part.INPUT_SCALE),
            )


def _bad_factors(context: RuleContext, weight: LogicalWeight) -> Iterator[Problem]:
    """Report factors of the input, one a column, that cannot be."""
    entry = weight.parts.get(Part.PRE_QUANT_SCALE)
    if entry is None or entry.dtype not in ("BF16", "F16", "F32"):
        return
    try:
        factors = context.checkpoint.torch(entry).flatten().float()
    except StorageError as error:
        context.skip(f"NV304 input-scale-invalid, of {printable(entry.name)}", str(error))
        return
    if weight.shape and len(factors) != weight.shape[-1]:
        yield Problem(
            f"pre_quant_scale has {len(factors):,} factors, expected {weight.shape[-1]:,}",
            observed=len(factors),
            expected=weight.shape[-1],
            **at_part(weight, Part.PRE_QUANT_SCALE),
        )
    bad = ~((factors > 0) & factors.isfinite())
    if bool(bad.any()):
        count, first = int(bad.sum()), int(bad.int().argmax())
        value = float(factors[first])
        yield Problem(
            f"{count:,} of {len(factors):,} factors are not positive and finite, the first "
            f"{value:g} at column {first:,}",
            count=count,
            observed=observed_scale(value),
            **at_part(weight, Part.PRE_QUANT_SCALE),
        )


@rule(
    "NV305",
    "input-scale-convention",
    Severity.ERROR,
    fires_when="an input scale is the reciprocal of what its format stores",
    why="As for global scales (NV302), but activations above 2688 exist. So it fires where a scale "
    "means activations beyond 65504, where most scales of the checkpoint lie on the wrong side of "
    "1, or where the inverse fits the other weights and the scale itself is far from them. The "
    "block scales of such an activation underflow, and 96 % of them become 0.",
    repair="Invert the scale when converting between the two formats, and only then.",
    incidents=(f"{_GITHUB}vllm-project/vllm/pull/55643",),
    level=RuleLevel.BYTES,
)
def input_scale_convention(context: RuleContext) -> Iterator[Problem]:
    """Hold every input scale that lies on the wrong side of 1 against the others."""
    scales = _input_scales(context)
    if not scales:
        return
    median = statistics.median(bits for _, _, bits in scales)
    for weight, value, bits in scales:
        if bits <= 0:
            continue
        reversed_alone = abs(-bits - median) <= _NEAR_BITS and abs(bits - median) >= _FAR_BITS
        if 2**bits > _LARGEST_INPUT_SCALE or median > 0 or reversed_alone:
            yield Problem(
                f"input scale {value:g} is a reciprocal for {weight.layout}: it means activations "
                f"up to {2**bits * 2688:g}; the median of all means {2**median * 2688:g}",
                observed=value,
                expected="at least 1" if weight.global_scale_is_reciprocal else "at most 1",
                **at_part(weight, Part.INPUT_SCALE),
            )


def _input_scales(context: RuleContext) -> list[tuple[LogicalWeight, float, float]]:
    """List weights with their stored input scale and log2 of it as a multiplier."""
    found = []
    for weight in with_global_scale(context.checkpoint):
        value = stored_scalar(context.checkpoint, weight, Part.INPUT_SCALE)
        if value is not None and is_valid_scale(value):
            found.append((weight, value, math.log2(decode_scale(weight, value))))
    return found


@rule(
    "NV306",
    "input-scale-outlier",
    Severity.WARNING,
    fires_when="an expert's input scale is 8 times the median of its siblings or an eighth of it, "
    "and 6 robust standard deviations away (in log2)",
    why="The experts of one layer see like activations. A far smaller scale clips them, a far "
    "larger one pushes block scales towards the subnormals; both come from an expert that met too "
    "few or foreign tokens in calibration.",
    repair="Calibrate with more data, or share the largest input scale among the layer's experts.",
    incidents=(
        f"{_GITHUB}NVIDIA/Model-Optimizer/pull/1380",
        f"{_GITHUB}vllm-project/llm-compressor/pull/2101",
    ),
    level=RuleLevel.BYTES,
)
def input_scale_outlier(context: RuleContext) -> Iterator[Problem]:
    """Hold the input scale of every expert against its siblings' median."""
    known = {weight.name: (value, bits) for weight, value, bits in _input_scales(context)}
    for weights in experts(with_global_scale(context.checkpoint)).values():
        siblings = [weight for weight in weights if weight.name in known]
        if len(siblings) < _FEWEST_SIBLINGS:
            continue
        bits = [known[weight.name][1] for weight in siblings]
        median = statistics.median(bits)
        spread = _MAD_TO_SD * statistics.median(abs(bit - median) for bit in bits)
        for weight, bit in zip(siblings, bits, strict=True):
            away = abs(bit - median)
            if away >= _OUTLIER_BITS and away > _OUTLIER_DEVIATIONS * spread:
                yield Problem(
                    f"input scale {known[weight.name][0]:g} is {2 ** (bit - median):.3g} times the "
                    f"median of {counted(len(siblings), 'expert')} of this layer and projection",
                    observed=known[weight.name][0],
                    **at_part(weight, Part.INPUT_SCALE),
                )


RULES: tuple[Rule, ...] = (
    global_scale_invalid,
    global_scale_convention,
    decoded_magnitude,
    input_scale_invalid,
    input_scale_convention,
    input_scale_outlier,
)
