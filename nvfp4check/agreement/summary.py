"""The numbers of a whole comparison of logits, from those of its positions.

Contract:
    mean       over all positions of all prompts that are not contaminated
    interval   95 %, by a bootstrap of blocks: segments and prompts; see `statistics`
    perplexity exp of the mean -log p of the tokens that really follow, of the positions where both
               sides know it
    effect     the smallest true change of the mean that a sample like this one shows
    bucket     positions by the reference's confidence: where it is sure, a small divergence of a
               wrong model hides behind a mean that the unsure positions make
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from nvfp4check.agreement.logits import PositionMetrics
from nvfp4check.agreement.statistics import Estimate, Kind, estimate, quantiles

#: Borders of the reference's confidence, the probability of its best token.
CONFIDENCE_BORDERS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)

#: Borders of the histogram of KL: decades, zero and beyond apart.
KL_DECADES = tuple(range(-12, 3))

#: Ranges of positions that are summed up together at most.
POSITION_BINS = 32

#: A KL is at most what logits of float32 or float64 may be apart; far beyond, it is infinite.
_MOST_KL = 1e300

#: Worst positions that are listed.
WORST = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Positions that are summed up together."""

    low: float
    high: float
    positions: int
    kl_mean: float
    top1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstPosition:
    """One of the positions with the largest divergence."""

    prompt: str
    position: int
    kl: float
    top_reference: int
    top_candidate: int
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the positions of all prompts amount to."""

    by_prompt: Mapping[str, PositionMetrics]
    kl: Estimate
    top1: Estimate
    #: Positions that count, and those that a side's NaN or infinity spoils.
    positions: int
    contaminated: int
    seed: int = 0

    def mean(self, name: str) -> float:
        """Return the mean of a metric over the positions that have it, NaN where none has."""
        values = self.values(name)
        return float(values.mean()) if len(values) else math.nan

    def values(self, name: str) -> torch.Tensor:
        """Return a metric of all positions that have it."""
        every = torch.cat([getattr(metrics, name) for metrics in self.by_prompt.values()])
        return every[~every.isnan()]

    @property
    def followed(self) -> int:
        """Positions that count and that another token of the prompt follows."""
        return sum(int((~m.contaminated[:-1]).sum()) for m in self.by_prompt.values())

    @property
    def followed_known(self) -> int:
        """Those of them where both sides know the probability of that token."""
        return len(self._followed()[0])

    @property
    def perplexities(self) -> tuple[float, float]:
        """Perplexity of reference and candidate on the tokens that really follow."""
        both = self._followed()
        if not len(both[0]):
            return math.nan, math.nan
        reference, candidate = (float(side.mean().exp()) for side in both)
        return reference, candidate

    def _followed(self) -> list[torch.Tensor]:
        """Return -log p of the token that follows, of both sides, where both know it."""
        both = [
            torch.cat([getattr(m, name) for m in self.by_prompt.values()])
            for name in ("nll_reference", "nll_candidate")
        ]
        known = ~both[0].isnan() & ~both[1].isnan()
        return [side[known] for side in both]

    @property
    def delta_p_rms(self) -> float:
        """Root of the mean square of the change of probability of the following token."""
        values = self.values("delta_p")
        return float(values.square().mean().sqrt()) if len(values) else math.nan

    def kl_quantiles(self, shares: tuple[float, ...]) -> tuple[float, ...]:
        """Return quantiles of KL."""
        # What lies between a finite and an infinite rank is infinite, and no difference of the two.
        kl = self.values("kl").nan_to_num(posinf=torch.finfo(torch.float64).max)
        found = quantiles([kl], shares)
        return tuple(value if value < _MOST_KL else math.inf for value in found)

    def by_confidence(self) -> list[Bucket]:
        """Return the positions by the reference's confidence."""
        confidence, kl, top1 = self._aligned("confidence", "kl", "top1")
        return [
            _bucket(low, high, (confidence >= low) & inside, kl, top1)
            for low, high in pairwise(CONFIDENCE_BORDERS)
            for inside in [confidence < high if high < 1 else confidence <= high]
        ]

    def by_position(self) -> list[Bucket]:
        """Return the positions by how far into the prompt they lie."""
        place = torch.cat(
            [torch.arange(len(metrics.kl)) for metrics in self.by_prompt.values()]
        ).double()
        every = [
            torch.cat([getattr(m, n) for m in self.by_prompt.values()]) for n in ("kl", "top1")
        ]
        keep = ~every[0].isnan()
        place, kl, top1 = place[keep], every[0][keep], every[1][keep]
        longest = int(place.max()) + 1 if len(place) else 0
        width = max(1, math.ceil(longest / POSITION_BINS))
        return [
            _bucket(low, low + width, (place >= low) & (place < low + width), kl, top1)
            for low in range(0, longest, width)
        ]

    def kl_histogram(self) -> list[tuple[str, int]]:
        """Return how many positions have a KL of each decade, zero and infinity apart."""
        kl = self.values("kl")
        finite = kl[kl.isfinite()]
        rows = [("0", int((finite == 0).sum()))]
        below = (finite > 0) & (finite < 10.0 ** KL_DECADES[0])
        rows.append((f"<1e{KL_DECADES[0]}", int(below.sum())))
        for decade in KL_DECADES[:-1]:
            inside = (finite >= 10.0**decade) & (finite < 10.0 ** (decade + 1))
            rows.append((f"1e{decade}", int(inside.sum())))
        beyond = int((finite >= 10.0 ** KL_DECADES[-1]).sum() + kl.isposinf().sum())
        return [*rows, (f">=1e{KL_DECADES[-1]}", beyond)]

    def worst(self) -> list[WorstPosition]:
        """Return the positions with the largest KL, the worst first."""
        places = [
            (float(kl), prompt, position)
            for prompt, metrics in self.by_prompt.items()
            for position, kl in _largest(metrics.kl)
        ]
        places.sort(key=lambda place: -place[0])
        return [
            WorstPosition(
                prompt=prompt,
                position=position,
                kl=kl,
                top_reference=int(self.by_prompt[prompt].top_token_reference[position]),
                top_candidate=int(self.by_prompt[prompt].top_token_candidate[position]),
                confidence=float(self.by_prompt[prompt].confidence[position]),
            )
            for kl, prompt, position in places[:WORST]
        ]

    def _aligned(self, *names: str) -> list[torch.Tensor]:
        """Return metrics of the positions that have a KL."""
        every = [torch.cat([getattr(m, n) for m in self.by_prompt.values()]) for n in names]
        keep = ~every[names.index("kl")].isnan()
        return [values[keep] for values in every]


