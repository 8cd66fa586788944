"""Codes that may flip: how far apart two correct runs may be after a quantisation.

M rows, K columns, A declared arithmetics; s the deviation of an element's own error, c what all
elements of a token or block share of it, w how far it may lie off in all before it is quantised.

Contract:
    most       a quantiser is monotone, so what becomes of any value within w of x lies between
               what becomes of x - w and x + w: the larger distance d from Q(x) is the most that
               the element may err, zero unless a threshold lies within w: such a code straddles
    mean       the mean m of the squared error, for an error that is normal with deviation s, from
               above: in shells of z = |error| / s the distance grows with z, so each shell counts
               by its probability and its outer edge; what is shared is taken at SHARED deviations.
               On which side of a value its threshold lies has nothing to do with the error's sign,
               so over a row a shell is the mean of both sides
    scale      the largest magnitude of a block lies between max(|x| - w) and max(|x| + w). Where
               the scale's own rounding (to E4M3 in NVFP4, to a power of two in FP8 under ue8m0)
               gives another at either end, all elements are held against their codes under that
               scale too, m is the mean over both ends, and doubled, for then either error may be
               the large one
    smooth     an FP8 scale that is not rounded, amax / 448, carries the error of amax, which all
               128 elements share: it moves the thresholds, and multiplies the values. What all
               elements of a token share moves their scales alike: it flips no code, but where
               amax may lie below the floor, and goes through unchanged
    bounded    the sum of a token's squared errors stays below  mu + sqrt(2 v L) + 2 b L / 3  but
               for a probability of exp(-L) (Bernstein), and below the sum of d**2 for certain:
               mu = sum m, v = sum over groups of (sum m)(sum d**2), b the largest sum of d**2 of a
               group (elements that flip together). m is scaled up to this, with L such that
               BOUNDED**2 times it is no less than what it is at DEVIATIONS**2 / 2
    legal      conventions order their float32 operations differently and multiply by approximate
               reciprocals: w and the ideal scales are widened by what `nvfp4ref.ties` allows them

Source: Boucheron, Lugosi and Massart, Concentration Inequalities, theorem 2.10.
"""

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch

from nvfp4check.forward.bounds.arithmetic import (
    BOUNDED,
    DEVIATIONS,
    DIRECTED_RANDOM,
    FRESH_BOUNDED,
)
from nvfp4check.forward.bounds.uncertain import Uncertain, deviation, split_last
from nvfp4check.forward.exact import _e2m1, _e4m3, _over
from nvfp4ref import ties
from nvfp4ref.conventions import Convention
from nvfp4ref.deepseek_v3.linear import FP8_ACTIVATION_AMAX_FLOOR
from nvfp4ref.formats import BLOCK_SIZE, E2M1, E4M3, FP8_BLOCK
from nvfp4ref.rounding import UNIT_ROUNDOFF

#: Deviations of a shared error at which codes are counted. At DEVIATIONS no more than BOUNDED**2
#: times as many flip: BOUNDED, which their error is multiplied with in the end, covers it.
SHARED = DEVIATIONS / BOUNDED**2

#: Of Bernstein's inequality: its bound grows no faster than this.
_LOGARITHM = DEVIATIONS**2 / 2 / BOUNDED**2

#: Outer edges of the shells, in deviations, and the probability of a normal error in each.
_EDGES = np.array([0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, DEVIATIONS])
_SHELLS = np.diff([math.erf(edge / math.sqrt(2)) for edge in (0.0, *_EDGES)])
_SHELLS[-1] += 1 - _SHELLS.sum()

#: Reciprocals on a GPU (rcp.approx.ftz.f32) are good to one unit of the last place.
RECIPROCAL_ULPS = 1.0
_SCALE_ERROR = ties.scale_error(Convention.ENGINE, reciprocal_ulps=RECIPROCAL_ULPS)
_ELEMENT_ERROR = ties.element_error(Convention.ENGINE, reciprocal_ulps=RECIPROCAL_ULPS)

#: Roundings by which x / (amax / 448) and x * (448 / amax) may differ, reciprocals counted twice.
_FP8_ERROR = 6 * UNIT_ROUNDOFF[torch.float32]

