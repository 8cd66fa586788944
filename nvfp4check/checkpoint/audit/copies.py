"""The audit of one weight that should have been copied: the same bits as the base's, and how.

Contract:
    bytes        every stored tensor of it has the base's bytes
    dequantised  the base is FP8 128 x 128, the copy plain: element * scale rounded to float32, then
                 to the copy's dtype
    cast         the base is plain, of another dtype: each value rounded once, to nearest even
    by FP8       the base is bfloat16, and so is the copy: the base's values taken through FP8
    smoothed     the norm before it was multiplied by factors, and the copy's columns were divided
                 by them: each element within the roundings of that (`smoothing`)
    converted    the base is bfloat16, the copy FP8 128 x 128: it means what the base does when
                 taken through FP8. FP8 by rows, under one scale, or with scales of 16 bits:
                 `converted`
    different    none of these; elements that differ from the one that fits best are counted
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from nvfp4check.checkpoint.audit.converted import audit_converted
from nvfp4check.checkpoint.audit.results import Copied, CopyAudit, Way
from nvfp4check.checkpoint.audit.smoothing import Smoothing
from nvfp4check.checkpoint.audit.sources import (
    FP8_FORMATS,
    PLAIN_DTYPES,
    Array,
    Reader,
    Source,
    matrix_shape,
    row_pieces,
    scale_of,
    why_no_source,
)
from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat


def audit_copy(
    reader: Reader,
    weight: LogicalWeight,
    base_reader: Reader,
    base: LogicalWeight,
    smoothing: Smoothing | None = None,
) -> CopyAudit:
    """Audit one copied weight, which may undo what a smoothing did to the norm before it.

    Raises:
        StorageError: Bytes cannot be read.
        ValueError: The factors are no positive, finite numbers.
    """
    ways = tuple(_ways(weight, base))
    best: CopyAudit | None = None
    for how, way in ways:
        if how is Copied.BYTES:
            found = _same_bytes(reader, weight, base_reader, base)
        else:
            found = _same_values(reader, weight, Source(base_reader, base, way), base, how)
        if not found.different:
            return found
        if best is None or found.different < best.different:
            best = found
    if weight.format in FP8_FORMATS and (best is None or _scaled_otherwise(weight, base)):
        found = audit_converted(reader, weight, Source(base_reader, base), base)
        if best is None or found.different < best.different:
            best = found
    assert best is not None
    if smoothing is not None and weight.format in PLAIN_DTYPES and why_no_source(base) is None:
        smoothed = _smoothed(reader, weight, base_reader, base, smoothing)
        if not smoothed.different:
            return smoothed
    return best


def _smoothed(
    reader: Reader,
    weight: LogicalWeight,
    base_reader: Reader,
    base: LogicalWeight,
    smoothing: Smoothing,
) -> CopyAudit:
    """Count elements farther from the base's, divided by the factors, than roundings allow."""
    rows, columns = matrix_shape(weight)
    factors = smoothing.factors(reader, base_reader, columns)
    mine, theirs = Source(reader, weight), Source(base_reader, base, factors=factors)
    slack = smoothing.slack(mine.stored_dtype)
    different, first = 0, None
    for start, stop in row_pieces(rows, columns):
        expected = theirs.tensor(start, stop, torch.float64)
        error = (mine.tensor(start, stop, torch.float64) - expected).abs()
        unlike = ~(error <= slack * expected.abs())
        different += int(unlike.sum())
        if first is None and bool(unlike.any()):
            first = start * columns + int(unlike.flatten().int().argmax())
    return _audited(weight, base, Copied.SMOOTHED, different, first=first)


def _ways(weight: LogicalWeight, base: LogicalWeight) -> Iterator[tuple[Copied, Way]]:
    """List how a copy may have come from its base, the likeliest first."""
    if weight.format is base.format:
        yield Copied.BYTES, Way.DIRECT
        if weight.format is WeightFormat.BF16 and len(weight.shape) == 2:
            yield Copied.BY_FP8, Way.FP8
            yield Copied.BY_FP8, Way.FP8_UE8M0
    elif weight.format in FP8_FORMATS:
        tiled = weight.format is WeightFormat.FP8_BLOCK and base.format is WeightFormat.BF16
        if tiled and scale_of(weight).dtype == "F32":
            yield Copied.CONVERTED, Way.FP8
            yield Copied.CONVERTED, Way.FP8_UE8M0
    elif base.format in FP8_FORMATS:
        yield Copied.DEQUANTIZED, Way.DIRECT
    else:
        yield Copied.CAST, Way.DIRECT


