"""The audit of one quantised weight: streamed by rows, its counts in plain numbers.

Contract:
    counts      exact; what each of them means stands in `kernel`
    amax        largest magnitude of the base's finite elements
    stranger    a row whose signs are not the base's. Rounding keeps the sign of every element, so
                that of live ones, whose code is no zero, none may differ; of two unrelated rows
                half do. A row is strange when more than a quarter of its live signs differ, and it
                has `_LEAST_SIGNS` of them (32 of an unrelated row differ in fewer with a
                probability of 0.4 %); or when `_STRANGE_BLOCKS` of its blocks are strange by
                themselves (`kernel`), as where ranks of a sharded export changed places
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nvfp4check.checkpoint.audit.edges import judge_edges
from nvfp4check.checkpoint.audit.kernel import COUNTS, Count, audit_rows
from nvfp4check.checkpoint.audit.numbers import (
    CONVENTIONS,
    LEAST_SCALES,
    SCALE_WAY_OF,
    SCALING_OF,
    Numbers,
    numbers_for,
)
from nvfp4check.checkpoint.audit.results import Way, WeightAudit
from nvfp4check.checkpoint.audit.smoothing import Smoothing
from nvfp4check.checkpoint.audit.sources import (
    Reader,
    Source,
    frozen,
    matrix_shape,
    row_pieces,
)
from nvfp4check.checkpoint.naming import Layout, LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4ref import nvfp4
from nvfp4ref.conventions import RULES, NegativeZero
from nvfp4ref.formats import BLOCK_SIZE

#: Signs that a row must have to be judged by them.
_LEAST_SIGNS = 32
#: Strange blocks that make a row strange.
_STRANGE_BLOCKS = 4
#: Edge blocks that the reference looks at together.
_EDGES = 1 << 12


def stored_global_scales(
    checkpoint: Checkpoint, weight: LogicalWeight
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the global decode and encode scale float32, one as stored, the other its reciprocal.

    Raises:
        ValueError: The scale has not one element, or is no floating-point number.
    """
    value = checkpoint.scalar(weight.parts[Part.GLOBAL_SCALE])
    stored = torch.tensor(value, dtype=torch.float32)
    if weight.global_scale_is_reciprocal:
        return stored.reciprocal(), stored
    return stored, stored.reciprocal()


class _Tallies:
    """What the kernel counts into."""

    def __init__(self, rows: int) -> None:
        self.counts = np.zeros(COUNTS, np.int64)
        self.scale_ways = np.zeros(len(LEAST_SCALES), np.int64)
        self.scalings = np.zeros(4, np.int64)
        self.zero_blocks = np.zeros(256, np.int64)
        self.places = np.full(2, -1, np.int64)
        self.worst = np.zeros(1, np.float64)
        self.row_signs = np.zeros((rows, 3), np.int64)
        #: Of edges, by convention.
        self.scale_differs = np.zeros(len(CONVENTIONS), np.int64)
        self.code_differs = np.zeros(len(CONVENTIONS), np.int64)
        self.largest = 0

    @property
    def for_kernel(self) -> tuple[Any, ...]:
        return (
            self.counts,
            self.scale_ways,
            self.scalings,
            self.zero_blocks,
            self.places,
            self.worst,
        )


@dataclass(frozen=True, slots=True)
class Factored:
    """What columns were divided by, and rows multiplied by, before a weight was quantised."""

    way: Way
    #: As in `smoothing`.
    slack: float
    columns: npt.NDArray[np.float64]
    rows: npt.NDArray[np.float64] | None = None
    #: Whether the columns' factors are those by which the norm before was multiplied.
    undoes_norm: bool = False


def audit_weight(
    reader: Reader,
    weight: LogicalWeight,
    base_reader: Reader,
    base: LogicalWeight,
    smoothing: Smoothing | None = None,
) -> WeightAudit:
    """Audit one NVFP4 weight against its base, its columns divided by the factors of a smoothing.

    One that is not nearest to a bfloat16 base is held against the base's FP8 conversion too. Where
    the norm before it differs from the base's, the weight may undo that or not; that it does is
    tried second, as it allows for more roundings.

    Raises:
        StorageError: Bytes cannot be read.
        ValueError: The factors are no positive, finite numbers.
    """
    pair = reader, weight, base_reader, base
    stored = None if smoothing is None else smoothing.without_norm
    if stored is None:
        found = _audit(*pair, Way.DIRECT)
    else:
        found = audit_factored(*pair, _factored(reader, base_reader, base, stored))
    if smoothing is not None and smoothing.norm is not None and found.wrong:
        undone = audit_factored(*pair, _factored(reader, base_reader, base, smoothing))
        if undone.wrong < found.wrong:
            return undone
    if stored is not None:
        return found
    if base.format is not WeightFormat.BF16 or not found.wrong or found.is_strange:
        return found
    for way in (Way.FP8, Way.FP8_UE8M0):
        other = _audit(*pair, way)
        if not other.wrong:
            return other
    return found


