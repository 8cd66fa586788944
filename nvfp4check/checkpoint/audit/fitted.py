"""Smoothing that a producer put into the linear before: factors that are stored nowhere, found.

Contract:
    pair      a linear `into`, whose rows were multiplied by p > 0, and one `out_of`, whose columns
              were divided by it: up_proj and down_proj, v_proj and o_proj; the product is kept, as
              nothing but a product with gate's lies between (or a mean over tokens)
    interval  of p, for an element: where its code is nearest to W / p, or to W * p, but for the
              slack of `smoothing` and one rounding more; under the largest block scale an element
              is at most 6 times that
    p         a number that lies in the intervals of all elements of a column and of a row; where
              there is none, one that lies in the most
    accepted  where both weights have, under p, at most a quarter of the wrong elements they have
              without; all that are left are findings
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nvfp4check.checkpoint.audit.numbers import MIDPOINTS, ROUNDOFF, ZONE
from nvfp4check.checkpoint.audit.pairs import Pair
from nvfp4check.checkpoint.audit.results import Way, WeightAudit
from nvfp4check.checkpoint.audit.smoothing import Smoothing
from nvfp4check.checkpoint.audit.sources import (
    PLAIN_DTYPES,
    Reader,
    Source,
    matrix_shape,
    row_pieces,
)
from nvfp4check.checkpoint.audit.weights import Factored, audit_factored, stored_global_scales
from nvfp4check.checkpoint.naming import Part, WeightFormat
from nvfp4ref import e4m3
from nvfp4ref.formats import BLOCK_SIZE, E2M1

Floats = npt.NDArray[np.float64]

#: The largest block scale, 448.
_LARGEST_BYTE = 0x7E
#: The linear whose rows take the factors, and the one whose columns lose them.
_PAIRS = {"up_proj": "down_proj", "v_proj": "o_proj", "w3": "w2"}
_ACCEPTED = 4

_LOWER = np.array([0.0, *MIDPOINTS])
_UPPER = np.array([*MIDPOINTS, np.inf])


@dataclass(frozen=True, slots=True)
class _Side:
    """One weight of a pair, with the factors of its columns that are known."""

    pair: Pair
    known: Floats
    slack: float
    undoes_norm: bool


def explain_pairs(
    readers: tuple[Reader, Reader], pairs: Mapping[str, Pair], audits: Mapping[str, WeightAudit]
) -> dict[str, WeightAudit]:
    """Audit wrong weights again under factors that were put into the linear before.

    Raises:
        StorageError: Bytes cannot be read.
    """
    explained: dict[str, WeightAudit] = {}
    for into, out_of in _candidates(pairs, audits):
        sides = [_side(readers, pairs[name], audits[name]) for name in (into, out_of)]
        intervals = [
            _intervals(readers, side, by_rows=place == 0) for place, side in enumerate(sides)
        ]
        factors = _common(*intervals)
        new = (
            _audit(readers, sides[0], sides[0].known, factors),
            _audit(readers, sides[1], sides[1].known * factors, None),
        )
        if all(_ACCEPTED * found.wrong <= audits[found.name].wrong for found in new):
            explained |= {found.name: found for found in new}
    return explained


def _candidates(
    pairs: Mapping[str, Pair], audits: Mapping[str, WeightAudit]
) -> Iterator[tuple[str, str]]:
    for name, audit in audits.items():
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        other = f"{parent}.{_PAIRS.get(leaf, '')}.weight"
        if leaf not in _PAIRS or other not in audits or not name.endswith(".weight"):
            continue
        fits = audit.rows == audits[other].columns
        if fits and audit.wrong and audits[other].wrong:
            yield name, other


def _side(readers: tuple[Reader, Reader], pair: Pair, audit: WeightAudit) -> _Side:
    columns = matrix_shape(pair.weight)[1]
    smoothing = pair.smoothing
    if smoothing is not None and not audit.undoes_norm:
        smoothing = smoothing.without_norm
    known = np.ones(columns) if smoothing is None else smoothing.factors(*readers, columns)
    base = pair.base
    dtype = PLAIN_DTYPES.get(base.format, PLAIN_DTYPES[WeightFormat.BF16])
    slack = (smoothing or Smoothing()).slack(dtype) + ROUNDOFF[dtype] + ZONE
    return _Side(pair, known, slack, audit.undoes_norm)


def _audit(
    readers: tuple[Reader, Reader], side: _Side, columns: Floats, rows: Floats | None
) -> WeightAudit:
    way = Way.SMOOTHED_BY_LINEAR
    factored = Factored(way, side.slack, columns, rows, undoes_norm=side.undoes_norm)
    return audit_factored(readers[0], side.pair.weight, readers[1], side.pair.base, factored)


def _intervals(
    readers: tuple[Reader, Reader], side: _Side, *, by_rows: bool
) -> tuple[Floats, Floats]:
    """Return for each row, or column, the bounds that all its elements set to its factor."""
    weight = side.pair.weight
    rows, columns = matrix_shape(weight)
    source = Source(readers[1], side.pair.base, factors=side.known)
    decode = float(stored_global_scales(readers[0].checkpoint, weight)[0])
    least, most = (np.full(rows if by_rows else columns, bound) for bound in (0.0, np.inf))
    for start, stop in row_pieces(rows, columns):
        packed = readers[0].rows(weight.parts[Part.CODES], start, stop, columns // 2)
        scales = readers[0].rows(
            weight.parts[Part.BLOCK_SCALES], start, stop, columns // BLOCK_SIZE
        )
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(stop - start, columns)
        units = np.repeat(_SCALES[scales] * decode, BLOCK_SIZE, axis=1)
        magnitudes = source.words(start, stop).view(np.float32).astype(np.float64)
        with np.errstate(invalid="ignore"):  # a scale of another weight may be infinite or NaN
            low, high = _LOWER[codes & 7] * units, _UPPER[codes & 7] * units
        full = np.repeat(scales == _LARGEST_BYTE, BLOCK_SIZE, axis=1) & (codes & 7 == 7)
        high = np.where(full, E2M1.max * units, high)
        with np.errstate(divide="ignore", invalid="ignore"):
            size = np.abs(magnitudes)
            bounds = (low / size, high / size) if by_rows else (size / high, size / low)
        alive = (size > 0) & (units > 0)
        axis = 1 if by_rows else 0
        lower = np.where(alive, bounds[0], 0.0) * (1 - side.slack)
        upper = np.where(alive, bounds[1], np.inf) * (1 + side.slack)
        if by_rows:
            least[start:stop], most[start:stop] = _agreed(lower, upper, axis)
        else:
            these = _agreed(lower, upper, axis)
            least, most = np.maximum(least, these[0]), np.minimum(most, these[1])
    return least, most


def _agreed(lower: Floats, upper: Floats, axis: int) -> tuple[Floats, Floats]:
    """Intersect intervals; where that is empty, take where most of them lie over one another."""
    least, most = lower.max(axis), upper.min(axis)
    for place in np.flatnonzero(least > most):
        lows, highs = (np.take(bound, place, 1 - axis) for bound in (lower, upper))
        ends = np.concatenate([lows, highs])
        steps = np.concatenate([np.ones(len(lows)), -np.ones(len(highs))])
        order = np.lexsort((-steps, ends))
        best = int(np.cumsum(steps[order]).argmax())
        least[place] = ends[order[best]]
        most[place] = ends[order[min(best + 1, len(order) - 1)]]
    return least, most


def _common(one: tuple[Floats, Floats], two: tuple[Floats, Floats]) -> Floats:
    """Choose factors in both intervals; where they are apart, between them; 1 where none is set."""
    least, most = np.maximum(one[0], two[0]), np.minimum(one[1], two[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = np.sqrt(least * most)
    middle = np.where(np.isinf(most), np.where(least > 0, least, 1.0), middle)
    return np.where(np.isfinite(middle) & (middle > 0), middle, 1.0)


_SCALES = np.array(
    [e4m3.MAGNITUDES[byte] if byte < len(e4m3.MAGNITUDES) else 0.0 for byte in range(256)]
)
