"""What a sample of positions supports: intervals, smallest visible effects, verdicts.

Positions of one text are not independent, so the unit of resampling is a segment of consecutive
positions of one prompt.

Contract:
    segment    ceil(n ** (1/3)) positions, n the longest prompt; the growth that is optimal for the
               variance of a mean (Hall, Horowitz and Jing, Biometrika 82, 1995)
    interval   percentiles of the mean over resampled segments, weighted by their lengths
    verdict    PASS when the one-sided 1 - alpha bound lies on the good side of the limit, FAIL
               when the opposite bound lies on the bad side, UNDECIDED otherwise
    effect     (z(1 - alpha) + z(power)) * standard error: the smallest true difference that a
               sample like this one shows with that power
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np
import torch

#: Resamples of a bootstrap: the 2.5 % points rest on 100 draws each.
RESAMPLES = 4000

#: Indices of resamples drawn at one time: bounds the memory they take.
DRAWS_AT_ONCE = 1 << 22


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

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Two-sided percentile interval, or None with fewer than two segments."""
        tail = (1 - level) / 2
        if not self.resamples:
            return None
        return self.quantile(tail), self.quantile(1 - tail)

    def quantile(self, share: float) -> float:
        """Return a quantile of the resampled means, the nearest rank."""
        last = len(self.resamples) - 1
        return self.resamples[min(last, max(0, round(share * last)))]

    def lower_bound(self, alpha: float) -> float:
        """Return the one-sided lower bound of the mean from its standard error.

        For levels that lie beyond what the resamples reach, as when one of many points is tested.
        """
        return self.mean - NormalDist().inv_cdf(1 - alpha) * self.standard_error

    def smallest_effect(self, alpha: float, power: float) -> float:
        """Return the smallest true difference that shows with this power at this alpha."""
        normal = NormalDist()
        return (normal.inv_cdf(1 - alpha) + normal.inv_cdf(power)) * self.standard_error


def estimate(prompts: list[torch.Tensor], seed: int = 0) -> Estimate:
    """Estimate the mean over all positions of `prompts`, each float64 [T]; NaN is left out.

    An infinite position makes the mean infinite.
    """
    segments = [part for prompt in prompts for part in _segments(prompt, _length(prompts))]
    sums = torch.tensor([part.sum() for part in segments], dtype=torch.float64)
    sizes = torch.tensor([float(part.numel()) for part in segments], dtype=torch.float64)
    count = len(segments)
    mean = float(sums.sum() / sizes.sum()) if count else float("nan")
    if count < 2:
        return Estimate(mean=mean, standard_error=float("inf"), resamples=(), segments=count)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, DRAWS_AT_ONCE // count)
    means = torch.cat(
        [
            _resampled(sums, sizes, min(rows, RESAMPLES - done), generator)
            for done in range(0, RESAMPLES, rows)
        ]
    )
    means = means.sort().values
    return Estimate(
        mean=mean,
        standard_error=float(means.std()) if bool(means.isfinite().all()) else float("inf"),
        resamples=tuple(means.tolist()),
        segments=count,
    )


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
    if found.quantile(1 - alpha) <= limit:
        return Decision.PASS
    return Decision.FAIL if found.quantile(alpha) > limit else Decision.UNDECIDED


def decide_at_least(found: Estimate, limit: float, alpha: float) -> Decision:
    """Decide whether the true mean is at least `limit`."""
    if not found.resamples:
        return Decision.UNDECIDED
    if found.quantile(alpha) >= limit:
        return Decision.PASS
    return Decision.FAIL if found.quantile(1 - alpha) < limit else Decision.UNDECIDED


def quantiles(prompts: list[torch.Tensor], shares: tuple[float, ...]) -> tuple[float, ...]:
    """Return the given quantiles over all positions, linear between ranks; NaN is left out."""
    values = torch.cat([prompt.double() for prompt in prompts]) if prompts else torch.empty(0)
    values = values[~values.isnan()]
    if not values.numel():
        return tuple(float("nan") for _ in shares)
    return tuple(float(value) for value in np.quantile(values.numpy(), shares))
