"""What of an agreement is judged, and how it is decided.

Contract:
    limits   on KL and top-1, where given: kept or broken only if a one-sided interval says so, for
             positions like these. No sample tells of a kind of positions that it lacks: with
             `rare_kl` a limit on KL is kept only if it would be with such positions as bad as that
    bounds   beyond one of them fails; within all of them passes only if every point that is not
             equal bit for bit has been held, against its bound or the noise floor; else undecided
    floor    a divergence against the noise floor fails, of layers or of logits
    bits     without any of these, equal runs pass
    NaN      or infinity fails, whatever else is judged
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from nvfp4check.activations import Run
from nvfp4check.agreement.bounds import Bounds
from nvfp4check.agreement.divergence import BOUND, FINITE, NOTHING, Divergence, HeldPoint
from nvfp4check.agreement.positions import Positions
from nvfp4check.agreement.routing import LayerRouting
from nvfp4check.agreement.statistics import (
    Decision,
    Estimate,
    decide_at_least,
    decide_at_most,
    times_as_many,
)
from nvfp4check.agreement.summary import Summary
from nvfp4check.findings import CheckError

#: More prompts than this are too many to be told a number.
MOST_PROMPTS = 1_000_000

BOUNDS_CRITERION = "layers within their derived bounds"
FLOOR_CRITERION = "layers within the noise floor"
LOGITS_CRITERION = "logits within the noise floor"


class Judge(StrEnum):
    """What the verdict rests on."""

    #: Limits where given, else layers where they have bounds or a floor, else equality in bits.
    AUTO = "auto"
    #: Nothing: the numbers are reported, and only a broken run fails.
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreeOptions:
    """What two runs are held against."""

    noise: tuple[Run, ...] = ()
    #: The candidate's model with the reference's choice of experts.
    forced: Run | None = None
    #: Another candidate: is it nearer to the reference?
    versus: Run | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    alpha: float = 0.05
    power: float = 0.8
    #: KL of positions too rare to be in the sample: at the vocabulary's log, that of a guess.
    rare_kl: float = 0.0
    judge: Judge = Judge.AUTO
    #: Checkpoint whose head makes logits of final states.
    head: str | None = None
    seed: int = 0
    #: Which of the reference's bounds; None: by what the candidate says of itself.
    bounds: str | None = None

    @property
    def limited(self) -> bool:
        """Whether limits on logits are given, which are then all that is judged."""
        return self.max_kl is not None or self.min_top1 is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """Something that was decided."""

    what: str
    decision: Decision
    found: float | None
    limit: float | None
    #: The smallest true difference that such a sample shows.
    effect: float | None
    #: One-sided bounds of the true value at alpha; None where nothing is known or estimated.
    bounds: tuple[float, float] | None = None
    #: Share of all positions that a kind may have of which, at alpha, these hold none.
    unseen_share: float | None = None
    #: KL of a position of such a kind, and what the upper bound allows for it.
    rare_kl: float | None = None
    allowance: float | None = None
    #: Prompts like these that would decide what is undecided; None where that is not known.
    prompts_needed: int | None = None


def criteria_of(
    held: Sequence[HeldPoint],
    routing: Sequence[LayerRouting],
    bounds: Bounds,
    divergence: Divergence | None,
    logits: Summary | None,
    positions: Positions | None,
    options: AgreeOptions,
    logits_held: HeldPoint | None = None,
) -> list[Criterion]:
    """Judge what was found; `logits_held` is what came of holding logits against the noise floor.

    Raises:
        CheckError: A limit on logits is given, and there are none.
    """
    found = []
    if logits is not None and logits.contaminated:
        found.append(_broken("positions without NaN or infinity", logits.contaminated))
    spoilt = sum(point.agreement.nonfinite_candidate for point in held)
    if spoilt:
        found.append(_broken("activations without NaN or infinity", spoilt))
    if options.judge is Judge.NONE:
        return found
    if options.limited and logits is None:
        raise CheckError("--max-kl and --min-top1 judge logits, and a run holds none")
    if logits is not None and options.max_kl is not None:
        found.append(_limit_on_kl(logits.kl, options.max_kl, positions, options))
    if logits is not None and options.min_top1 is not None:
        found.append(_limit_on_top1(logits.top1, options.min_top1, options))
    if options.limited:
        return found
    if bounds.points:
        found.append(_plain(BOUNDS_CRITERION, _within_bounds(held, bounds)))
    if options.noise and any(point.floor is not None for point in held):
        beyond = divergence is not None and divergence.held_against != BOUND
        found.append(_plain(FLOOR_CRITERION, Decision.FAIL if beyond else Decision.PASS))
    elif not bounds.points and _equal(held, routing, logits):
        found.append(_plain("equal bit for bit at every point compared", Decision.PASS))
    if logits_held is not None:
        decision = Decision.FAIL if logits_held.diverges else Decision.PASS
        found.append(_plain(LOGITS_CRITERION, decision))
    return found


def _within_bounds(held: Sequence[HeldPoint], bounds: Bounds) -> Decision:
    """Decide whether layers keep their bounds; what has neither bound nor floor leaves it open."""
    spoilt = any(point.held_against == FINITE for point in held)
    if spoilt or bounds.illegal or any(p.bound and p.bound.exceeding for p in held):
        return Decision.FAIL
    open_ = any(point.held_against == NOTHING and not point.agreement.bitwise for point in held)
    return Decision.UNDECIDED if open_ else Decision.PASS


def _equal(
    held: Sequence[HeldPoint], routing: Sequence[LayerRouting], logits: Summary | None
) -> bool:
    return (
        all(point.agreement.bitwise for point in held)
        and not any(layer.flips for layer in routing)
        and (logits is None or bool((logits.values("kl") == 0).all()))
    )


def _limit_on_kl(
    found: Estimate, limit: float, positions: Positions | None, options: AgreeOptions
) -> Criterion:
    rare = options.rare_kl
    decision = decide_at_most(found, limit, options.alpha, rare)
    bounded = positions is not None and positions.tail is not None and not positions.tail.exact
    if bounded and decision is Decision.PASS:
        decision = Decision.UNDECIDED
    high = found.ceiling(options.alpha, rare)
    return Criterion(
        what="mean KL",
        decision=decision,
        found=found.mean,
        limit=limit,
        effect=found.smallest_effect(options.alpha, options.power),
        bounds=(found.lower_bound(options.alpha), high) if found.known else None,
        unseen_share=1 - options.alpha ** (1 / found.positions) if found.positions else None,
        rare_kl=rare,
        allowance=high - found.ceiling(options.alpha, 0.0) if math.isfinite(high) else None,
        prompts_needed=None if bounded else _needed(decision, found, limit, options.alpha, rare),
    )


def _limit_on_top1(found: Estimate, limit: float, options: AgreeOptions) -> Criterion:
    alpha = options.alpha
    decision = decide_at_least(found, limit, alpha)
    return Criterion(
        what="top-1 agreement",
        decision=decision,
        found=found.mean,
        limit=limit,
        effect=found.smallest_effect(alpha, options.power),
        bounds=(found.lower_bound(alpha), found.upper_bound(alpha)) if found.known else None,
        prompts_needed=_needed(decision, found, limit, alpha),
    )


def _needed(
    decision: Decision, found: Estimate, limit: float, alpha: float, rare: float | None = None
) -> int | None:
    if decision is not Decision.UNDECIDED:
        return None
    times = times_as_many(found, limit, alpha, rare)
    if times is None or times * found.prompts > MOST_PROMPTS:
        return None
    return max(found.prompts + 1, math.ceil(times * found.prompts))


def _plain(what: str, decision: Decision) -> Criterion:
    return Criterion(what=what, decision=decision, found=None, limit=None, effect=None)


def _broken(what: str, count: int) -> Criterion:
    return Criterion(what=what, decision=Decision.FAIL, found=float(count), limit=0.0, effect=None)