def _factored(
    reader: Reader, base_reader: Reader, base: LogicalWeight, smoothing: Smoothing
) -> Factored:
    columns = smoothing.factors(reader, base_reader, matrix_shape(base)[1])
    return Factored(
        Way.SMOOTHED if smoothing.norm is None else Way.SMOOTHED_BY_NORM,
        smoothing.slack(Source(base_reader, base).stored_dtype),
        columns,
        undoes_norm=smoothing.norm is not None,
    )


def audit_factored(
    reader: Reader,
    weight: LogicalWeight,
    base_reader: Reader,
    base: LogicalWeight,
    factored: Factored,
) -> WeightAudit:
    """Audit a weight against its base's values after a smoothing.

    Raises:
        StorageError: Bytes cannot be read.
    """
    source = Source(base_reader, base, factors=factored.columns, row_factors=factored.rows)
    found = _audited_from(source, reader, weight, base, factored.way, factored.slack)
    return replace(found, undoes_norm=factored.undoes_norm)


def _audit(
    reader: Reader, weight: LogicalWeight, base_reader: Reader, base: LogicalWeight, way: Way
) -> WeightAudit:
    return _audited_from(Source(base_reader, base, way), reader, weight, base, way, 0.0)


def _audited_from(
    source: Source,
    reader: Reader,
    weight: LogicalWeight,
    base: LogicalWeight,
    way: Way,
    slack: float,
) -> WeightAudit:
    rows, columns = matrix_shape(weight)
    decode, encode = stored_global_scales(reader.checkpoint, weight)
    in_dtype = weight.layout is Layout.COMPRESSED_TENSORS
    numbers = numbers_for(decode, encode, source.stored_dtype, in_dtype=in_dtype, slack=slack)
    tallies = _Tallies(rows)
    for start, stop in row_pieces(rows, columns):
        codes = reader.rows(weight.parts[Part.CODES], start, stop, columns // 2)
        scales = reader.rows(weight.parts[Part.BLOCK_SCALES], start, stop, columns // BLOCK_SIZE)
        _audit_piece(
            source, start, stop, (codes, scales), (decode, encode), numbers, tallies, slack
        )
    _add_zero_blocks(tallies, source.dtype, decode, encode)
    return _audited(weight, base, way, source, tallies, reader.checkpoint, float(decode), slack)


def _audit_piece(
    source: Source,
    start: int,
    stop: int,
    stored: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]],
    globals_: tuple[torch.Tensor, torch.Tensor],
    numbers: Numbers,
    tallies: _Tallies,
    slack: float,
) -> None:
    codes, scales = stored
    words = source.words(start, stop)
    room = np.empty(scales.size, np.int64)
    edges, largest = audit_rows(
        frozen(words),
        frozen(codes),
        frozen(scales),
        start,
        (
            numbers.units,
            numbers.factors,
            numbers.inside,
            numbers.sure,
            numbers.outside,
            numbers.globals,
            numbers.dtype,
            numbers.zone,
        ),
        tallies.for_kernel,
        tallies.row_signs[start:stop],
        room,
        numbers.extreme,
    )
    tallies.largest = max(tallies.largest, int(largest))
    by_block = words.reshape(scales.size, BLOCK_SIZE)
    pairs = codes.reshape(scales.size, BLOCK_SIZE // 2)
    for first in range(0, edges, _EDGES):
        places = room[first : min(first + _EDGES, edges)]
        packed = pairs[places]
        found = judge_edges(
            source.values(by_block[places]),
            torch.from_numpy(np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, BLOCK_SIZE)),
            torch.from_numpy(scales.reshape(-1)[places][:, None]).view(torch.float8_e4m3fn),
            *globals_,
            slack,
        )
        tallies.scale_differs += found.scale_differs
        tallies.code_differs += found.code_differs
        tallies.worst[0] = max(tallies.worst[0], found.worst)
        for count, number in (
            (Count.UNEXPLAINED, found.unexplained),
            (Count.NOT_FINITE, found.not_finite),
            (Count.OFF, int(found.off.sum())),
            (Count.BEYOND, int(found.beyond.sum())),
        ):
            tallies.counts[count] += number
        origin = start * source.columns
        for kind, mask in ((0, found.off), (1, found.beyond)):
            if mask.any():
                block, lane = np.unravel_index(int(mask.argmax()), mask.shape)
                place = origin + int(places[block]) * BLOCK_SIZE + int(lane)
                known = int(tallies.places[kind])
                tallies.places[kind] = place if known < 0 else min(known, place)


