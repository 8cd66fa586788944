"""Two rows of logits at a time: their divergences, in three passes that stay in a core's cache.

V vocabulary entries; a and b are the logits less the largest of their row, p = exp(a) / Za,
q = exp(b) / Zb, d = log p - log q = (a - b) + (log Zb - log Za), everything in float64.

Contract:
    kl, kl_reverse   sum of p (exp(-d) - 1 + d) and of q (exp(d) - 1 - d): since p and q both sum to
                     one, these are sum p log(p / q) and sum q log(q / p), and no term is negative
    jsd              half the sum of [(p - q) d / 2 - (p + q) log cosh(d / 2)], none negative either
    |d| < 1/2        Taylor series in d**2, cut off below a rounding; beyond, p and q themselves
    p = 0            (exp(a) underflows, or a = -inf): only q remains of the term; of q = 0 likewise
    p > 0, b = -inf  kl is infinite
    sums             512 terms in any order, then these sums in order, with compensation
    best             the largest logits; of equal ones the lower index comes first

Rounding, u = 2**-53: a term is off by 40 u of itself, cancellation between its parts included (they
are at most 20 times as large), a sum of 512 terms without sign by 512 u, and p and q, with exp and
Z, by 600 u. A result is thus off by less than 1200 u of itself; through the error of each d by
3 u s sum |p - q|, s being by how much the logits of a row fall, as far as they have a probability,
both rows together; and through the errors that all d have in common, and that cancel as p and q sum
to one, by 2**-85. A divergence of 1e-20 is still known to some digits.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic

from nvfp4check.agreement.exponential import compiled, exponential

#: numba types its own decorator away.
intrinsic_of: Callable[..., Any] = intrinsic

#: Logits that are gone through at one time.
CHUNK = 512

#: Columns of the results of a pair of rows.
KL, KL_REVERSE, JSD, CONFIDENCE, NLL_REFERENCE, NLL_CANDIDATE = range(6)
NUMBERS = 6

_LN2 = math.log(2)
#: (cosh d - 1) / d**2 and (sinh d - d) / d**3 in powers of d**2.
_EVEN = tuple(1 / math.factorial(2 * n + 2) for n in range(7))
_ODD = tuple(1 / math.factorial(2 * n + 3) for n in range(7))
#: atanh(z) / z in powers of z**2; z is 0.24 at most.
_ATANH = tuple(1 / (2 * n + 1) for n in range(14))


@intrinsic_of
def _ordered(typing_context: Any, value: Any) -> Any:
    """The bits of a float as a signed integer that is ordered as the float, NaN at both ends."""
    width = value.bitwidth
    whole = types.Integer.from_bitwidth(width, signed=True)

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], ir.IntType(width))
        return _flipped(builder, bits, width)

    return whole(value), lower


@intrinsic_of
def _float_of(typing_context: Any, ordered: Any) -> Any:
    """The float of such an integer."""
    width = ordered.bitwidth
    kind, form = (
        (types.float32, ir.FloatType()) if width == 32 else (types.float64, ir.DoubleType())
    )

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(_flipped(builder, arguments[0], width), form)

    return kind(ordered), lower


def _flipped(builder: Any, bits: Any, width: int) -> Any:
    """Flip all bits but the sign of a negative number, which undoes itself."""
    form = ir.IntType(width)
    sign = builder.ashr(bits, ir.Constant(form, width - 1))
    return builder.xor(bits, builder.lshr(sign, ir.Constant(form, 1)))


@compiled()
def _survey(row: Any, tops: Any) -> Any:
    """Write the largest logit of each chunk; return that of all, NaN where one is NaN."""
    most = least = _ordered(row[0])
    for chunk in range(len(tops)):
        high = low = _ordered(row[chunk * CHUNK])
        for i in range(chunk * CHUNK, min(len(row), (chunk + 1) * CHUNK)):
            here = _ordered(row[i])
            high = max(high, here)
            low = min(low, here)
        tops[chunk] = _float_of(high)
        most = max(most, high)
        least = min(least, low)
    lowest = _float_of(least)
    return lowest if np.isnan(lowest) else _float_of(most)


@compiled()
def _find_best(row: Any, tops: Any, values: Any, places: Any) -> None:
    """Write the largest logits and where they are; a chunk without any is passed over."""
    count, found = len(places), 0
    for chunk in range(len(tops)):
        if found == count and not tops[chunk] > values[count - 1]:
            continue
        for i in range(chunk * CHUNK, min(len(row), (chunk + 1) * CHUNK)):
            value = row[i]
            if found == count and not value > values[count - 1]:
                continue
            at = min(found, count - 1)
            while at > 0 and value > values[at - 1]:
                values[at], places[at] = values[at - 1], places[at - 1]
                at -= 1
            values[at], places[at] = value, i
            found = min(found + 1, count)


@compiled(adds=True)
def _weigh(row: Any, largest: Any, weights: Any) -> Any:
    """Write exp of the logits less the largest; return the sum."""
    total = 0.0
    for i in range(len(row)):
        weight = exponential(numba.float64(row[i]) - largest)
        weights[i] = weight
        total += weight
    return total


@compiled()
def _weights(row: Any, largest: Any, weights: Any) -> Any:
    """Write the weights of a whole row; return their sum."""
    total = lost = 0.0
    for start in range(0, len(row), CHUNK):
        stop = min(start + CHUNK, len(row))
        total, lost = _added(total, lost, _weigh(row[start:stop], largest, weights[start:stop]))
    return total + lost


@compiled(inlined=True)
def _added(total: Any, lost: Any, term: Any) -> Any:
    """Add a term; `lost` takes what the sum of two positive numbers rounds away."""
    both = total + term
    large, small = (total, term) if total > term else (term, total)
    # Infinity less infinity is no rounding.
    return both, lost + ((large - both) + small) if both < np.inf else 0.0


@compiled(inlined=True)
def _terms(p: Any, q: Any, d: Any) -> Any:
    """Return a token's terms of kl and kl_reverse, and twice that of jsd.

    Every way is computed and the right one taken, which vectors do faster than to branch.
    """
    size = abs(d)
    near = size < 0.5
    square = d * d
    even, odd = _EVEN[6], _ODD[6]
    for power in range(5, -1, -1):
        even = even * square + _EVEN[power]
        odd = odd * square + _ODD[power]
    even, odd = even * square, odd * square * d  # cosh d - 1, sinh d - d
    large = q if q > p else p
    small = p if q > p else q
    ratio = small / (large if large > 0 else 1.0)
    argument = 0.5 * even if near else ratio
    z = argument / (2.0 + argument)
    series = _ATANH[13]
    for power in range(12, -1, -1):
        series = series * (z * z) + _ATANH[power]
    log = 2.0 * z * series  # log(1 + argument): 2 log cosh(d / 2), or log(1 + ratio)
    near_kl, near_reverse = p * (even - odd), q * (even + odd)
    near_jsd = 0.5 * (p * (d + odd - even) * d - (p + q) * log)
    of_p, of_q, of_small = p * d, q * d, small * size
    far_kl = (q - p) + (of_p if p > 0 else 0.0)
    far_reverse = (p - q) - (of_q if q > 0 else 0.0)
    far_jsd = (p + q) * (_LN2 - log) - (of_small if small > 0 else 0.0)
    return (
        near_kl if near else far_kl,
        near_reverse if near else far_reverse,
        near_jsd if near else far_jsd,
    )


@compiled(adds=True)
def _sum_terms(a: Any, b: Any, heads: Any, weights: Any, others: Any, parts: Any) -> Any:
    """Return the sums of the terms of one chunk."""
    kl = reverse = twice_jsd = 0.0
    for i in range(len(a)):
        gap = _gap(numba.float64(a[i]), heads[0], numba.float64(b[i]), heads[1], parts[2])
        of_kl, of_reverse, of_jsd = _terms(weights[i] * parts[0], others[i] * parts[1], gap)
        kl += of_kl
        reverse += of_reverse
        twice_jsd += of_jsd
    return kl, reverse, twice_jsd


@compiled(inlined=True)
def _gap(a: Any, largest: Any, b: Any, other_largest: Any, shift: Any) -> Any:
    """Return d, in just this order: equal rows give zeros, and both largest may be huge."""
    return ((a - largest) - (b - other_largest)) + shift


@compiled()
def compare_pairs(
    reference: Any, candidate: Any, after: Any, numbers: Any, best: Any, other_best: Any
) -> None:
    """Compare rows [T, V]; `after` [T] is the token that follows, -1 for none.

    Writes `numbers` [T, NUMBERS], NaN where a side holds NaN or +inf or nothing above -inf, and the
    best tokens of both sides [T, k].
    """
    width = reference.shape[1]
    tops = np.empty((width + CHUNK - 1) // CHUNK, reference.dtype)
    values = np.empty(best.shape[1], reference.dtype)
    weights, others = np.empty(width), np.empty(width)
    for row in range(reference.shape[0]):
        a, b = reference[row], candidate[row]
        numbers[row] = np.nan
        heads = numba.float64(_survey(a, tops)), 0.0
        if not np.isfinite(heads[0]):
            continue
        _find_best(a, tops, values, best[row])
        heads = heads[0], numba.float64(_survey(b, tops))
        if not np.isfinite(heads[1]):
            continue
        _find_best(b, tops, values, other_best[row])
        total, other_total = _weights(a, heads[0], weights), _weights(b, heads[1], others)
        log, other_log = math.log(total), math.log(other_total)
        parts = 1 / total, 1 / other_total, other_log - log
        kl = reverse = jsd = lost = reverse_lost = jsd_lost = 0.0
        for start in range(0, width, CHUNK):
            here = slice(start, min(start + CHUNK, width))
            sums = _sum_terms(a[here], b[here], heads, weights[here], others[here], parts)
            kl, lost = _added(kl, lost, sums[0])
            reverse, reverse_lost = _added(reverse, reverse_lost, sums[1])
            jsd, jsd_lost = _added(jsd, jsd_lost, sums[2])
        numbers[row, KL], numbers[row, KL_REVERSE] = kl + lost, reverse + reverse_lost
        numbers[row, JSD] = min((jsd + jsd_lost) / 2, _LN2)
        numbers[row, CONFIDENCE] = 1 / total
        if after[row] >= 0:
            numbers[row, NLL_REFERENCE] = log - (numba.float64(a[after[row]]) - heads[0])
            numbers[row, NLL_CANDIDATE] = other_log - (numba.float64(b[after[row]]) - heads[1])


@compiled()
def survey_rows(rows: Any, log_totals: Any, best: Any) -> None:
    """Write the log of the sum of exp of each row [T, V], NaN as above, and its best tokens."""
    width = rows.shape[1]
    tops = np.empty((width + CHUNK - 1) // CHUNK, rows.dtype)
    values = np.empty(best.shape[1], rows.dtype)
    weights = np.empty(width)
    for row in range(rows.shape[0]):
        largest = numba.float64(_survey(rows[row], tops))
        log_totals[row] = np.nan
        if np.isnan(largest):
            continue
        _find_best(rows[row], tops, values, best[row])
        if np.isfinite(largest):
            log_totals[row] = largest + math.log(_weights(rows[row], largest, weights))
