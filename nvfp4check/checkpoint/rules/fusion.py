"""NV501 to NV503: scales that must be one, for engines fuse the weights and keep one of them."""

from collections.abc import Iterator

from nvfp4check.checkpoint.naming import Part
from nvfp4check.checkpoint.rules.base import Problem, Rule, RuleContext, RuleLevel, rule
from nvfp4check.checkpoint.rules.siblings import (
    MLP_GROUPS,
    FusedGroup,
    at_part,
    decode_scale,
    fused_groups,
    is_valid_scale,
    stored_scalar,
    with_global_scale,
)
from nvfp4check.findings import Severity

_GITHUB = "https://github.com/"


def _differing(context: RuleContext, part: Part, *, mlp: bool) -> Iterator[Problem]:
    """Report every fused group whose members store different values of a scale."""
    noun = "global scale" if part is Part.GLOBAL_SCALE else "input scale"
    for group in fused_groups(with_global_scale(context.checkpoint)):
        if (group.name in MLP_GROUPS) is not mlp:
            continue
        values = _stored(context, group, part)
        if len(set(values.values())) < 2:
            continue
        by_name = {weight.name: weight for weight in group.members}
        decoded = {name: decode_scale(by_name[name], value) for name, value in values.items()}
        ratio = max(decoded.values()) / min(decoded.values())
        smallest = min(decoded, key=decoded.__getitem__)
        shown = ", ".join(
            f"{by_name[name].module.rpartition('.')[2]} {value:.9g}"
            for name, value in values.items()
        )
        yield Problem(
            f"{noun} differs within fused {group.name}, by a factor of {ratio:.6g}: {shown}",
            count=len(values),
            observed={by_name[name].module.rpartition(".")[2]: v for name, v in values.items()},
            expected="one value",
            **at_part(by_name[smallest], part),
        )


def _stored(context: RuleContext, group: FusedGroup, part: Part) -> dict[str, float]:
    """The members' valid scales, by the weight's name; others are NV301's and NV304's."""
    values = {}
    for weight in group.members:
        value = stored_scalar(context.checkpoint, weight, part)
        if value is not None and is_valid_scale(value):
            values[weight.name] = value
    return values


@rule(
    "NV501",
    "gate-up-global-scale",
    Severity.ERROR,
    fires_when="gate_proj and up_proj of one MLP or expert differ in global scale",
    why="Engines fuse the two and keep one global scale: vLLM and SGLang the gate's, TensorRT-LLM "
    "the larger. The other half comes out wrong by the ratio, up to 10 in published checkpoints, "
    "with cosine similarity 1 and at most a warning.",
    repair="Take the larger amax of the two as both, and quantise both again; or fold the ratio "
    "into the block scales of one, at the cost of one more rounding.",
    incidents=(
        f"{_GITHUB}vllm-project/vllm/issues/54150",
        f"{_GITHUB}vllm-project/vllm/pull/55073",
        f"{_GITHUB}NVIDIA/TensorRT-LLM/pull/14199",
        f"{_GITHUB}sgl-project/sglang/pull/27588",
        f"{_GITHUB}vllm-project/vllm/pull/47515",
        f"{_GITHUB}NVIDIA/Model-Optimizer/pull/1033",
    ),
    level=RuleLevel.BYTES,
)
def gate_up_global_scale(context: RuleContext) -> Iterator[Problem]:
    """Compare the global scales of gate and up."""
    yield from _differing(context, Part.GLOBAL_SCALE, mlp=True)


@rule(
    "NV502",
    "gate-up-input-scale",
    Severity.ERROR,
    fires_when="gate_proj and up_proj of one MLP or expert differ in input scale",
    why="Both read one input, which is quantised once. Engines keep the larger scale, or the one "
    "loaded last; TensorRT-LLM refuses the checkpoint.",
    repair="Give both the larger input scale: activations quantised with it lose no range.",
    incidents=(f"{_GITHUB}NVIDIA-NeMo/RL/pull/2983",),
    level=RuleLevel.BYTES,
)
def gate_up_input_scale(context: RuleContext) -> Iterator[Problem]:
    """Compare the input scales of gate and up."""
    yield from _differing(context, Part.INPUT_SCALE, mlp=True)


@rule(
    "NV503",
    "fused-group-scale",
    Severity.ERROR,
    fires_when="the members of another group that engines fuse (q/k/v; q_a/kv_a where quantised) "
    "differ in global or input scale",
    why="Engines fuse them and keep one scale, so the other members come out too large or too "
    "small by the ratio.",
    repair="Calibrate the group together (llm-compressor and ModelOpt have lists of fused groups "
    "that may lack your architecture), and quantise its members again.",
    incidents=(
        f"{_GITHUB}intel/auto-round/issues/2380",
        f"{_GITHUB}vllm-project/llm-compressor/issues/2360",
        f"{_GITHUB}vllm-project/vllm/pull/47515",
    ),
    level=RuleLevel.BYTES,
)
def fused_group_scale(context: RuleContext) -> Iterator[Problem]:
    """Compare the scales of the groups of attention."""
    for part in (Part.GLOBAL_SCALE, Part.INPUT_SCALE):
        yield from _differing(context, part, mlp=False)


RULES: tuple[Rule, ...] = (gate_up_global_scale, gate_up_input_scale, fused_group_scale)
