"""Norms that differ from the base's: smoothing that the linears behind them undo, or a change.

What a norm is multiplied by, every linear that it feeds must be divided by. Where one is not, its
input is another than in the base, however sound each tensor is by itself.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from nvfp4check.checkpoint.audit.results import Copied, CopyAudit, WeightAudit
from nvfp4check.checkpoint.audit.smoothing import norm_before
from nvfp4check.checkpoint.naming import Part
from nvfp4check.checkpoint.opening import Checkpoint


def judge_norms(
    checkpoint: Checkpoint, weights: Mapping[str, WeightAudit], copies: Mapping[str, CopyAudit]
) -> tuple[dict[str, CopyAudit], list[str]]:
    """Tell smoothed norms from changed ones; return also those that cannot be told.

    These are norms of which no linear was audited, in a checkpoint where others are smoothed.
    """
    others = _is_smoothed(checkpoint, weights)
    changed = {name for name, copy in copies.items() if copy.how == Copied.DIFFERENT}
    feeds: dict[str, list[str]] = defaultdict(list)
    for name, weight in checkpoint.weights.items():
        norm = norm_before(weight.module, checkpoint.weights)
        if norm in changed and name == f"{weight.module}.weight":
            feeds[norm].append(name)
    judged, unknown = dict(copies), []
    for norm, linears in feeds.items():
        audited = [name for name in linears if name in weights or name in copies]
        undone = [name for name in audited if _undoes(name, weights, copies)]
        kept = [name for name in audited if _is_the_bases(name, weights, copies)]
        if not audited and others:
            del judged[norm]
            unknown.append(norm)
        elif undone and not kept:
            judged[norm] = replace(
                judged[norm], how=Copied.SMOOTHED.value, different=0, first=None, tensor=None
            )
        elif undone:
            judged[norm] = replace(
                judged[norm],
                remark=f": smoothing that {len(undone):,} of the linears it feeds undo, as "
                f"{undone[0]}, and {len(kept):,} do not, as {kept[0]}, whose input it changes",
            )
    return judged, unknown


def _is_smoothed(checkpoint: Checkpoint, weights: Mapping[str, WeightAudit]) -> bool:
    declared = checkpoint.quantization
    algos = {declared.algo, *(declared.quantized_layers or {}).values()}
    return (
        any(algo is not None and "AWQ" in algo for algo in algos)
        or any(audit.slack for audit in weights.values())
        or any(Part.PRE_QUANT_SCALE in weight.parts for weight in checkpoint.weights.values())
    )


def _undoes(name: str, weights: Mapping[str, WeightAudit], copies: Mapping[str, CopyAudit]) -> bool:
    if name in weights:
        return weights[name].undoes_norm and not weights[name].wrong
    return copies[name].how == Copied.SMOOTHED


def _is_the_bases(
    name: str, weights: Mapping[str, WeightAudit], copies: Mapping[str, CopyAudit]
) -> bool:
    if name in weights:
        return not weights[name].undoes_norm and not weights[name].wrong
    return copies[name].how not in (Copied.SMOOTHED, Copied.DIFFERENT)
