"""Two runs held against each other: layers, routing, logits, and the verdict.

Contract of the verdict:
    fail        a side holds NaN or infinity, a run is not what it says, or a judged criterion fails
    undecided   a judged criterion is open, or nothing was judged
    pass        everything judged holds
    KL          known from below only (from a server's best tokens) can exceed a limit, but not be
                shown to keep it: what would pass is undecided
    judged      the limits on KL and top-1 where given; else the layers, against derived bounds
                where their inputs are golden and the noise floor where there is one, and logits
                against the latter; else only
                whether the two runs are equal bit for bit
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.blind import Blind, blind_spots
from nvfp4check.agreement.bounds import Bounds, hold_bounds
from nvfp4check.agreement.criteria import AgreeOptions as AgreeOptions
from nvfp4check.agreement.criteria import Criterion, criteria_of
from nvfp4check.agreement.criteria import Judge as Judge
from nvfp4check.agreement.divergence import Divergence, HeldPoint, first_divergence, hold
from nvfp4check.agreement.integrity import Integrity, Problem, check_runs
from nvfp4check.agreement.layers import PointAgreement, compare_layers
from nvfp4check.agreement.logits_floor import hold_logits
from nvfp4check.agreement.outliers import Kept
from nvfp4check.agreement.positions import Positions, compare_positions
from nvfp4check.agreement.predicting import compare_predictors
from nvfp4check.agreement.presence import (
    common_prompts,
    partial_floor,
    require_fit,
    without_layers,
    without_logits,
)
from nvfp4check.agreement.routing import LayerRouting, compare_routing
from nvfp4check.agreement.statistics import Decision, Estimate
from nvfp4check.agreement.summary import Summary, paired, summarize
from nvfp4check.findings import CheckError


@dataclass(frozen=True, slots=True, kw_only=True)
class KlSplit:
    """KL of the candidate, and of the candidate with the reference's experts."""

    total: Estimate
    arithmetic: Estimate
    #: Total less arithmetic, paired by position: what other experts cost.
    flips: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Versus:
    """KL of another candidate less that of this one, paired by position."""

    run: Run
    difference: Estimate
    kl: Estimate

    @property
    def nearer(self) -> str | None:
        """`candidate` or `versus`; None where the interval holds 0."""
        interval = self.difference.interval()
        if interval is None or interval[0] <= 0 <= interval[1]:
            return None
        return "candidate" if interval[0] > 0 else "versus"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreeResult:
    """Everything that was found."""

    reference: Run
    candidate: Run
    options: AgreeOptions
    prompts: tuple[str, ...]
    problems: tuple[Problem, ...]
    blind: tuple[Blind, ...]
    layers: tuple[HeldPoint, ...]
    routing: tuple[LayerRouting, ...]
    bounds: Bounds
    divergence: Divergence | None
    positions: Positions | None
    logits: Summary | None
    #: What came of holding the logits against those of the noise runs; None where it cannot be.
    logits_held: HeldPoint | None
    #: Of each noise run that has logits.
    noise_logits: tuple[Summary, ...]
    split: KlSplit | None
    versus: Versus | None
    criteria: tuple[Criterion, ...]

    @property
    def verdict(self) -> Decision:
        """The answer."""
        decisions = {criterion.decision for criterion in self.criteria}
        if Decision.FAIL in decisions or any(problem.fatal for problem in self.problems):
            return Decision.FAIL
        if not decisions or Decision.UNDECIDED in decisions:
            return Decision.UNDECIDED
        return Decision.PASS

    @property
    def skipped(self) -> tuple[Problem, ...]:
        """What could not be compared because it is not there."""
        return tuple(problem for problem in self.problems if problem.kind == "missing")


