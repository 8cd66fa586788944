"""What is in a checkpoint: data for `nvfp4check inspect`, without judgement.

Contract:
    histograms count every code and every block scale, not a sample
    sd is the standard deviation of the decoded weight, from exact sums
    global and input scales are given in the direction that multiplies, whatever the file stores
    values of the first rows are decoded in float32 by the reference
"""

import difflib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nvfp4check import __version__
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.checkpoint.rules.shared import kind
from nvfp4check.checkpoint.rules.siblings import decode_scale, is_valid_scale, stored_scalar
from nvfp4check.checkpoint.scan import WeightScan, scan, why_not_scannable, with_new_maps
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.checkpoint.summary import producer_of
from nvfp4check.findings import CheckError

SCHEMA = "nvfp4check/inspect/1"

_ROWS, _COLUMNS = 4, 16
_PIECE = 1 << 22
#: Bytes read before maps are let go, so that what is resident stays bounded.
_MAPPED_BYTES = 64 << 20
#: By dtype: numpy type of the bits, mask of the exponent, mask of the mantissa.
_FLOATS = {
    "BF16": ("<u2", 0x7F80, 0x007F),
    "F16": ("<u2", 0x7C00, 0x03FF),
    "F32": ("<u4", 0x7F800000, 0x007FFFFF),
}


@dataclass(frozen=True, slots=True)
class FormatTotals:
    """The weights of one format."""

    weights: int
    elements: int
    bytes: int


