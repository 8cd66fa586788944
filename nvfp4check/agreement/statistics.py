"""What a sample of positions supports: intervals, smallest visible effects, verdicts.

Positions of one text depend on one another, and texts differ. So a mean is known as well as the
worse of two ways to look at it says: by segments of consecutive positions, and by whole prompts.

Contract:
    segment    ceil(n ** (1/3)) positions, n the longest prompt; the growth that is optimal for the
               variance of a mean (Hall, Horowitz and Jing, Biometrika 82, 1995)
    error      the standard error of the mean: over segments by bootstrap; over prompts, where there
               are two or more, by leaving out one at a time; the larger of the two
    freedom    degrees of freedom of the error: prompts - 1, whatever their lengths, as leaving out
               a long one among short ones errs to the safe side; with one prompt, or where only
               segments are looked at, segments - 1
    bounds     one-sided, from Student's t
        MEAN       mean -+ t * error
        POSITIVE   of what cannot be negative, of the logarithm: mean / or * exp(t * error / mean);
                   infinite for an infinite mean, as one infinite position settles it
        SHARE      of a share of positions, that of a binomial (Clopper and Pearson) of as many
                   independent positions as have this error, no more than there are, times
                   (t(positions - 1) / t(freedom))**2 (Korn and Graubard, Survey Methodology 24,
                   1998). A share of 0 or 1 has bounds, too
    interval   both bounds at half of what is left of the level
    verdict    PASS when the one-sided 1 - alpha bound lies on the good side of the limit, FAIL
               when the opposite bound lies on the bad side, UNDECIDED otherwise
    effect     (t(1 - alpha) + t(power)) * error: the smallest true difference that a sample like
               this one shows with that power; of a share, its farther bound takes t * error's place

What no sample can say: a mean that rare positions make, none of which is in it. How often the
bounds miss for heavy tails and few prompts, `python -m nvfp4check.bench coverage` counts.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from nvfp4check.agreement.quantile import beta, student_t

#: Resamples of a bootstrap: the standard error is known to a few per cent.
RESAMPLES = 4000

#: Indices of resamples drawn at one time: bounds the memory they take.
DRAWS_AT_ONCE = 1 << 22

#: exp of more than this is infinite.
_LARGEST_EXPONENT = 700.0


class Kind(StrEnum):
    """What a mean is of."""

    #: Any numbers.
    MEAN = "mean"
    #: Numbers that are not negative and mostly small.
    POSITIVE = "positive"
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
    #: The sorted means of the resamples; empty when there are fewer than two segments.
    resamples: tuple[float, ...]
    segments: int
    #: Degrees of freedom of the standard error.
    freedom: float = 1.0
    positions: int = 0
    kind: Kind = Kind.MEAN

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Two-sided interval, or None with fewer than two segments."""
        tail = (1 - level) / 2
        if not self.resamples:
            return None
        return self.lower_bound(tail), self.upper_bound(tail)

    def lower_bound(self, alpha: float) -> float:
        """Return the one-sided lower bound of the mean."""
        if self.kind is Kind.SHARE:
            count = self._independent(alpha)
            return beta(alpha, self.mean * count, (1 - self.mean) * count + 1)
        if not math.isfinite(self.standard_error):
            return self.mean if self.kind is Kind.POSITIVE else -math.inf
        reach = student_t(1 - alpha, self.freedom) * self.standard_error
        if self.kind is Kind.POSITIVE:
            return self.mean * math.exp(-self._exponent(reach))
        return self.mean - reach

    def upper_bound(self, alpha: float) -> float:
        """Return the one-sided upper bound of the mean."""
        if self.kind is Kind.SHARE:
            count = self._independent(alpha)
            return beta(1 - alpha, self.mean * count + 1, (1 - self.mean) * count)
        if not math.isfinite(self.standard_error):
            return math.inf
        reach = student_t(1 - alpha, self.freedom) * self.standard_error
        if self.kind is Kind.POSITIVE:
            return self.mean * math.exp(self._exponent(reach))
        return self.mean + reach

    def smallest_effect(self, alpha: float, power: float) -> float:
        """Return the smallest true difference that shows with this power at this alpha."""
        one, other = student_t(1 - alpha, self.freedom), student_t(power, self.freedom)
        if self.kind is Kind.SHARE and self.resamples:
            reach = max(self.mean - self.lower_bound(alpha), self.upper_bound(alpha) - self.mean)
            return min(1.0, reach * (one + other) / one)
        return (one + other) * self.standard_error

    def _exponent(self, reach: float) -> float:
        return min(_LARGEST_EXPONENT, reach / self.mean) if self.mean > 0 else 0.0

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
    whole = [prompt[~prompt.isnan()] for prompt in prompts]
    segments = [part for prompt in prompts for part in _segments(prompt, _length(prompts))]
    count, positions = len(segments), sum(part.numel() for part in segments)
    sums, sizes = _sums(segments)
    mean = float(sums.sum() / sizes.sum()) if count else float("nan")
    if count < 2:
        error = float("inf")
        return Estimate(mean=mean, standard_error=error, resamples=(), segments=count, kind=kind)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, DRAWS_AT_ONCE // count)
    means = torch.cat(
        [
            _resampled(sums, sizes, min(rows, RESAMPLES - done), generator)
            for done in range(0, RESAMPLES, rows)
        ]
    )
    means = means.sort().values
    finite = bool(means.isfinite().all())
    # A bootstrap's variance is (n - 1) / n of the sample's.
    error = float(means.std()) * math.sqrt(count / (count - 1)) if finite else float("inf")
    freedom = float(count - 1)
    whole = [prompt for prompt in whole if prompt.numel()]
    if by_prompt and len(whole) > 1 and finite:
        sums, sizes = _sums(whole)
        error = max(error, _left_out(sums, sizes))
        freedom = float(len(whole) - 1)
    return Estimate(
        mean=mean,
        standard_error=error,
        resamples=tuple(means.tolist()),
        segments=count,
        freedom=freedom,
        positions=positions,
        kind=kind,
    )