# The formats as numbers that numba can compile in.
_SIXTH = 1 / np.float32(E2M1.max)
_E4M3_MAX = np.float64(E4M3.max)


@dataclass(frozen=True, slots=True)
class Quantised:
    """What a quantiser makes of a value."""

    #: The value as codes hold it, with the error of its codes.
    value: Uncertain
    #: Whose codes straddle a threshold, bool [A, M, K] on the processor.
    may_flip: torch.Tensor

    @property
    def straddles(self) -> torch.Tensor:
        """How many codes of a row do, [A, M]."""
        return self.may_flip.sum(-1)


def nvfp4(x: Uncertain, encode: torch.Tensor) -> Quantised:
    """Quantise under an input scale; `encode` is the reciprocal of the scale that decodes."""
    return _quantised(x, _nvfp4, np.float32(encode.item()), BLOCK_SIZE)


def e4m3(x: Uncertain, scale: float) -> Quantised:
    """Quantise to E4M3 under one scale that is given, as an FP8 cache and static inputs are."""
    return _quantised(x, _given, float(scale), 1)


def fp8(
    x: Uncertain,
    *,
    power_of_two_scales: bool = False,
    width: int = FP8_BLOCK.block_shape[1],
    floor: float = FP8_ACTIVATION_AMAX_FLOOR,
) -> Quantised:
    """Quantise as FP8 activations are, in blocks whose largest is taken to be at least `floor`."""
    if power_of_two_scales:
        return _quantised(x, _fp8, (True, width, floor), width)
    columns = x.value.shape[-1]
    padding = (0, -columns % width)

    def blocks(of: torch.Tensor) -> torch.Tensor:
        return split_last(torch.nn.functional.pad(of, padding), -1, width)

    def elements(of: torch.Tensor) -> torch.Tensor:
        return of.repeat_interleave(width, dim=-1)[..., :columns]

    size = blocks(x.value.abs())
    amax = size.amax(-1).clamp(min=floor)
    roots = x.variance.sum(1).sqrt()
    off = (size + blocks(roots)).amax(-1).clamp(min=floor) - amax
    shared = elements((off / amax).square())  # variance
    clamped = elements((size - blocks(x.reach)).amax(-1) < floor)
    moving = shared + clamped * x.common.sum(1).unsqueeze(-1)
    own = Uncertain(x.value, x.variance, torch.zeros_like(x.common))
    found = _quantised(own, _fp8, (False, width, floor), 1, moving)
    value = found.value
    variance = value.variance.clone()
    variance[:, DIRECTED_RANDOM] += shared * value.value.square()
    common = x.common.clone()
    common[:, DIRECTED_RANDOM] += shared.amax(-1)
    return Quantised(Uncertain(value.value, variance, common), found.may_flip)


def _quantised(
    x: Uncertain, kernel: Any, parameter: Any, group: int, shared: torch.Tensor | None = None
) -> Quantised:
    """Run a kernel; `shared` is the variance [A, M, K] of a relative error of a block's scale."""
    size = x.value.abs()
    own = x.variance.sum(1).sqrt()
    relative = x.common.sum(1).unsqueeze(-1)
    if shared is not None:
        relative = relative + shared
    together = SHARED * relative.sqrt() * size
    reach = deviation(x.variance) + together
    source = x.value.to("cpu", torch.float32).contiguous().numpy()
    values = np.empty(source.shape, dtype=np.float64)
    means = torch.zeros(reach.shape, dtype=torch.float64)
    most = torch.zeros_like(means)
    for i in range(len(reach)):
        spread = torch.stack((own[i], together[i], reach[i])).cpu().contiguous().numpy()
        out = values, means[i].numpy(), most[i].numpy()
        _run(kernel, parameter, source, spread, out)
    squares = most.square()
    bounded = means * _scaling(means, squares, group).unsqueeze(-1)
    variance = torch.zeros_like(x.variance)
    variance[:, FRESH_BOUNDED] = bounded.to(x.value.device)
    value = torch.from_numpy(values).to(x.value.device)
    return Quantised(Uncertain(value, variance, torch.zeros_like(x.common)), most > 0)