@dataclass(frozen=True, slots=True)
class KindRow:
    """The weights of one kind of module, one shape and one format."""

    kind: str
    format: str
    shape: tuple[int, ...]
    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Smallest, median and largest of some numbers."""

    count: int
    min: float
    median: float
    max: float


@dataclass(frozen=True, slots=True)
class NonFinite:
    """NaN and infinite elements of a tensor."""

    tensor: str
    nan: int
    infinite: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One stored tensor of a weight."""

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class WeightView:
    """One weight in detail."""

    name: str
    format: str
    layout: str
    shape: tuple[int, ...]
    stored: tuple[StoredTensor, ...]
    global_decode_scale: float | None
    input_decode_scale: float | None
    mean: float | None
    sd: float | None
    #: First rows and columns, decoded; numbers that JSON lacks are None.
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class InspectionResult:
    """What is in a checkpoint, or in one weight of it when `weight` is set."""

    location: str
    producer: str | None
    architecture: str | None
    tensors: int
    bytes: int
    formats: Mapping[str, FormatTotals]
    kinds: tuple[KindRow, ...]
    #: By code, 0 to 15, and by scale byte, 0 to 255; None where nothing was read.
    code_histogram: tuple[int, ...] | None
    scale_histogram: tuple[int, ...] | None
    global_scales: Spread | None
    input_scales: Spread | None
    sds: Spread | None
    non_finite: tuple[NonFinite, ...]
    weight: WeightView | None
    #: Weights whose bytes could not be read as what they claim to be, and why.
    skipped: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the document of `inspect --format json`."""
        return {
            "schema": SCHEMA,
            "tool": {"name": "nvfp4check", "version": __version__},
            **asdict(self),
        }


def inspect(
    checkpoint: Checkpoint,
    tensor: str | None = None,
    *,
    level: RuleLevel = RuleLevel.BYTES,
    progress: Callable[[int], None] | None = None,
) -> InspectionResult:
    """Look at a whole checkpoint, or at one weight.

    `progress` hears of the bytes of each weight as it has been read.

    Raises:
        CheckError: There is no such weight.
    """
    weights = list(checkpoint.weights.values())
    chosen = weights if tensor is None else [find_weight(checkpoint, tensor)]
    looks = _Looks()
    if level is RuleLevel.BYTES:
        mapped, read = with_new_maps(checkpoint), 0
        for weight in chosen:
            if read > _MAPPED_BYTES:
                mapped, read = with_new_maps(checkpoint), 0
            looks.look_at(mapped, weight)
            read += weight.nbytes
            if progress is not None:
                progress(weight.nbytes)
    detail = None
    if tensor is not None:
        detail = _view(checkpoint, chosen[0], looks.scans.get(chosen[0].name), level)
    return InspectionResult(
        location=checkpoint.location,
        producer=producer_of(checkpoint.quantization),
        architecture=checkpoint.architecture,
        tensors=len(checkpoint.tensors),
        bytes=checkpoint.nbytes,
        formats=_formats(weights),
        kinds=_kinds(chosen),
        code_histogram=looks.codes(),
        scale_histogram=looks.scales(),
        global_scales=_spread(_decode_scales(checkpoint, chosen, Part.GLOBAL_SCALE, level)),
        input_scales=_spread(_decode_scales(checkpoint, chosen, Part.INPUT_SCALE, level)),
        sds=_spread(looks.sds),
        non_finite=tuple(looks.non_finite),
        weight=detail,
        skipped=tuple(looks.skipped),
    )


def find_weight(checkpoint: Checkpoint, name: str) -> LogicalWeight:
    """Find a weight by its name, its module's, or that of a stored tensor.

    Raises:
        CheckError: There is none; the message offers names that are close.
    """
    weights = checkpoint.weights
    for candidate in (name, f"{name}.weight"):
        if candidate in weights:
            return weights[candidate]
    for weight in weights.values():
        if any(entry.name == name for entry in weight.entries):
            return weight
    close = difflib.get_close_matches(name, weights, n=3)
    hint = f"; close to it: {', '.join(close)}" if close else ""
    raise CheckError(
        f"{checkpoint.location}: no tensor, module or weight {name!r} among "
        f"{len(weights):,} weights{hint}"
    )


class _Looks:
    """What reading the bytes of weights adds up to."""

    def __init__(self) -> None:
        self.scans: dict[str, WeightScan] = {}
        self.sds: list[float] = []
        self.non_finite: list[NonFinite] = []
        self.skipped: list[tuple[str, str]] = []
        self._codes = np.zeros(16, np.int64)
        self._scales = np.zeros(256, np.int64)
        self._scanned = 0

    def look_at(self, checkpoint: Checkpoint, weight: LogicalWeight) -> None:
        """Read a weight."""
        try:
            if weight.format is WeightFormat.NVFP4:
                self._scan(checkpoint, weight)
            else:
                self._count_non_finite(checkpoint, weight)
        except StorageError as error:
            self.skipped.append((weight.name, str(error)))

    def _scan(self, checkpoint: Checkpoint, weight: LogicalWeight) -> None:
        why = why_not_scannable(weight)
        if why is not None:
            self.skipped.append((weight.name, why))
            return
        found = scan(checkpoint, weight)
        self.scans = {weight.name: found}  # the last one: a whole checkpoint's are not kept
        self._codes += np.array(found.code_counts)
        self._scales[: len(found.scale_counts)] += np.array(found.scale_counts, np.int64)
        self._scanned += 1
        stored = stored_scalar(checkpoint, weight, Part.GLOBAL_SCALE)
        if stored is not None and is_valid_scale(stored):
            self.sds.append(found.sd * decode_scale(weight, stored))

    def _count_non_finite(self, checkpoint: Checkpoint, weight: LogicalWeight) -> None:
        for entry in weight.entries:
            nan = infinite = 0
            for start in range(0, entry.nbytes, _PIECE):
                piece = checkpoint.tensor_bytes(entry, start, min(start + _PIECE, entry.nbytes))
                if entry.dtype == "F8_E4M3":
                    nan += int(np.count_nonzero(piece & 0x7F == 0x7F))
                elif entry.dtype in _FLOATS:
                    form, exponent, mantissa = _FLOATS[entry.dtype]
                    bits = piece.view(form)
                    special = bits[bits & exponent == exponent]
                    nan += int(np.count_nonzero(special & mantissa))
                    infinite += int(np.count_nonzero(special & mantissa == 0))
            if nan or infinite:
                self.non_finite.append(NonFinite(entry.name, nan, infinite))

    def codes(self) -> tuple[int, ...] | None:
        """Give the histogram of codes, None where none were read."""
        return tuple(self._codes.tolist()) if self._scanned else None

    def scales(self) -> tuple[int, ...] | None:
        """Give the histogram of scale bytes, None where none were read."""
        return tuple(self._scales.tolist()) if self._scanned else None


def _formats(weights: Iterable[LogicalWeight]) -> dict[str, FormatTotals]:
    found: dict[str, list[int]] = {}
    for weight in weights:
        totals = found.setdefault(weight.format.value, [0, 0, 0])
        totals[0] += 1
        totals[1] += math.prod(weight.shape)
        totals[2] += weight.nbytes
    return {name: FormatTotals(*totals) for name, totals in sorted(found.items())}


def _kinds(weights: Iterable[LogicalWeight]) -> tuple[KindRow, ...]:
    counts: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    sizes: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for weight in weights:
        row = (kind(weight.name), weight.format.value, weight.shape)
        counts[row] += 1
        sizes[row] += weight.nbytes
    return tuple(KindRow(*row, counts[row], sizes[row]) for row in sorted(counts))


def _decode_scales(
    checkpoint: Checkpoint, weights: Iterable[LogicalWeight], part: Part, level: RuleLevel
) -> list[float]:
    if level is RuleLevel.HEADERS:
        return []
    found = []
    for weight in weights:
        if weight.format is WeightFormat.NVFP4:
            stored = stored_scalar(checkpoint, weight, part)
            if stored is not None and is_valid_scale(stored):
                found.append(decode_scale(weight, stored))
    return found


def _spread(numbers: list[float]) -> Spread | None:
    if not numbers:
        return None
    return Spread(len(numbers), min(numbers), statistics.median(numbers), max(numbers))


def _view(
    checkpoint: Checkpoint, weight: LogicalWeight, found: WeightScan | None, level: RuleLevel
) -> WeightView:
    stored = tuple(
        StoredTensor(
            entry.name, part.value, entry.dtype, entry.shape, entry.shard, entry.start, entry.stop
        )
        for part, entry in weight.parts.items()
    )
    scales = {
        part: next(iter(_decode_scales(checkpoint, [weight], part, level)), None)
        for part in (Part.GLOBAL_SCALE, Part.INPUT_SCALE)
    }
    scale = scales[Part.GLOBAL_SCALE]
    known = found is not None and scale is not None
    return WeightView(
        name=weight.name,
        format=weight.format.value,
        layout=weight.layout.value,
        shape=weight.shape,
        stored=stored,
        global_decode_scale=scale,
        input_decode_scale=scales[Part.INPUT_SCALE],
        mean=found.mean * scale if known and found and scale else None,
        sd=found.sd * scale if known and found and scale else None,
        values=_first_rows(checkpoint, weight, scale) if level is RuleLevel.BYTES else (),
    )


def _first_rows(
    checkpoint: Checkpoint, weight: LogicalWeight, scale: float | None
) -> tuple[tuple[float | None, ...], ...]:
    """Decode the first rows; none where a part that it takes is not there."""
    import torch

    from nvfp4check.checkpoint.audit.sources import why_not_fp8
    from nvfp4ref import fp8, fp8_block, nvfp4

    def part(name: Part) -> torch.Tensor | None:
        entry = weight.parts.get(name)
        return checkpoint.torch(entry) if entry is not None else None

    codes, plain = part(Part.CODES), part(Part.PLAIN)
    if weight.format is WeightFormat.NVFP4:
        block_scales = part(Part.BLOCK_SCALES)
        sound = why_not_scannable(weight) is None
        if codes is None or block_scales is None or scale is None or not sound:
            return ()
        codes = codes.reshape(-1, weight.shape[-1] // 2)
        block_scales = block_scales.reshape(len(codes), -1)
        decoded = nvfp4.dequantize(codes[:_ROWS], block_scales[:_ROWS], torch.tensor(scale))
    elif weight.format is WeightFormat.FP8_BLOCK:
        inverse = part(Part.SCALE_INV)
        tiles = tuple(-(-size // 128) for size in weight.shape)
        if codes is None or inverse is None or tuple(inverse.shape) != tiles:
            return ()
        decoded = fp8_block.dequantize(codes[:_ROWS], inverse[:1])
    elif weight.format is WeightFormat.FP8 and plain is None:
        scales = part(Part.SCALE)
        if codes is None or scales is None or why_not_fp8(weight) is not None:
            return ()
        decoded = fp8.dequantize(codes[:_ROWS], scales if scales.numel() == 1 else scales[:_ROWS])
    elif plain is not None and plain.is_floating_point() and plain.numel():
        decoded = plain.reshape(-1, plain.shape[-1] if plain.ndim else 1)
    else:
        return ()
    rows = decoded[:_ROWS, :_COLUMNS].double().tolist()
    return tuple(tuple(value if math.isfinite(value) else None for value in row) for row in rows)
