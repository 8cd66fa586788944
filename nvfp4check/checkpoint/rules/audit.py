"""NV701 to NV705: every weight held against the base it should have been made from.

One defect, one rule: a weight that is another's is NV703's and nothing else; one with elements
beyond their rounding is NV701's, and not NV702's. Two global scales that differ within a fused
group are NV501's.
"""

from collections.abc import Iterator, Mapping

from nvfp4check.checkpoint.audit.outcome import AuditOutcome
from nvfp4check.checkpoint.audit.results import Copied, Way, WeightAudit
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
from nvfp4check.checkpoint.rules.siblings import at_part, fused_groups
from nvfp4check.findings import Severity
from nvfp4ref.formats import E4M3, NVFP4

_GITHUB = "https://github.com/"
#: FourOverSix divides amax by 6 * 256, to leave room for scales half as large again.
_FOUR_OVER_SIX = E4M3.max / 256
#: Of a global scale worked out in two divisions, and in the other direction.
_FLOAT32_ROUNDINGS = 4 * 2.0**-24


def _native(context: RuleContext) -> Iterator[tuple[LogicalWeight, WeightAudit]]:
    """Yield the audited NVFP4 weights that are this base's."""
    if context.audit is not None:
        for audit in context.audit.native:
            yield context.checkpoint.weights[audit.name], audit


def _place(audit: WeightAudit, element: int | None) -> str:
    row, column = divmod(element or 0, audit.columns)
    return f"the first at row {row}, column {column}"


def _code_offset(weight: LogicalWeight, element: int | None) -> int:
    return weight.parts[Part.CODES].start + (element or 0) // 2


@rule(
    "NV701",
    "audit-bound",
    Severity.ERROR,
    fires_when="with --base: an element lies farther from the base than its block's rounding "
    "allows: half the widest step of E2M1 times block scale times global scale, or beyond the "
    "range of the largest block scale",
    why="Rounding to E2M1 cannot move an element so far. Its code, its block scale or the global "
    "scale is not the one it was quantised with: a damaged file, a scale changed after "
    "quantisation, a global scale too small for the tensor's largest element. Columns that AWQ or "
    "SmoothQuant smoothed are held against the base's after the same division, by the stored "
    "pre_quant_scale, the change of the norm before, or factors that one linear lost and the one "
    "before it took.",
    repair="Quantise the weight again from the base. Where whole rows or ranks of a sharded export "
    "are concerned, merge their amax by the maximum before quantising.",
    incidents=(
        f"{_GITHUB}NVIDIA/Model-Optimizer/pull/1033",
        f"{_GITHUB}vllm-project/compressed-tensors/issues/774",
    ),
    level=RuleLevel.BYTES,
)
def audit_bound(context: RuleContext) -> Iterator[Problem]:
    """Report weights with elements beyond their rounding."""
    misfits = {weight.name: ratio for weight, _, ratio in _misfits(context)}
    for weight, audit in _native(context):
        count = audit.counts["beyond"]
        if not count:
            continue
        also = audit.counts["off"]
        beside = f"; {counted(also, 'further code')} not the nearest" if also else ""
        if weight.name in misfits:
            beside += f"; the global scale is {misfits[weight.name]:.6g} times amax/2688"
        yield Problem(
            f"{count:,} of {audit.elements:,} elements are farther from the base than rounding "
            f"allows, up to {audit.worst:.3g} times block scale and global scale; "
            f"{_place(audit, audit.first_beyond)}{beside}",
            tensor=weight.parts[Part.CODES].name,
            shard=weight.parts[Part.CODES].shard,
            offset=_code_offset(weight, audit.first_beyond),
            count=count,
            observed=audit.worst,
            expected="at most 1",
        )


@rule(
    "NV702",
    "audit-not-nearest",
    Severity.WARNING,
    fires_when="with --base: codes are not the nearest to the base's elements, beyond ties and "
    "what reciprocals and the order of roundings explain",
    why="Every producer's quantiser rounds to the nearest code; they differ only at ties. Another "
    "rounding (ties away from zero, truncation, through bfloat16) loses accuracy for nothing, or "
    "the weight was quantised from another version of the base than this one. Stochastic rounding "
    "is meant for gradients.",
    repair="Quantise with rounding to nearest even; or give the base that the checkpoint was made "
    "from, in the precision the producer saw.",
    incidents=(
        f"{_GITHUB}pytorch/ao/pull/4725",
        f"{_GITHUB}vllm-project/compressed-tensors/pull/824",
    ),
    level=RuleLevel.BYTES,
)
def audit_not_nearest(context: RuleContext) -> Iterator[Problem]:
    """Report weights whose codes are off, and none beyond."""
    for weight, audit in _native(context):
        count = audit.counts["off"]
        if count and not audit.counts["beyond"]:
            yield Problem(
                f"{count:,} of {audit.elements:,} codes ({count / audit.elements:.3%}) are not the "
                f"nearest, and no tie explains it; {_place(audit, audit.first_off)}",
                tensor=weight.parts[Part.CODES].name,
                shard=weight.parts[Part.CODES].shard,
                offset=_code_offset(weight, audit.first_off),
                count=count,
                observed=count / audit.elements,
                expected=0.0,
            )