def _run(
    kernel: Any,
    parameter: Any,
    source: np.ndarray[Any, Any],
    spread: np.ndarray[Any, Any],
    out: tuple[np.ndarray[Any, Any], ...],
) -> None:
    """Run a kernel over all rows, in threads where there is enough to do."""

    def work(n: slice) -> None:
        kernel(source[n], spread[:, n], parameter, _EDGES, _SHELLS, *(each[n] for each in out))

    _over(work, len(source), len(_EDGES) * source.size)


def _scaling(means: torch.Tensor, most: torch.Tensor, group: int) -> torch.Tensor:
    """Return what mean squares [A, M, K] are multiplied with to bound their sum, [A, M]."""
    padding = (0, -means.shape[-1] % group)

    def groups(of: torch.Tensor) -> torch.Tensor:
        return split_last(torch.nn.functional.pad(of, padding), -1, group).sum(-1)

    total, certain = means.sum(-1), most.sum(-1)
    spread = (groups(means) * groups(most)).sum(-1)
    likely = total + (2 * spread * _LOGARITHM).sqrt() + 2 / 3 * _LOGARITHM * groups(most).amax(-1)
    bound = torch.minimum(likely, certain)
    return torch.where(total > 0, bound / total, 0.0)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _nvfp4(
    x: Any, spread: Any, encode: Any, edges: Any, shells: Any, values: Any, means: Any, most: Any
) -> None:
    one = np.float32(1)
    decode = one / encode
    wide, ideal = np.float64(decode), np.float64(encode) * np.float64(_SIXTH)
    own, together, reach = spread
    scales = np.empty(2, dtype=np.float32)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], BLOCK_SIZE):
            block = range(start, start + BLOCK_SIZE)
            amax = np.float32(0)
            for k in block:
                amax = max(amax, abs(x[row, k]))
            scale = _e4m3(encode * (amax * _SIXTH))
            factor = one / (scale * decode) if amax > 0 else np.float32(0)
            for k in block:
                code = np.float64(_e2m1(x[row, k] * factor)) if scale > 0 else 0.0
                values[row, k] = code * np.float64(scale) * wide
                most[row, k], means[row, k] = 0.0, 0.0
            flips, straddles = True, True
            for shell in range(len(edges), -1, -1):  # the outermost is all that may be
                if not straddles:
                    break
                if flips:  # if it does not outside, then nowhere inside
                    low, high = 0.0, 0.0
                    for k in block:
                        size = abs(np.float64(x[row, k]))
                        off = reach[row, k]
                        if shell < len(edges):
                            off = min(off, together[row, k] + edges[shell] * own[row, k])
                        low, high = max(low, size - off), max(high, size + off)
                    scales[0] = _e4m3(np.float32(ideal * low * (1 - _SCALE_ERROR)))
                    scales[1] = _e4m3(np.float32(ideal * high * (1 + _SCALE_ERROR)))
                    flips = scales[0] != scale or scales[1] != scale
                straddles = False
                for k in block:
                    if shell < len(edges) and most[row, k] == 0:
                        continue
                    value = np.float64(x[row, k])
                    off = reach[row, k]
                    if shell < len(edges):
                        off = min(off, together[row, k] + edges[shell] * own[row, k])
                    off += _ELEMENT_ERROR * abs(value)
                    step, mean = _nvfp4_step(value, off, scale, wide, values[row, k])
                    if flips:
                        less = _nvfp4_step(value, off, scales[0], wide, values[row, k])
                        more = _nvfp4_step(value, off, scales[1], wide, values[row, k])
                        step, mean = max(step, less[0], more[0]), less[1] + more[1]
                    straddles = straddles or step > 0
                    if shell == len(edges):
                        most[row, k] = step
                    else:
                        means[row, k] += shells[shell] * mean
            for k in block:
                means[row, k] = min(means[row, k], most[row, k] ** 2)


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _nvfp4_step(value: Any, off: Any, scale: Any, decode: Any, own: Any) -> Any:
    """Return how far the codes of value +- off lie from a value, at most, and the mean square."""
    if scale == 0:
        return abs(own), own * own
    unit = np.float64(scale) * decode
    low = abs(np.float64(_e2m1((value - off) / unit)) * unit - own)
    high = abs(np.float64(_e2m1((value + off) / unit)) * unit - own)
    return max(low, high), (low * low + high * high) / 2


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _e4m3_signed(value: Any) -> Any:
    size = np.float64(_e4m3(np.float32(abs(value))))
    return -size if value < 0 else size


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _e4m3_step(value: Any, off: Any, scale: Any, own: Any) -> Any:
    """Return how far the E4M3 of value +- off lie from a value, at most, and the mean square."""
    low = abs(_e4m3_signed((value - off) / scale) * scale - own)
    high = abs(_e4m3_signed((value + off) / scale) * scale - own)
    return max(low, high), (low * low + high * high) / 2


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _given(
    x: Any, spread: Any, scale: Any, edges: Any, shells: Any, values: Any, means: Any, most: Any
) -> None:
    own, together, reach = spread
    for row in range(x.shape[0]):
        for k in range(x.shape[1]):
            value = np.float64(x[row, k])
            legal = _FP8_ERROR * abs(value)
            kept = _e4m3_signed(x[row, k] / np.float32(scale)) * scale
            values[row, k] = kept
            most[row, k] = _e4m3_step(value, reach[row, k] + legal, scale, kept)[0]
            if most[row, k] == 0:
                continue
            for shell in range(len(edges)):
                off = min(reach[row, k], together[row, k] + edges[shell] * own[row, k]) + legal
                means[row, k] += shells[shell] * _e4m3_step(value, off, scale, kept)[1]


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _fp8_scale(amax: Any, power_of_two_scales: Any, floor: Any) -> Any:
    scale = max(amax, floor) / _E4M3_MAX
    if power_of_two_scales:
        return 2.0 ** np.ceil(np.log2(scale))
    return scale


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _fp8(
    x: Any,
    spread: Any,
    parameter: Any,
    edges: Any,
    shells: Any,
    values: Any,
    means: Any,
    most: Any,
) -> None:
    own, together, reach = spread
    power_of_two_scales, width, floor = parameter
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], width):
            block = range(start, min(start + width, x.shape[1]))
            amax = 0.0
            for k in block:
                amax = max(amax, abs(np.float64(x[row, k])))
            scale = _fp8_scale(amax, power_of_two_scales, floor)
            for k in block:
                values[row, k] = _e4m3_signed(np.float64(x[row, k]) / scale) * scale
                most[row, k], means[row, k] = 0.0, 0.0
            for shell in range(len(edges), -1, -1):
                low, high = 0.0, 0.0
                for k in block:
                    size = abs(np.float64(x[row, k]))
                    off = reach[row, k] + _FP8_ERROR * size
                    if shell < len(edges):
                        off = min(off, together[row, k] + edges[shell] * own[row, k])
                    low, high = max(low, size - off), max(high, size + off)
                less = _fp8_scale(low, power_of_two_scales, floor)
                more = _fp8_scale(high, power_of_two_scales, floor)
                flips = power_of_two_scales and (less != scale or more != scale)
                for k in block:
                    if shell < len(edges) and most[row, k] == 0:
                        continue
                    value, kept = np.float64(x[row, k]), values[row, k]
                    off = reach[row, k]
                    if shell < len(edges):
                        off = min(off, together[row, k] + edges[shell] * own[row, k])
                    off += _FP8_ERROR * abs(value)
                    step, mean = _e4m3_step(value, off, scale, kept)
                    if flips:
                        small = _e4m3_step(value, off, less, kept)
                        large = _e4m3_step(value, off, more, kept)
                        step, mean = max(step, small[0], large[0]), small[1] + large[1]
                    if shell == len(edges):
                        most[row, k] = step
                    else:
                        means[row, k] += shells[shell] * mean
            for k in block:
                means[row, k] = min(means[row, k], most[row, k] ** 2)