def _scaled_otherwise(weight: LogicalWeight, base: LogicalWeight) -> bool:
    """Whether both are FP8 whose scales are stored in other dtypes, or for other elements."""
    if base.format not in FP8_FORMATS or why_no_source(weight) or why_no_source(base):
        return False
    mine, theirs = scale_of(weight), scale_of(base)
    return (mine.dtype, mine.numel) != (theirs.dtype, theirs.numel)


def _audited(
    weight: LogicalWeight, base: LogicalWeight, how: Copied, different: int, **where: Any
) -> CopyAudit:
    rows, columns = matrix_shape(weight)
    return CopyAudit(
        name=weight.name,
        format=weight.format.value,
        base_format=base.format.value,
        how=(Copied.DIFFERENT if different else how).value,
        elements=rows * columns,
        different=different,
        **where,
    )


def _same_bytes(
    reader: Reader, weight: LogicalWeight, base_reader: Reader, base: LogicalWeight
) -> CopyAudit:
    for part, entry in weight.parts.items():
        other = base.parts.get(part)
        if other is None or part is Part.INPUT_SCALE:
            continue
        if (other.dtype, other.shape) != (entry.dtype, entry.shape):
            unlike: tuple[int, int | None] = max(1, entry.numel), 0
        else:
            unlike = _differing(reader, entry, base_reader, other)
        if unlike[0]:
            return _audited(
                weight, base, Copied.BYTES, unlike[0], first=unlike[1], tensor=entry.name
            )
    return _audited(weight, base, Copied.BYTES, 0)


def _differing(
    reader: Reader, entry: TensorEntry, base_reader: Reader, other: TensorEntry
) -> tuple[int, int | None]:
    """Count elements whose bytes differ, and find the first."""
    size = max(1, entry.nbytes // max(1, entry.numel))
    columns = entry.shape[-1] if entry.shape else 1
    rows = entry.numel // max(1, columns)
    different, first = 0, None
    for start, stop in row_pieces(rows, columns):
        mine = reader.rows(entry, start, stop, columns * size)
        theirs = base_reader.rows(other, start, stop, columns * size)
        if np.array_equal(mine, theirs):
            continue
        unlike = (mine != theirs).reshape(-1, size).any(axis=1)
        different += int(unlike.sum())
        if first is None:
            first = start * columns + int(unlike.argmax())
    return different, first


def _same_values(
    reader: Reader, weight: LogicalWeight, source: Source, base: LogicalWeight, how: Copied
) -> CopyAudit:
    """Compare with the base's values in the dtype of the copy."""
    converted = Source(reader, weight) if how is Copied.CONVERTED else None
    entry = weight.parts[Part.CODES if converted else Part.PLAIN]
    dtype = torch.bfloat16 if converted else PLAIN_DTYPES[weight.format]
    rows, columns = matrix_shape(weight)
    different, first = 0, None
    for start, stop in row_pieces(rows, columns):
        if converted is None:
            mine = reader.rows(entry, start, stop, columns * dtype.itemsize)
        else:
            mine = _as_bytes(converted.tensor(start, stop, dtype))
        expected = _as_bytes(source.tensor(start, stop, dtype))
        if np.array_equal(mine, expected):
            continue
        unlike = (mine != expected).reshape(-1, dtype.itemsize).any(axis=1)
        different += int(unlike.sum())
        if first is None:
            first = start * columns + int(unlike.argmax())
    return _audited(
        weight, base, how, different, first=first, tensor=entry.name if different else None
    )


def _as_bytes(values: torch.Tensor) -> Array:
    return values.contiguous().view(torch.uint8).numpy()