@rule(
    "NV703",
    "audit-foreign",
    Severity.ERROR,
    fires_when="with --base: the signs of a weight, of one row, or of some columns of its rows are "
    "not the base tensor's; the finding names the tensor, the rows or the columns they are, when "
    "they are others: permuted experts or heads, gate and up exchanged, ranks of a sharded export "
    "or halves swapped, transposed, nibbles swapped",
    why="Rounding keeps the sign of every element, so the tensor is sound and in the wrong place. "
    "No other check sees it: shapes, scales and histograms are those of a real weight, and the "
    "model answers fluently, and wrongly.",
    repair="Map names again when exporting: experts by their global number over all ranks, gate "
    "before up, low nibble first. The finding says what lies where.",
    incidents=(
        f"{_GITHUB}sgl-project/sglang/pull/23625",
        f"{_GITHUB}vllm-project/vllm/pull/37322",
        f"{_GITHUB}NVIDIA/TensorRT-LLM/pull/7968",
    ),
    level=RuleLevel.BYTES,
)
def audit_foreign(context: RuleContext) -> Iterator[Problem]:
    """Report every foreign weight by what it is."""
    if context.audit is None:
        return
    for name, foreign in context.audit.foreign.items():
        audit = context.audit.weights[name]
        some = foreign.rows is not None and foreign.rows < audit.rows
        share = f" in {foreign.rows:,} of {audit.rows:,} rows" if some else ""
        yield Problem(
            f"{printable(name)} is not the base's tensor of that name{share}: "
            f"{printable(foreign.how, 400)}",
            count=foreign.rows or audit.rows,
            observed=foreign.shown,
            expected=name,
            **at_part(context.checkpoint.weights[name], Part.CODES),
        )


@rule(
    "NV704",
    "audit-unquantized-changed",
    Severity.ERROR,
    fires_when="with --base: a tensor that should have been copied differs from the base: in its "
    "bytes, or from the exact dequantisation of an FP8 tensor to its dtype",
    why="Norms, routers, embeddings and the linears left unquantised are copied, or dequantised "
    "from FP8 by one product and one rounding. A difference means another version of the base, or "
    "scales applied twice or not at all. A norm may be multiplied by factors (AWQ, SmoothQuant) if "
    "all linears that it feeds undo them; ModelOpt 0.47 does so for DeepSeek's shared experts "
    "alone, and the router and the routed experts, which read the same norm, see another input.",
    repair="Copy the tensor from the base again, or give the base that the checkpoint was made "
    "from. Where some linears do not undo a norm's factors, restore the norm and store the factors "
    "as pre_quant_scale of those that do.",
    incidents=(
        f"{_GITHUB}sgl-project/sglang/pull/31213",
        f"{_GITHUB}NVIDIA/TensorRT-LLM/issues/16196",
    ),
    level=RuleLevel.BYTES,
)
def audit_unquantized_changed(context: RuleContext) -> Iterator[Problem]:
    """Report copies that differ."""
    if context.audit is None:
        return
    for name, copy in context.audit.copies.items():
        if copy.how != Copied.DIFFERENT:
            continue
        weight = context.checkpoint.weights[name]
        entry = next((e for e in weight.entries if e.name == copy.tensor), weight.entries[0])
        size = entry.nbytes // max(1, entry.numel)
        how = "" if copy.format == copy.base_format else f" as {copy.format} of {copy.base_format}"
        yield Problem(
            f"{copy.different:,} of {max(entry.numel, 1):,} elements differ from the base{how}, "
            f"the first at element {copy.first or 0:,}{printable(copy.remark, 400)}",
            tensor=entry.name,
            shard=entry.shard,
            offset=entry.start + (copy.first or 0) * size,
            count=copy.different,
            observed=f"{copy.different} elements differ",
            expected="the base's values",
        )


