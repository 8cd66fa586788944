"""NV307 and NV308: the scales of the key-value cache."""

from collections.abc import Iterator

from nvfp4check.checkpoint.kv_bounds import SLACK, reach_of
from nvfp4check.checkpoint.naming import Part
from nvfp4check.checkpoint.rules.base import Problem, Rule, RuleContext, RuleLevel, rule
from nvfp4check.checkpoint.rules.global_scales import observed_scale, why_invalid
from nvfp4check.checkpoint.rules.siblings import at_part, stored_scalar
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.findings import Severity
from nvfp4ref.formats import E4M3

_GITHUB = "https://github.com/"
_KV_PARTS = (Part.K_SCALE, Part.V_SCALE, Part.Q_SCALE)


@rule(
    "NV307",
    "kv-scale-invalid",
    Severity.ERROR,
    fires_when="a scale of the key-value cache is zero, negative or not finite",
    why="Keys and values are divided by it when written and multiplied when read: what was "
    "written is lost.",
    repair="Write amax/448 (ModelOpt clamps it to at least 1 for FP8), or drop the scale: engines "
    "then take 1.",
    incidents=(
        f"{_GITHUB}sgl-project/sglang/pull/40243",
        f"{_GITHUB}intel/auto-round/pull/2366",
    ),
    level=RuleLevel.BYTES,
)
def kv_scale_invalid(context: RuleContext) -> Iterator[Problem]:
    """Check the scales of keys, values and queries."""
    for weight in context.checkpoint.weights.values():
        for part in _KV_PARTS:
            value = stored_scalar(context.checkpoint, weight, part)
            why = why_invalid(value) if value is not None else None
            if value is not None and why is not None and why != "is subnormal":
                yield Problem(
                    f"{part} {why} ({value:g}), expected a positive number",
                    observed=observed_scale(value),
                    **at_part(weight, part),
                )


@rule(
    "NV308",
    "kv-scale-implausible",
    Severity.WARNING,
    fires_when="a scale of an FP8 key-value cache is larger than 1 and than any key or value of "
    "its layer could need, or so small that it clips every token: bounds that the weights of the "
    "norm and of the projection set",
    why="A norm bounds what it puts out, and a projection of a normed input is bounded by its "
    "rows, whatever the prompt. A scale outside is no amax/448; mostly it is the reciprocal, "
    "under which the cache keeps a few of its 8 bits, or none.",
    repair="Store amax/448. If 448/amax is stored, invert it; if the scale was calibrated on "
    "another checkpoint, calibrate again, or drop it: engines then take 1.",
    incidents=(f"{_GITHUB}intel/auto-round/pull/2366",),
    level=RuleLevel.BYTES,
)
def kv_scale_implausible(context: RuleContext) -> Iterator[Problem]:
    """Hold the scales of keys and values against what a layer can put out."""
    checkpoint = context.checkpoint
    if checkpoint.quantization.kv_cache_algo not in (None, "FP8"):
        return
    for weight in checkpoint.weights.values():
        for part in (Part.K_SCALE, Part.V_SCALE):
            value = stored_scalar(checkpoint, weight, part)
            if value is None or why_invalid(value) is not None:
                continue
            try:
                reach = reach_of(checkpoint, weight, part)
            except StorageError as error:
                context.skip(f"NV308 kv-scale-implausible, of {weight.name}", str(error))
                continue
            if reach is None:
                continue
            most = max(1.0, reach.most * (1 + SLACK) / E4M3.max)
            least = reach.least * (1 - SLACK) / E4M3.max
            if value > most:
                yield Problem(
                    f"{part} is {value:g}, and no magnitude that it is for can exceed "
                    f"{reach.most:.3g}, for which {reach.most / E4M3.max:.3g} would do; "
                    f"the reciprocal is {1 / value:.3g}",
                    observed=value,
                    expected=f"at most {most:.3g}",
                    **at_part(weight, part),
                )
            elif value < least:
                yield Problem(
                    f"{part} is {value:g}, which holds up to {E4M3.max * value:.3g}, and some "
                    f"element of every token's latent is at least {reach.least:.3g}",
                    observed=value,
                    expected=f"at least {least:.3g}",
                    **at_part(weight, part),
                )


RULES: tuple[Rule, ...] = (kv_scale_invalid, kv_scale_implausible)