def _add_zero_blocks(
    tallies: _Tallies, dtype: torch.dtype, decode: torch.Tensor, encode: torch.Tensor
) -> None:
    """Count the plain blocks of zeros whose scale byte each convention makes otherwise."""
    there = int(tallies.zero_blocks.sum())
    if not there:
        return
    zeros = torch.zeros(1, BLOCK_SIZE, dtype=dtype)
    no_scale = torch.zeros(1, 1, dtype=torch.uint8).view(torch.float8_e4m3fn)
    known = np.zeros(256, bool)
    for place, convention in enumerate(CONVENTIONS):
        made = nvfp4.quantize_block_scales(zeros, decode, convention, global_encode_scale=encode)
        byte = int(made.view(torch.uint8))
        known[byte] = True
        tallies.scale_differs[place] += there - int(tallies.zero_blocks[byte])
        # Zeros are code 0 under every scale but 0, by which some divide.
        codes = nvfp4.quantize_elements(
            zeros, no_scale, decode, convention, global_encode_scale=encode
        )
        tallies.code_differs[place] += int(tallies.zero_blocks[0]) * int((codes != 0).sum())
    tallies.counts[Count.UNEXPLAINED] += int(tallies.zero_blocks[~known].sum())


def _audited(
    weight: LogicalWeight,
    base: LogicalWeight,
    way: Way,
    source: Source,
    tallies: _Tallies,
    checkpoint: Checkpoint,
    decode: float,
    slack: float,
) -> WeightAudit:
    """Put the counts into plain numbers."""
    counts = tallies.counts
    differing, signs, strange_blocks = tallies.row_signs.T
    judged = signs >= _LEAST_SIGNS
    strange = judged & ((4 * differing > signs) | (strange_blocks >= _STRANGE_BLOCKS))
    first_strange = int(strange.argmax()) if strange.any() else None
    whole = not judged.any() and int(signs.sum()) >= _LEAST_SIGNS
    scale_differs, code_differs = {}, {}
    for place, convention in enumerate(CONVENTIONS):
        loses = RULES[convention].negative_zero is NegativeZero.LOSES_SIGN
        minus_zero = counts[Count.MINUS_ZERO_8 if loses else Count.MINUS_ZERO_0]
        scale_differs[convention.value] = int(
            tallies.scale_ways[SCALE_WAY_OF[place]] + tallies.scale_differs[place]
        )
        code_differs[convention.value] = int(
            tallies.scalings[SCALING_OF[place]] + minus_zero + tallies.code_differs[place]
        )
    first_off, first_beyond = (int(place) if place >= 0 else None for place in tallies.places)
    largest = np.array(tallies.largest, np.uint32).view(np.float32)
    return WeightAudit(
        name=weight.name,
        base_format=base.format.value,
        way=way.value,
        dtype=str(source.stored_dtype).removeprefix("torch."),
        rows=source.rows,
        columns=source.columns,
        counts={count.name.lower(): int(counts[count]) for count in Count},
        scale_differs=scale_differs,
        code_differs=code_differs,
        first_off=first_off,
        first_beyond=first_beyond,
        worst=float(tallies.worst[0]),
        amax=float(largest),
        stored_scale=checkpoint.scalar(weight.parts[Part.GLOBAL_SCALE]),
        global_decode=decode,
        judged_rows=int(judged.sum()),
        strange_rows=int(strange.sum()),
        first_strange=first_strange,
        strange_signs=bool(whole and 4 * int(differing.sum()) > int(signs.sum())),
        slack=slack,
    )
