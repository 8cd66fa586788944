"""What kind of checkpoint one is, in a few words: what heads every report."""

from collections import Counter
from dataclasses import dataclass

from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.quant_config import QuantConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """What kind of checkpoint it is. `formats` counts logical weights."""

    location: str
    producer: str | None
    architecture: str | None
    formats: dict[str, int]
    bytes: int


def summary_of(checkpoint: Checkpoint) -> CheckpointSummary:
    """Say what kind of checkpoint it is."""
    formats = Counter(weight.format.value for weight in checkpoint.weights.values())
    return CheckpointSummary(
        location=checkpoint.location,
        producer=producer_of(checkpoint.quantization),
        architecture=checkpoint.architecture,
        formats=dict(sorted(formats.items())),
        bytes=checkpoint.nbytes,
    )


def producer_of(declared: QuantConfig) -> str | None:
    """Name the producer with its version, None where nothing is declared."""
    name = declared.producer_name or declared.producer
    return " ".join(part for part in (name, declared.producer_version) if part) or None