def _sums(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum and the number of values of each part."""
    sums = torch.tensor([part.sum() for part in parts], dtype=torch.float64)
    return sums, torch.tensor([float(part.numel()) for part in parts], dtype=torch.float64)


def _left_out(sums: torch.Tensor, sizes: torch.Tensor) -> float:
    """Return the standard error of the mean from those that leave out one part (a jackknife)."""
    others = (sums.sum() - sums) / (sizes.sum() - sizes)
    apart = (others - sums.sum() / sizes.sum()).square().sum()
    return math.sqrt(float(apart) * (len(sums) - 1) / len(sums))


def _resampled(
    sums: torch.Tensor, sizes: torch.Tensor, rows: int, generator: torch.Generator
) -> torch.Tensor:
    """Return the means of so many resamples."""
    drawn = torch.randint(len(sums), (rows, len(sums)), generator=generator)
    return sums[drawn].sum(-1) / sizes[drawn].sum(-1)


def _length(prompts: list[torch.Tensor]) -> int:
    longest = max((prompt.numel() for prompt in prompts), default=1)
    return max(1, math.ceil(math.cbrt(longest)))


def _segments(prompt: torch.Tensor, length: int) -> list[torch.Tensor]:
    parts = [part[~part.isnan()] for part in torch.split(prompt.double(), length)]
    return [part for part in parts if part.numel()]


def decide_at_most(found: Estimate, limit: float, alpha: float) -> Decision:
    """Decide whether the true mean is at most `limit`."""
    if not found.resamples:
        return Decision.UNDECIDED
    if found.upper_bound(alpha) <= limit:
        return Decision.PASS
    return Decision.FAIL if found.lower_bound(alpha) > limit else Decision.UNDECIDED


def decide_at_least(found: Estimate, limit: float, alpha: float) -> Decision:
    """Decide whether the true mean is at least `limit`."""
    if not found.resamples:
        return Decision.UNDECIDED
    if found.lower_bound(alpha) >= limit:
        return Decision.PASS
    return Decision.FAIL if found.upper_bound(alpha) < limit else Decision.UNDECIDED


def quantiles(prompts: list[torch.Tensor], shares: tuple[float, ...]) -> tuple[float, ...]:
    """Return the given quantiles over all positions, linear between ranks; NaN is left out."""
    values = torch.cat([prompt.double() for prompt in prompts]) if prompts else torch.empty(0)
    values = values[~values.isnan()]
    if not values.numel():
        return tuple(float("nan") for _ in shares)
    return tuple(float(value) for value in np.quantile(values.numpy(), shares))