def agree(reference: Run, candidate: Run, options: AgreeOptions | None = None) -> AgreeResult:
    """Compare two runs.

    Raises:
        CheckError: They have no prompt in common, a prompt's tokens differ, neither layers nor
            logits are there on both sides, or a noise or forced run is of another checkpoint.
    """
    options = options or AgreeOptions()
    prompts, missing = common_prompts(reference, candidate)
    integrity = check_runs(reference, candidate, prompts)
    integrity.problems.extend(missing)
    integrity.problems.extend(without_layers(reference, candidate, options))
    others = (*options.noise, options.forced, options.versus)
    for other in (run for run in others if run is not None):
        common_prompts(reference, other)
    for run in options.noise:
        require_fit("--noise", run, prompts, "the reference", reference)
    if options.forced is not None:
        require_fit("--forced", options.forced, prompts, "the candidate", candidate)
    runs = (candidate, *options.noise)
    routings = [list(compare_routing(reference, run, prompts, integrity.skip)) for run in runs]
    kept = [Kept.of(reference, routing) for routing in routings]
    held, bounds, divergence = _layers(
        reference, candidate, prompts, integrity, options, routings, kept
    )
    routing = routings[0]
    integrity.problems.extend(bounds.problems)
    integrity.problems.extend(without_logits(reference, candidate, options))
    positions = compare_positions(reference, candidate, prompts, options.head, integrity.problems)
    if not held and not routing and positions is None and not integrity.fatal:
        raise CheckError(
            f"{reference.path} and {candidate.path} have neither a point of a layer nor logits in "
            "common; record some with `nvfp4check forward --activations all --logits full`"
        )
    logits = summarize(positions.metrics, options.seed) if positions else None
    floors = [compare_positions(reference, run, prompts, options.head) for run in options.noise]
    noise = tuple(summarize(found.metrics, options.seed) for found in floors if found is not None)
    metrics = [found.metrics for found in (positions, *floors) if found is not None]
    logits_held = (
        hold_logits(runs, metrics, kept, options.alpha, options.seed)
        if len(metrics) == len(runs)
        else None
    )
    integrity.problems.extend(partial_floor(options.noise, held, logits))
    return AgreeResult(
        reference=reference,
        candidate=candidate,
        options=options,
        prompts=prompts,
        problems=tuple(integrity.problems),
        blind=tuple(blind_spots(reference, prompts, routing)),
        layers=tuple(held),
        routing=tuple(routing),
        bounds=bounds,
        divergence=divergence,
        positions=positions,
        logits=logits,
        logits_held=logits_held,
        noise_logits=noise,
        split=_split(reference, prompts, positions, options),
        versus=_versus(reference, prompts, positions, options),
        criteria=tuple(
            criteria_of(held, routing, bounds, divergence, logits, positions, options, logits_held)
        ),
    )


def _layers(
    reference: Run,
    candidate: Run,
    prompts: tuple[str, ...],
    integrity: Integrity,
    options: AgreeOptions,
    routings: Sequence[Sequence[LayerRouting]],
    kept: Sequence[Kept],
) -> tuple[list[HeldPoint], Bounds, Divergence | None]:
    def points_of(run: Run, problems: list[Problem]) -> list[PointAgreement]:
        found = compare_layers(reference, run, prompts, integrity.skip)
        own = [point for point in found if point.errors]
        return own + list(compare_predictors(reference, run, prompts, problems))

    points = points_of(candidate, integrity.problems)
    noise = [{point.key: point for point in points_of(run, [])} for run in options.noise]
    bounds = hold_bounds(reference, candidate, prompts, points, options.bounds)
    units = _units(points, reference, candidate)
    held = hold(points, noise, units, options.alpha, options.seed, bounds.points, kept)
    routing, *noise_routing = routings
    return held, bounds, first_divergence(held, routing, noise_routing, bounds)


def _units(
    points: Sequence[PointAgreement], reference: Run, candidate: Run
) -> Mapping[tuple[int, str], float]:
    """Return the unit roundoff of the coarser of the two dtypes a point is stored in."""
    units = {}
    for point in points:
        prompt = next(iter(point.errors))
        dtypes = (
            run.point(point.layer, prompt, point.point).dtype for run in (reference, candidate)
        )
        units[point.key] = max(torch.finfo(dtype).eps for dtype in dtypes) / 2
    return units


def _split(
    reference: Run, prompts: tuple[str, ...], positions: Positions | None, options: AgreeOptions
) -> KlSplit | None:
    if options.forced is None or positions is None:
        return None
    forced = compare_positions(reference, options.forced, prompts, options.head)
    if forced is None:
        raise CheckError(f"{options.forced.path}: holds no logits; KL is split by them")
    total = {prompt: metrics.kl for prompt, metrics in positions.metrics.items()}
    arithmetic = {prompt: metrics.kl for prompt, metrics in forced.metrics.items()}
    return KlSplit(
        total=summarize(positions.metrics, options.seed).kl,
        arithmetic=summarize(forced.metrics, options.seed).kl,
        flips=paired(total, arithmetic, options.seed),
    )


def _versus(
    reference: Run, prompts: tuple[str, ...], positions: Positions | None, options: AgreeOptions
) -> Versus | None:
    if options.versus is None:
        return None
    other = compare_positions(reference, options.versus, prompts, options.head)
    if positions is None or other is None:
        raise CheckError(
            "--versus compares logits, and a run holds none; run forward with --logits"
        )
    kl = {prompt: metrics.kl for prompt, metrics in positions.metrics.items()}
    other_kl = {prompt: metrics.kl for prompt, metrics in other.metrics.items()}
    return Versus(
        run=options.versus,
        difference=paired(other_kl, kl, options.seed),
        kl=summarize(other.metrics, options.seed).kl,
    )
