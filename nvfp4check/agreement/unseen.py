"""Means of numbers that are not negative, with room for what the sample does not hold.

A sample of a heavy tail lacks, as a rule, the few values that make much of the mean: resamples of
what is there are too small, all of them. So one more block takes part, which nobody saw.

Contract:
    block      consecutive positions, or a whole prompt: a sum and a size
    weights    of the blocks and of the unseen one: independent exponentials, over their sum
               (Rubin's bootstrap of blocks, Annals of Statistics 9, 1981)
    upper      quantile of the weighted mean, the unseen block as large as the tail reaches. If no
               block can be larger, this is Gaffke's bound (Mathematical Methods of Statistics 14,
               2005), of zeros and ones that of Clopper and Pearson
    lower      quantile of the weighted mean, the unseen block 0
    tail       Hill's estimate (Annals of Statistics 3, 1975), the mean log of the ceil(sqrt(n))
               largest, 2 at least, over the one below them. Taken is its upper 80 % limit, that of
               a Pareto tail; for a verdict by fewer than 10 blocks 90 %
    beyond     1 / (1 - tail): times the largest, the mean of what lies beyond it, of a Pareto tail.
               Above 10 it is called infinite: the mean is that of the largest values alone. A
               resample takes 10 then

Blocks are sorted first, so that no order of prompts makes a difference.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Times the largest value that a tail is followed.
FARTHEST = 10.0

#: Confidence with which a tail is no heavier than taken; and that of a verdict by few blocks.
CONFIDENCE = 0.8
CONFIDENCE_OF_FEW = 0.9
FEW = 10

#: Weights drawn at one time: bounds the memory they take.
DRAWS_AT_ONCE = 1 << 22

_HALVINGS = 60


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocks:
    """Resampled blocks: of each resample the weighted sum and size, and the unseen one's size."""

    sums: Floats
    sizes: Floats
    unseen: Floats
    #: The mean of the unseen block, for the upper bound.
    reach: float
    #: That mean as a verdict takes it; infinite where the tail is.
    far: float

    def upper(self, alpha: float, at_least: float = 0.0) -> float:
        """Return the upper bound; the mean of the unseen block is `at_least` that."""
        seen = self.sums + self.unseen * max(at_least, self.reach)
        return _quantile(seen / (self.sizes + self.unseen), 1 - alpha)

    def lower(self, alpha: float) -> float:
        """Return the lower bound."""
        return _quantile(self.sums / (self.sizes + self.unseen), alpha)


def blocks(
    sums: Floats,
    sizes: Floats,
    tail: Floats,
    resamples: int,
    seed: int,
    largest: float | None = None,
    limit: float = math.inf,
) -> Blocks:
    """Resample blocks.

    The unseen one reaches beyond the `largest` mean of a block by the tail of these values, and is
    no larger than `limit`.
    """
    largest = max(0.0, float((sums / sizes).max()) if largest is None else largest)
    surely = CONFIDENCE_OF_FEW if len(sums) < FEW else CONFIDENCE
    near, far = (beyond(tail, each) if largest else 0.0 for each in (CONFIDENCE, surely))
    order = np.lexsort((sizes, sums))
    pairs = np.stack((sums, sizes), axis=-1)[order]
    generator = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // (len(pairs) + 1))
    seen, unseen = [], []
    for done in range(0, resamples, rows):
        shape = (min(rows, resamples - done), len(pairs) + 1)
        weights = generator.standard_exponential(shape)
        seen.append(weights[:, :-1] @ pairs)
        unseen.append(weights[:, -1])
    drawn = np.concatenate(seen)
    return Blocks(
        sums=drawn[:, 0],
        sizes=drawn[:, 1],
        unseen=np.concatenate(unseen) * (math.fsum(sizes) / len(sizes)),
        reach=min(limit, largest * min(near, FARTHEST)),
        far=min(limit, largest * far),
    )


def beyond(values: Floats, confidence: float) -> float:
    """Return how many times the largest value those beyond it are, on the mean."""
    tail = tail_index(values, confidence)
    return 1 / (1 - tail) if tail < 1 - 1 / FARTHEST else math.inf


def tail_index(values: Floats, confidence: float) -> float:
    """Return the upper limit of the tail's index: infinite for one value above 0, or none."""
    positive = np.sort(values[values > 0])[::-1]
    count = min(len(positive) - 1, max(2, math.ceil(math.sqrt(len(values)))))
    if count < 1:
        return math.inf
    index = float(np.log(positive[:count] / positive[count]).mean())
    return index * count / _gamma(1 - confidence, count)


@lru_cache(maxsize=256)
def _gamma(share: float, shape: int) -> float:
    """Return the quantile of the gamma distribution of a whole shape."""
    low, high = 0.0, shape + 10 * math.sqrt(shape) + 10
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        # fewer than `shape` events of a Poisson process by then
        logs = [step * math.log(middle) - math.lgamma(step + 1) for step in range(shape)]
        below = 1 - math.fsum(math.exp(log - middle) for log in logs)
        low, high = (middle, high) if below < share else (low, middle)
    return (low + high) / 2


def _quantile(values: Floats, share: float) -> float:
    """Return the value that at least this share of them does not exceed."""
    place = min(len(values) - 1, max(0, math.ceil(share * len(values)) - 1))
    return float(np.partition(values, place)[place])