def summarize(by_prompt: Mapping[str, PositionMetrics], seed: int = 0) -> Summary:
    """Sum up the positions of all prompts."""
    contaminated = sum(int(metrics.contaminated.sum()) for metrics in by_prompt.values())
    total = sum(len(metrics.kl) for metrics in by_prompt.values())
    return Summary(
        by_prompt=by_prompt,
        kl=estimate([m.kl for m in by_prompt.values()], seed, Kind.POSITIVE, by_prompt=True),
        top1=estimate([m.top1 for m in by_prompt.values()], seed, Kind.SHARE, by_prompt=True),
        positions=total - contaminated,
        contaminated=contaminated,
        seed=seed,
    )


def paired(
    left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor], seed: int = 0
) -> Estimate:
    """Estimate the mean of left - right over the positions of the prompts that both have."""
    shared: Sequence[str] = [prompt for prompt in left if prompt in right]
    differences = [left[prompt] - right[prompt] for prompt in shared]
    return estimate(differences, seed, Kind.DIFFERENCE, by_prompt=True)


def _bucket(
    low: float, high: float, inside: torch.Tensor, kl: torch.Tensor, top1: torch.Tensor
) -> Bucket:
    count = int(inside.sum())
    return Bucket(
        low=low,
        high=high,
        positions=count,
        kl_mean=float(kl[inside].mean()) if count else math.nan,
        top1=float(top1[inside].mean()) if count else math.nan,
    )


def _largest(kl: torch.Tensor) -> list[tuple[int, float]]:
    order = kl.nan_to_num(nan=-1.0, posinf=torch.inf).topk(min(WORST, len(kl)))
    return [
        (int(place), float(value))
        for value, place in zip(order.values, order.indices, strict=True)
        if value > 0
    ]
