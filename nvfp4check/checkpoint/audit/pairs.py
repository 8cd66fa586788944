"""Which weight is held against which weight of the base, and how; and which cannot be."""

from dataclasses import dataclass, field
from enum import StrEnum

from nvfp4check.checkpoint.audit.smoothing import Smoothing, Smoothings
from nvfp4check.checkpoint.audit.sources import (
    FP8_FORMATS,
    PLAIN_DTYPES,
    why_no_source,
    why_not_fp8,
)
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.scan import why_not_scannable
from nvfp4check.checkpoint.storage import StorageError

#: A global scale outside these is no normal float32 in one of its directions: NV301 says so.
_LEAST_SCALE, _LARGEST_SCALE = 2.0**-126, 2.0**126


class Kind(StrEnum):
    """How a weight is held against its base."""

    QUANTIZED = "quantised"
    COPIED = "copied"


@dataclass(frozen=True, slots=True)
class Pair:
    """A weight and the base's weight of the same name."""

    weight: LogicalWeight
    base: LogicalWeight
    kind: Kind
    smoothing: Smoothing | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the audit of it reads."""
        return self.weight.nbytes + self.base.nbytes


@dataclass(slots=True)
class Pairing:
    """The pairs, and what is left over."""

    pairs: list[Pair] = field(default_factory=list)
    #: Weights that cannot be held against their base, with the reason.
    hindered: dict[str, str] = field(default_factory=dict)
    #: Weights that are quantised in the base too: held against it as copies, not audited.
    quantized_before: list[str] = field(default_factory=list)
    #: Weights that the base does not have.
    added: list[str] = field(default_factory=list)
    #: Weights of the base that are not here.
    missing: list[str] = field(default_factory=list)


def pair_weights(checkpoint: Checkpoint, base: Checkpoint) -> Pairing:
    """Pair the weights of a checkpoint with those of its base by name."""
    found = Pairing()
    smoothings = Smoothings(checkpoint, base)
    for name, weight in checkpoint.weights.items():
        if weight.format is WeightFormat.KV_SCALE:
            continue
        other = base.weights.get(name)
        if other is None:
            found.added.append(name)
            continue
        why = _why_not(checkpoint, weight, other)
        if why is not None:
            found.hindered[name] = why
            continue
        kind = Kind.COPIED
        try:
            smoothing = smoothings.of(weight)
        except (ValueError, StorageError) as error:
            found.hindered[name] = f"the factors that its columns were divided by: {error}"
            continue
        if weight.format is WeightFormat.NVFP4:
            if other.format is WeightFormat.NVFP4:
                found.quantized_before.append(name)
            else:
                kind = Kind.QUANTIZED
        found.pairs.append(Pair(weight, other, kind, smoothing))
    found.missing = [
        name
        for name, weight in base.weights.items()
        if name not in checkpoint.weights and weight.format is not WeightFormat.KV_SCALE
    ]
    return found


def _why_not(checkpoint: Checkpoint, weight: LogicalWeight, base: LogicalWeight) -> str | None:
    if weight.shape != base.shape:
        return f"its shape {list(weight.shape)} is not the base's {list(base.shape)}"
    if weight.format is base.format:
        return None
    if weight.format is WeightFormat.NVFP4:
        return (
            why_not_scannable(weight)
            or _why_no_global_scale(checkpoint, weight)
            or why_no_source(base)
        )
    if weight.format in FP8_FORMATS:
        return why_not_fp8(weight) or why_no_source(base)
    if weight.format in PLAIN_DTYPES and Part.PLAIN in weight.parts:
        return why_no_source(base)
    return f"it is stored as {weight.format}, and the base as {base.format}"


def _why_no_global_scale(checkpoint: Checkpoint, weight: LogicalWeight) -> str | None:
    entry = weight.parts.get(Part.GLOBAL_SCALE)
    if entry is None:
        return "it has no global scale (NV107)"
    try:
        value = checkpoint.scalar(entry)
    except (ValueError, StorageError) as error:
        return f"its global scale cannot be read: {error}"
    if not _LEAST_SCALE <= value <= _LARGEST_SCALE:
        return f"its global scale is {value:g} (NV301)"
    return None