@rule(
    "NV705",
    "audit-global-scale",
    Severity.WARNING,
    fires_when="with --base: a global scale is not amax/2688 of the base's tensor or of its fused "
    "group, to one unit in the last place, under any formula known of its producer",
    why="A smaller scale clips the largest blocks, a larger one wastes the range of the block "
    "scales. Legal where scales were searched (MSE, 4-over-6) or the amax calibrated otherwise.",
    repair="Take the largest amax of the fused group, over all ranks, and quantise again; nothing "
    "to do where the producer searched for scales.",
    incidents=(
        f"{_GITHUB}NVIDIA/Model-Optimizer/pull/1033",
        f"{_GITHUB}vllm-project/llm-compressor/issues/2360",
    ),
    level=RuleLevel.BYTES,
)
def audit_global_scale(context: RuleContext) -> Iterator[Problem]:
    """Report global scales that their amax does not give; of weights with NV701, that says it."""
    for weight, audit, ratio in _misfits(context):
        if audit.counts["beyond"]:
            continue
        searched = (
            "; 4-over-6 divides by 6 * 256: legal"
            if abs(ratio / _FOUR_OVER_SIX - 1) < 2.0**-7  # bfloat16 is the coarsest they divide in
            else "; legal if it was searched for"
        )
        yield Problem(
            f"global scale {audit.stored_scale:.9g} is {ratio:.6g} times amax/2688 of the base"
            f"{searched}",
            observed=ratio,
            expected=1.0,
            **at_part(weight, Part.GLOBAL_SCALE),
        )


def _misfits(context: RuleContext) -> Iterator[tuple[LogicalWeight, WeightAudit, float]]:
    """Yield weights whose global scale neither their own amax nor their group's gives."""
    if context.audit is None:
        return
    judged = [
        (weight, audit)
        for weight, audit in _native(context)
        if audit.amax > 0 and not audit.counts["not_finite"]
    ]
    group_amax = _group_amax(context.audit, [weight for weight, _ in judged])
    fitted = _fitted(judged)
    away = _ulps(judged, {audit.name: audit.amax for _, audit in judged})
    away_from_group = _ulps(judged, group_amax)
    for weight, audit in judged:
        ratio = NVFP4.full_scale * audit.global_decode / group_amax[audit.name]
        if audit.name in fitted:
            continue
        if audit.slack and abs(ratio - 1) <= audit.slack + _FLOAT32_ROUNDINGS:
            continue
        if min(away[audit.name], away_from_group[audit.name]) > 1:
            yield weight, audit, ratio


def _fitted(judged: list[tuple[LogicalWeight, WeightAudit]]) -> set[str]:
    """Name the weights whose amax, or their group's, hangs on factors that are stored nowhere."""
    found = {audit.name for _, audit in judged if audit.way == Way.SMOOTHED_BY_LINEAR}
    for group in fused_groups(weight for weight, _ in judged):
        names = {member.name for member in group.members}
        found |= names if names & found else set()
    return found


def _group_amax(audit: AuditOutcome, weights: list[LogicalWeight]) -> dict[str, float]:
    """Return the largest amax of each weight's fused group, its own where it is in none."""
    found = {weight.name: audit.weights[weight.name].amax for weight in weights}
    for group in fused_groups(weights):
        largest = max(found[member.name] for member in group.members)
        found.update((member.name, largest) for member in group.members)
    return found


def _ulps(
    judged: list[tuple[LogicalWeight, WeightAudit]], amaxes: Mapping[str, float]
) -> dict[str, int]:
    """Measure every stored scale against those of an amax, all of one kind together."""
    import torch  # here, so that listing rules loads no torch

    from nvfp4check.checkpoint.audit.global_scale import ulps_away

    kinds: dict[tuple[str, bool], list[WeightAudit]] = {}
    for weight, audit in judged:
        kinds.setdefault((audit.dtype, weight.global_scale_is_reciprocal), []).append(audit)
    found: dict[str, int] = {}
    for (dtype, reciprocal), audits in kinds.items():
        ulps = ulps_away(
            [audit.stored_scale for audit in audits],
            [amaxes[audit.name] for audit in audits],
            getattr(torch, dtype),
            reciprocal=reciprocal,
        )
        found.update((audit.name, number) for audit, number in zip(audits, ulps, strict=True))
    return found


RULES: tuple[Rule, ...] = (
    audit_bound,
    audit_not_nearest,
    audit_foreign,
    audit_unquantized_changed,
    audit_global_scale,
)
