"""What several rules ask of a checkpoint."""

import re
from collections.abc import Mapping

from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.quant_config import QuantConfig
from nvfp4check.checkpoint.rules.base import Problem, counted, printable
from nvfp4check.findings import JsonValue

#: The one file that loaders find without an index.
SINGLE_SHARD = "model.safetensors"

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SCALES = frozenset((Part.BLOCK_SCALES, Part.GLOBAL_SCALE))


def kind(module: str) -> str:
    """Name the kind of a module: its name with every number replaced."""
    return _NUMBER.sub("*", module)


def stray_shards(checkpoint: Checkpoint) -> tuple[str, ...]:
    """List the shards that no index leads to, although there is a way to the others.

    An index without a single entry leads nowhere: then the index is at fault, and no shard.
    """
    if checkpoint.index is not None:
        return checkpoint.stray_shards if checkpoint.index.weight_map else ()
    present = sorted((*checkpoint.shards, *checkpoint.unreadable))
    return tuple(name for name in present if name != SINGLE_SHARD and SINGLE_SHARD in present)


def nvfp4_weights(checkpoint: Checkpoint) -> list[LogicalWeight]:
    """List the weights that bear scales of NVFP4."""
    return [
        weight
        for weight in checkpoint.weights.values()
        if weight.format is WeightFormat.NVFP4 and not _SCALES.isdisjoint(weight.parts)
    ]


def quantization_document(checkpoint: Checkpoint) -> Mapping[str, object] | None:
    """Give config.json's `quantization_config` as it stands there, or in its `text_config`."""
    config = checkpoint.config or {}
    text_config = config.get("text_config")
    places = (config, text_config if isinstance(text_config, dict) else {})
    for place in places:
        document = place.get("quantization_config")
        if document is not None:
            return document if isinstance(document, dict) else None
    return None


def usable_declaration(checkpoint: Checkpoint) -> QuantConfig | None:
    """Give the declared quantisation that stored weights can be held against.

    None where nothing understood is declared, or where the declaration is of another method than
    the tensors: then NV601, NV602 or NV010 says what is wrong.
    """
    declared = checkpoint.quantization
    if declared.producer is None or not declared.understood:
        return None
    if not declared.is_nvfp4 and nvfp4_weights(checkpoint):
        return None
    return declared


def is_nvfp4(weight: LogicalWeight, declared: QuantConfig | None) -> bool:
    """Whether a weight is meant to be NVFP4, whatever the dtypes of its parts are."""
    if Part.GLOBAL_SCALE in weight.parts:
        return True
    scales = weight.parts.get(Part.BLOCK_SCALES)
    if scales is not None and scales.dtype == "F8_E4M3":
        return True
    algo = None if declared is None else declared.algo_of(weight.module)
    packed = weight.format in (WeightFormat.NVFP4, WeightFormat.MXFP4)
    return packed and algo is not None and "NVFP4" in algo


def at(
    entry: TensorEntry, message: str, observed: JsonValue = None, expected: JsonValue = None
) -> Problem:
    """Make a problem at a stored tensor."""
    return Problem(
        message,
        tensor=entry.name,
        shard=entry.shard,
        offset=entry.start,
        observed=observed,
        expected=expected,
    )


class Absence:
    """Whether another rule, or a file that could not be read, accounts for an absent tensor."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        index = checkpoint.index
        self._placed: Mapping[str, str] = index.weight_map if index is not None else {}
        self._tensors = checkpoint.tensors
        lost = {*checkpoint.unreadable, *checkpoint.missing_shards}
        if index is not None:
            lost |= index.unsafe.keys()
        lost |= {name for name in checkpoint.unsafe if name.endswith(".safetensors")}
        self.lost_shards = tuple(sorted(lost))
        # A complete index tells what the lost shards held; an incomplete one does not.
        complete = bool(self._placed) and self._placed.keys() >= checkpoint.tensors.keys()
        self._unknown = bool(lost) and (
            not complete or bool(index and index.unsafe) or not lost <= set(self._placed.values())
        )

    def explained(self, *names: str) -> bool:
        """Whether the index places one of the absent names: then NV001 to NV003 tell of it."""
        return any(name in self._placed and name not in self._tensors for name in names)

    @property
    def uncertain(self) -> bool:
        """Whether a shard that could not be read may hold tensors that the index does not list."""
        return self._unknown

    @property
    def why(self) -> str:
        """Say which shards could not be read."""
        return (
            f"{counted(len(self.lost_shards), 'shard')} could not be read, the first "
            f"{printable(self.lost_shards[0])}, and the index does not tell what they hold"
        )
