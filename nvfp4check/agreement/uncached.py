"""Whether a candidate kept values in its cache where the reference has FP8 codes.

A group is a prompt at a layer; d_t the direction in which attn_output errs if values are kept
(`nvfp4check.forward.bounds.uncached`), e_t the candidate's error at token t.

Contract:
    share      sum <e_t, d_t> / sum <d_t, d_t> over the tokens with golden inputs, each layer's sums
               divided by its mean of <d_t, d_t>: 0 for a correct cache but for chance; 1 for one
               that keeps values; and 1 for codes under another scale as well, as their distance
               from the value does not depend on that of the reference's
    interval   by leaving out one group at a time, whose roundings are independent of the others'
               as each layer begins with golden states; Student's t
    fault      the one-sided lower bound at LEVEL lies above a half. Less than two groups tell
               nothing
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nvfp4check.activations import UNCACHED, Run
from nvfp4check.agreement.layers import values
from nvfp4check.agreement.quantile import student_t

#: Probability that a correct cache has a lower bound above 0, let alone a half.
LEVEL = 0.01

POINT = "attn_output"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What one prompt at one layer says."""

    layer: int
    tokens: int
    #: Sums of <e, d> and of <d, d>.
    along: float
    length: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShare:
    """How much of what keeping values would change a candidate's error has."""

    share: float
    error: float
    groups: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The one-sided bounds at LEVEL; None where nothing is known."""
        if self.groups < 2:
            return None
        reach = student_t(1 - LEVEL, self.groups - 1) * self.error
        return self.share - reach, self.share + reach

    @property
    def kept_values(self) -> bool:
        """Whether it did not quantise as the reference did."""
        interval = self.interval
        return interval is not None and interval[0] > 0.5

    def message(self) -> str:
        """Say so."""
        low, high = self.interval or (-math.inf, math.inf)
        return (
            "its KV cache is not the FP8 that the reference has: values are kept, or another scale "
            f"rounds them; its error at {POINT} is {self.share:.2f} ({low:.2f} to {high:.2f}) of "
            "what keeping them makes, a correct cache's 0"
        )


def groups_of(
    reference: Run, candidate: Run, layer: int, golden: Mapping[str, int], dtype: str
) -> list[Group]:
    """Return what the prompts of a layer say, of as many golden tokens as each has."""
    found, names = [], reference.bounded(layer)
    for prompt, count in golden.items():
        there = all(
            layer in run.layers and POINT in run.points(layer) for run in (reference, candidate)
        )
        if not count or not there or f"{prompt}/{UNCACHED}/{dtype}" not in names:
            continue
        direction = reference.uncached(layer, prompt, dtype)[:count].double()
        r, c = (
            side[:count].double() for side in values(reference, candidate, layer, prompt, POINT)
        )
        along, length = ((of * direction).sum() for of in (c - r, direction))
        if bool(torch.isfinite(along)) and float(length) > 0:
            found.append(Group(layer=layer, tokens=count, along=float(along), length=float(length)))
    return found


def cache_share(groups: Sequence[Group]) -> CacheShare | None:
    """Return what all groups say together; None where there are none."""
    if not groups:
        return None
    scales = {
        layer: sum(g.length for g in groups if g.layer == layer)
        / sum(g.tokens for g in groups if g.layer == layer)
        for layer in {group.layer for group in groups}
    }
    along = torch.tensor([g.along / scales[g.layer] for g in groups], dtype=torch.float64)
    tokens = torch.tensor([g.tokens for g in groups], dtype=torch.float64)
    share, count = float(along.sum() / tokens.sum()), len(groups)
    error = math.inf
    if count > 1:
        left = (along.sum() - along) / (tokens.sum() - tokens)
        error = math.sqrt((count - 1) / count * float((left - left.mean()).square().sum()))
    return CacheShare(share=share, error=error, groups=count)
