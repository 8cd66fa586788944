"""The smallest error a rule sees, on products as large as a model's.

Contract:
    scale error    every element of the right result too large by one factor 1 + e; e goes down by
                   halves from 1
    flipped signs  the signs of n elements, chosen at random; n goes up by doubling from 1
Both are made of the real product, which is then rounded to the output's dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nvfp4check import compare, tolerance
from nvfp4check.faults.published_rules import PublishedRule, Sample, tolerance_rule
from nvfp4check.tolerance import Facts
from nvfp4ref.matmul import exact
from nvfp4ref.rounding import round_to

Tensor = torch.Tensor

#: Factors from 1 down to about a hundredth of an ulp of bfloat16.
HALVINGS = 16


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What a rule sees of errors that get smaller; None where it sees none."""

    scale_error: float | None
    flipped_signs: int | None
    elements: int


def of_rule(rule: PublishedRule, seed: int = 0) -> Sensitivity:
    """Return the smallest errors that a published rule sees."""
    sample = rule.model_sized_sample(seed)
    expected = rule.expected(sample)
    return _sensitivity(lambda actual: rule.accepts(actual, expected), sample, rule.dtype, seed)


def of_derived_bound(seed: int = 0) -> Sensitivity:
    """Return the smallest errors that the derived bound sees, of a kernel that declares nothing."""
    sample = tolerance_rule(0.0, 0.0).model_sized_sample(seed)
    a, b = sample.a, sample.b
    allowed = tolerance.of_product(
        exact(a.codes, a.scales, b.codes, b.scales),
        a.global_scale * b.global_scale,
        a.original.shape[1],
        Facts(),
        torch.bfloat16,
    )
    return _sensitivity(
        lambda actual: compare.within(actual, allowed, what="product").holds,
        sample,
        torch.bfloat16,
        seed,
    )


def _sensitivity(
    accepts: Callable[[Tensor], bool], sample: Sample, dtype: torch.dtype, seed: int
) -> Sensitivity:
    right = sample.product
    least = None
    for error in (2.0**-step for step in range(HALVINGS + 1)):
        if accepts(round_to(right * (1 + error), dtype)):
            break
        least = error
    order = torch.randperm(right.numel(), generator=torch.Generator().manual_seed(seed))
    fewest, count = None, 1
    while fewest is None and count <= right.numel():
        flipped = right.flatten().clone()
        flipped[order[:count]] *= -1
        if not accepts(round_to(flipped.view(right.shape), dtype)):
            fewest = count
        count *= 2
    return Sensitivity(least, fewest, right.numel())
