"""What a sample of positions supports: intervals, smallest visible effects, verdicts.

Positions of one text depend on one another, and texts differ. So a mean is known as well as the
worse of two ways to look at it says: by segments of consecutive positions, and by whole prompts.

Contract:
    segment    ceil(n ** (1/3)) positions, n the longest prompt; the growth that is optimal for the
               variance of a mean (Hall, Horowitz and Jing, Biometrika 82, 1995)
    error      the standard error of the mean: over segments that of a ratio of sums; over prompts,
               where there are two or more, by leaving out one at a time; the larger of the two
    freedom    degrees of freedom of the error: prompts - 1, whatever their lengths, as leaving out
               a long one among short ones errs to the safe side; with one prompt, or where only
               segments are looked at, segments - 1
    bounds     one-sided, t of Student; `unseen` says what a bootstrap of blocks allows for
        MEAN       mean -+ t * error
        DIFFERENCE of two that are POSITIVE: the farther one of that and of a bootstrap of segments
                   with the tail of that side
        POSITIVE   of what cannot be negative: above, the farther one of a bootstrap of segments,
                   with the tail of positions, and one of prompts, with theirs; below, that of
                   mean * exp(-t * error / mean) and of a bootstrap of segments with an unseen 0.
                   A mean of 0 has no bounds but 0, an infinite one none but infinity
        SHARE      of a share of positions, that of a binomial (Clopper and Pearson) of as many
                   independent positions as have this error, no more than there are, times
                   (t(positions - 1) / t(freedom))**2 (Korn and Graubard, Survey Methodology 24,
                   1998). A share of 0 or 1 has bounds, too. Below, the farther one of that and of
                   a bootstrap of prompts, whose tail is that of the rest of each, shrunk to their
                   mean as far as a binomial explains how they differ
    interval   both bounds at half of what is left of the level
    ceiling    upper bound of a POSITIVE mean that allows for positions too rare to be among these,
               as large as the caller says that one can be: the unseen segment holds one. Where the
               tail of prompts is boundless, the unseen prompt holds no others
    verdict    PASS when the one-sided 1 - alpha bound, above a POSITIVE mean its ceiling, lies on
               the good side of the limit, FAIL when the opposite bound lies on the bad side,
               UNDECIDED otherwise
    effect     (t(1 - alpha) + t(power)) * error: the smallest true difference that a sample like
               this one shows with that power; where bounds are not even, the farther one takes
               t * error's place

No sample tells of kinds of prompts that it lacks. How often the bounds miss for heavy tails and few
prompts, `python -m nvfp4check.bench coverage` counts.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import torch

from nvfp4check.agreement.quantile import beta, student_t
from nvfp4check.agreement.unseen import Blocks, Floats, blocks

#: Resamples of a bootstrap: of them, 100 lie beyond either end of an interval.
RESAMPLES = 4000

#: exp of more than this is infinite.
_LARGEST_EXPONENT = 700.0


class Kind(StrEnum):
    """What a mean is of."""

    #: Any numbers.
    MEAN = "mean"
    #: Numbers that are not negative and mostly small.
    POSITIVE = "positive"
    #: Such numbers less others.
    DIFFERENCE = "difference"
    #: Zeros and ones.
    SHARE = "share"


class Decision(StrEnum):
    """What the positions say about a limit."""

    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with what is known about it."""

    mean: float
    standard_error: float
    segments: int
    #: Degrees of freedom of the standard error.
    freedom: float = 1.0
    prompts: int = 0
    positions: int = 0
    kind: Kind = Kind.MEAN
    #: Resampled segments of what has a tail, and those of the negative of a DIFFERENCE.
    by_segment: Blocks | None = None
    negative: Blocks | None = None
    #: Resampled prompts, of a SHARE what it leaves.
    by_prompt: Blocks | None = None

    @property
    def known(self) -> bool:
        """Whether there are the two segments that bounds take."""
        return self.segments > 1

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Two-sided interval, or None with fewer than two segments."""
        tail = (1 - level) / 2
        if not self.known:
            return None
        return self.lower_bound(tail), self.upper_bound(tail)

    def lower_bound(self, alpha: float) -> float:
        """Return the one-sided lower bound of the mean."""
        if self.kind is Kind.SHARE:
            count = self._independent(alpha)
            low = beta(alpha, self.mean * count, (1 - self.mean) * count + 1)
            return low if self.by_prompt is None else min(low, 1 - self.by_prompt.upper(alpha))
        if not math.isfinite(self.standard_error):
            return self.mean if self.kind is Kind.POSITIVE else -math.inf
        reach = student_t(1 - alpha, self.freedom) * self.standard_error
        if self.kind is not Kind.POSITIVE:
            low = self.mean - reach
            return low if self.negative is None else min(low, -self.negative.upper(alpha))
        if self.mean == 0 or self.by_segment is None:
            return 0.0
        low = self.mean * math.exp(-min(_LARGEST_EXPONENT, reach / self.mean))
        return min(low, self.by_segment.lower(alpha))

    def upper_bound(self, alpha: float) -> float:
        """Return the one-sided upper bound of the mean."""
        if self.kind is Kind.SHARE:
            count = self._independent(alpha)
            return beta(1 - alpha, self.mean * count + 1, (1 - self.mean) * count)
        if not math.isfinite(self.standard_error):
            return math.inf
        if self.kind is Kind.POSITIVE:
            if self.mean == 0 or self.by_segment is None:
                return 0.0
            high = self.by_segment.upper(alpha)
            return high if self.by_prompt is None else max(high, self.by_prompt.upper(alpha))
        high = self.mean + student_t(1 - alpha, self.freedom) * self.standard_error
        return high if self.by_segment is None else max(high, self.by_segment.upper(alpha))

    def ceiling(self, alpha: float, worst: float) -> float:
        """Return the upper bound of a POSITIVE mean; an unseen position may be `worst`."""
        high = self.upper_bound(alpha)
        if self.mean == 0 or self.by_segment is None:
            return high
        length = self.positions / self.segments
        rare = self.mean + max(0.0, worst - self.mean) / length
        high = max(high, self.by_segment.upper(alpha, rare))
        if self.by_prompt is None:
            return high
        far = self.by_prompt.far
        return max(high, self.by_prompt.upper(alpha, far if math.isfinite(far) else worst))

    def smallest_effect(self, alpha: float, power: float) -> float:
        """Return the smallest true difference that shows with this power at this alpha."""
        one, other = student_t(1 - alpha, self.freedom), student_t(power, self.freedom)
        if self.kind in (Kind.MEAN, Kind.DIFFERENCE) or not self.known:
            return (one + other) * self.standard_error
        reach = max(self.mean - self.lower_bound(alpha), self.upper_bound(alpha) - self.mean)
        effect = reach * (one + other) / one
        return min(1.0, effect) if self.kind is Kind.SHARE else effect

    def _independent(self, alpha: float) -> float:
        """Return how many independent positions know the share as well."""
        count = float(self.positions)
        spread = self.mean * (1 - self.mean)
        if spread > 0:
            count = min(count, spread / max(self.standard_error, 1e-300) ** 2)
        whole, own = student_t(1 - alpha, self.positions - 1), student_t(1 - alpha, self.freedom)
        return count * min(1.0, whole / own) ** 2


def estimate(
    prompts: list[torch.Tensor],
    seed: int = 0,
    kind: Kind = Kind.MEAN,
    *,
    by_prompt: bool = False,
) -> Estimate:
    """Estimate the mean over all positions of `prompts`, each float64 [T]; NaN is left out.

    An infinite position makes the mean infinite. `by_prompt` looks at whole prompts, too, as a
    statement about more than these prompts must.
    """
    values = [prompt.double().numpy() for prompt in prompts]
    length = _length(values)
    sums, sizes = _joined([_blocks(each, length) for each in values])
    whole = _joined([_blocks(each, max(1, len(each))) for each in values])
    count, positions, texts = len(sums), int(sizes.sum()), len(whole[0])
    mean = _total(sums) / positions if count else math.nan
    found = Estimate(
        mean=mean,
        standard_error=math.inf,
        segments=count,
        prompts=texts,
        positions=positions,
        kind=kind,
    )
    several = by_prompt and texts > 1
    freedom = float((texts if several else count) - 1)
    if count < 2 or not math.isfinite(mean):
        return replace(found, freedom=max(1.0, freedom))
    error = _of_ratio(sums, sizes)
    found = replace(
        found,
        standard_error=max(error, _left_out(*whole)) if several else error,
        freedom=freedom,
    )
    every = np.concatenate(values)
    every = every[~np.isnan(every)]
    if kind in (Kind.POSITIVE, Kind.DIFFERENCE):
        found = replace(found, by_segment=blocks(sums, sizes, every, RESAMPLES, seed))
    if kind is Kind.DIFFERENCE:
        found = replace(found, negative=blocks(-sums, sizes, -every, RESAMPLES, seed))
    if kind is Kind.POSITIVE and several:
        means = whole[0] / whole[1]
        found = replace(found, by_prompt=blocks(*whole, means, RESAMPLES, seed))
    if kind is Kind.SHARE and several and 0 < mean < 1:
        rest = _shrunk(whole[1] - whole[0], whole[1])
        drawn = blocks(whole[1] - whole[0], whole[1], rest, RESAMPLES, seed, rest.max(), limit=1.0)
        found = replace(found, by_prompt=drawn)
    return found


def _length(prompts: list[Floats]) -> int:
    longest = max((len(prompt) for prompt in prompts), default=1)
    return max(1, math.ceil(math.cbrt(longest)))


def _blocks(prompt: Floats, length: int) -> tuple[Floats, Floats]:
    """Return the sum and the number of values of each block that has any."""
    starts = np.arange(0, len(prompt), length)
    if not len(starts):
        return np.empty(0), np.empty(0)
    there = ~np.isnan(prompt)
    sizes = np.add.reduceat(there.astype(np.float64), starts)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        sums = np.add.reduceat(np.where(there, prompt, 0.0), starts)
    return sums[sizes > 0], sizes[sizes > 0]


def _joined(parts: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    if not parts:
        return np.empty(0), np.empty(0)
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _total(values: Floats) -> float:
    """Return the sum, which no order changes."""
    if np.isfinite(values).all():
        return math.fsum(values)
    with np.errstate(invalid="ignore"):
        return float(values.sum())


def _of_ratio(sums: Floats, sizes: Floats) -> float:
    """Return the standard error of the mean, a ratio of two sums over blocks."""
    count, total = len(sums), math.fsum(sizes)
    apart = math.fsum((sums - math.fsum(sums) / total * sizes) ** 2)
    return math.sqrt(apart * count / (count - 1)) / total


def _left_out(sums: Floats, sizes: Floats) -> float:
    """Return the standard error of the mean from those that leave out one part (a jackknife)."""
    total, positions = math.fsum(sums), math.fsum(sizes)
    apart = math.fsum(((total - sums) / (positions - sizes) - total / positions) ** 2)
    return math.sqrt(apart * (len(sums) - 1) / len(sums))


def _shrunk(hits: Floats, sizes: Floats) -> Floats:
    """Return shares of prompts, drawn to their mean as far as a binomial explains their spread."""
    share = math.fsum(hits) / math.fsum(sizes)
    apart = hits / sizes - share
    expected = math.fsum(share * (1 - share) / sizes) * (1 - 1 / len(sizes))
    found = math.fsum(apart**2)
    return share + max(0.0, 1 - expected / found if found > 0 else 0.0) * apart


def decide_at_most(
    found: Estimate, limit: float, alpha: float, worst: float | None = None
) -> Decision:
    """Decide whether the true mean is at most `limit`, unseen positions being at most `worst`."""
    if not found.known:
        return Decision.UNDECIDED
    high = found.upper_bound(alpha) if worst is None else found.ceiling(alpha, worst)
    if high <= limit:
        return Decision.PASS
    return Decision.FAIL if found.lower_bound(alpha) > limit else Decision.UNDECIDED


def decide_at_least(found: Estimate, limit: float, alpha: float) -> Decision:
    """Decide whether the true mean is at least `limit`."""
    if not found.known:
        return Decision.UNDECIDED
    if found.lower_bound(alpha) >= limit:
        return Decision.PASS
    return Decision.FAIL if found.upper_bound(alpha) < limit else Decision.UNDECIDED


def times_as_many(
    found: Estimate, limit: float, alpha: float, worst: float | None = None
) -> float | None:
    """Return how many times as many positions like these would decide about a limit.

    None where this sample does not tell: too few positions, a tail that cannot be followed, or a
    mean at the limit. What is seen narrows as the root of their number, what is not, as the number.
    """
    if not found.known or not math.isfinite(found.mean) or found.mean == limit:
        return None
    slack = abs(found.mean - limit)
    if found.mean > limit:
        seen, unseen = found.mean - found.lower_bound(alpha), 0.0
    else:
        seen = found.upper_bound(alpha) - found.mean
        unseen = 0.0 if worst is None else found.ceiling(alpha, worst) - found.mean - seen
    if found.kind is Kind.SHARE and found.mean in (0, 1):
        seen, unseen = 0.0, seen
    if not math.isfinite(seen + unseen):
        return None
    return ((seen + math.sqrt(seen**2 + 4 * unseen * slack)) / (2 * slack)) ** 2


def quantiles(prompts: list[torch.Tensor], shares: tuple[float, ...]) -> tuple[float, ...]:
    """Return the given quantiles over all positions, linear between ranks; NaN is left out."""
    values = torch.cat([prompt.double() for prompt in prompts]) if prompts else torch.empty(0)
    values = values[~values.isnan()]
    if not values.numel():
        return tuple(float("nan") for _ in shares)
    return tuple(float(value) for value in np.quantile(values.numpy(), shares))
