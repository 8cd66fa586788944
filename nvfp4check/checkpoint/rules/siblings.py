"""What the rules on bytes share: scales in one direction, and weights that belong together."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypedDict

from nvfp4check.checkpoint.naming import FUSED_GROUPS, LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.rules.base import Problem, RuleContext
from nvfp4check.checkpoint.scan import WeightScan
from nvfp4check.checkpoint.scan_locate import Spot
from nvfp4check.checkpoint.storage import StorageError

#: The fused groups of an MLP; every other group is of attention.
MLP_GROUPS = frozenset(("gate_up_proj", "w13"))

_EXPERT = re.compile(r"^(?P<layer>.*\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)$")


class Place(TypedDict):
    """Where a problem is, as arguments of `Problem`."""

    tensor: str
    shard: str | None


@dataclass(frozen=True, slots=True)
class FusedGroup:
    """Weights that engines fuse into one linear: its name in vLLM, and the members there are."""

    parent: str
    name: str
    members: tuple[LogicalWeight, ...]


def nvfp4_scans(context: RuleContext) -> Iterator[tuple[LogicalWeight, WeightScan]]:
    """Yield every weight that was scanned, with its scan."""
    weights = context.checkpoint.weights
    for name, scan in context.scans.items():
        if name in weights:
            yield weights[name], scan


def with_global_scale(checkpoint: Checkpoint) -> Iterator[LogicalWeight]:
    """Yield the NVFP4 weights."""
    for weight in checkpoint.weights.values():
        if weight.format is WeightFormat.NVFP4:
            yield weight


def stored_scalar(checkpoint: Checkpoint, weight: LogicalWeight, part: Part) -> float | None:
    """Read a scale of one element; None where there is none or it has another shape or dtype."""
    entry = weight.parts.get(part)
    if entry is None:
        return None
    try:
        return checkpoint.scalar(entry)
    except (ValueError, StorageError):
        return None


def is_valid_scale(value: float) -> bool:
    """Whether a scale is positive, finite and normal in float32."""
    return math.isfinite(value) and value >= 2.0**-126


def decode_scale(weight: LogicalWeight, stored: float) -> float:
    """Turn a stored, valid global or input scale into the direction that multiplies."""
    return 1.0 / stored if weight.global_scale_is_reciprocal else stored


def global_decode_scale(checkpoint: Checkpoint, weight: LogicalWeight) -> float | None:
    """Read a weight's global scale as a multiplier; None where it has no valid one."""
    stored = stored_scalar(checkpoint, weight, Part.GLOBAL_SCALE)
    return decode_scale(weight, stored) if stored is not None and is_valid_scale(stored) else None


def fused_groups(weights: Iterable[LogicalWeight]) -> list[FusedGroup]:
    """Gather weights that engines fuse; only groups with two members or more."""
    group_of = {leaf: name for name, leaves in FUSED_GROUPS.items() for leaf in leaves}
    found: dict[tuple[str, str], list[LogicalWeight]] = {}
    for weight in weights:
        parent, _, leaf = weight.module.rpartition(".")
        if leaf in group_of:
            found.setdefault((parent, group_of[leaf]), []).append(weight)
    return [
        FusedGroup(parent, name, tuple(members))
        for (parent, name), members in found.items()
        if len(members) > 1
    ]


def experts(weights: Iterable[LogicalWeight]) -> dict[str, list[LogicalWeight]]:
    """Gather the experts of one layer and projection."""
    found: dict[str, list[LogicalWeight]] = {}
    for weight in weights:
        match = _EXPERT.match(weight.module)
        if match is not None:
            found.setdefault(f"{match['layer']}.*.{match['projection']}", []).append(weight)
    return found


def at_part(weight: LogicalWeight, part: Part) -> Place:
    """Name the tensor and shard of a part, or the weight where the part is absent."""
    entry = weight.parts.get(part)
    if entry is not None:
        return {"tensor": entry.name, "shard": entry.shard}
    neighbour = next(iter(weight.parts.values()), None)
    return {"tensor": weight.name, "shard": neighbour.shard if neighbour is not None else None}


def scales_problem(
    weight: LogicalWeight, scan: WeightScan, spot: Spot, message: str, **observed: float | str
) -> Problem:
    """Report defective block scales at the first of them."""
    entry = weight.parts[Part.BLOCK_SCALES]
    first = spot.first or 0
    row, column = divmod(first, scan.row_blocks)
    share = f"{spot.count:,} of {scan.blocks:,} blocks, the first at row {row}, block {column}"
    return Problem(
        f"{share}: {message}",
        tensor=entry.name,
        shard=entry.shard,
        offset=entry.start + first,
        count=spot.count,
        observed=dict(observed) or None,
    )
