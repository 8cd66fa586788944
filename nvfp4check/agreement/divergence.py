"""The first point at which two runs part by more than noise.

Contract:
    bound       where every token of a point has golden inputs, it diverges if one of them lies
                beyond its derived bound (`bounds`), and by nothing else; where only some have, by
                that or by what follows. Each is exceeded by chance with the probability that the
                bounds state: their number times that is the level of all of them
    NaN         or infinity where the reference has none is a divergence whatever it is held against
    error       e of a token at a point, ||c - r|| / ||r||; f that of a noise run, and over several
                of them the geometric mean: e is then as likely above f as below if it is noise too
    unit        both are taken to be at least u, the unit roundoff of the stored dtype: what is
                smaller is how the values were stored
    ratio       mean over all tokens of log(e / f), paired by token
    excess      mean over all tokens of log+(e / s) - log+(f / s), the latter's mean over the noise
                runs, s the 90 % quantile of all e and f together, log+ the logarithm where it is
                above 0 and 0 elsewhere: a fault that only some tokens meet, as that of one expert,
                shows in it, where the many small errors of the others would hide it from the
                ratio; and a single token that went to other experts does not outweigh all others,
                as it would in a mean of squares
    outlier     a single token that is farther off than noise explains, where that can be told: see
                `outliers`
    diverges    the lower bound of the ratio or of the excess lies above 0, or a token is an
                outlier. Many points are tested, three ways each, so the level of each test is
                `alpha` divided by their number: a candidate that is only noise is called divergent
                at any point with probability `alpha` at most, as far as the mean of its prompts,
                and the logarithm of an error without other experts, are normal. Tokens of one
                prompt depend on one another however far apart (all of them attend to the first),
                so means are known as well as whole prompts say; of one prompt only as well as its
                segments do, which is too well
    router      the choice of experts diverges, where the scores have a derived bound, by the first
                flip that this leaves no room for; else by the first that the error of the scores
                does not explain; without scores, by the first where no noise run has one
    token       the first whose error is above every token's floor; where there is none, the one
                with the largest ratio; the outlier where only that speaks
    no floor    without a noise run any difference in bits is a divergence, held against nothing
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nvfp4check.activations import EH_PROJ, MTP_ENDS, ROUTER_EXPERTS
from nvfp4check.agreement.bounds import Bounds, HeldBound
from nvfp4check.agreement.layers import Place, PointAgreement
from nvfp4check.agreement.outliers import Kept, Outlier, outlier
from nvfp4check.agreement.routing import Flip, LayerRouting
from nvfp4check.agreement.statistics import Estimate, estimate

#: Tests of each point: the ratio, the excess, its outliers.
TESTS = 3

#: Share of the errors and floors below what counts as high.
HIGH_SHARE = 0.9

BOUND = "bound"
NOISE_FLOOR = "noise floor"
SCORE_ERROR = "error of the scores"
FINITE = "reference's finite values"
NOTHING = "nothing"

#: Order of the computation within a layer.
ORDER = (
    EH_PROJ,
    "attn_input",
    "attn_output",
    "mlp_input",
    "router_scores",
    ROUTER_EXPERTS,
    "router_weights",
    "mlp_output",
    "hidden",
    *MTP_ENDS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPoint:
    """A point's agreement, and what it was held against."""

    agreement: PointAgreement
    #: Whether the block that gives this point got bitwise equal input; None where unknown.
    input_bitwise: bool | None
    #: What came of holding it against its derived bound; None without one.
    bound: HeldBound | None = None
    #: Relative error of the noise runs, None without them.
    floor: float | None = None
    #: Mean log ratio of error and floor, and its lower bound.
    log_ratio: float | None = None
    log_ratio_low: float | None = None
    #: Mean excess of the error over the floor, and its lower bound.
    excess: float | None = None
    excess_low: float | None = None
    #: A token that is farther off than noise explains.
    outlier: Outlier | None = None
    #: None where there was nothing to hold it against.
    diverges: bool | None = None
    #: The token by which it diverges.
    place: Place | None = None

    @property
    def held_against(self) -> str:
        """What the error was held against."""
        if self.agreement.spoilt:
            return FINITE
        if self.bound is not None and (self.bound.whole or self.bound.exceeding):
            return BOUND
        return NOTHING if self.floor is None else NOISE_FLOOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Where two runs part."""

    layer: int
    point: str
    place: Place
    held_against: str


#: Point to the point that its block got as input.
_INPUTS = {
    "attn_output": "attn_input",
    "mlp_output": "mlp_input",
    "router_scores": "mlp_input",
    "router_weights": "router_scores",
}


def hold(
    points: Sequence[PointAgreement],
    noise: Sequence[Mapping[tuple[int, str], PointAgreement]],
    units: Mapping[tuple[int, str], float],
    alpha: float,
    seed: int = 0,
    bounds: Mapping[tuple[int, str], HeldBound] | None = None,
    kept: Sequence[Kept] = (),
) -> list[HeldPoint]:
    """Hold each point against its bound and the noise runs.

    `units` are the unit roundoffs of the points, `kept` the tokens that went to the reference's
    experts, of the candidate and of each noise run; without it no outliers are looked for.
    """
    bitwise = {point.key: point.bitwise for point in points}
    held = []
    for point in points:
        source = _INPUTS.get(point.point)
        whole = bitwise.get((point.layer, source)) if source else None
        floors = [run[point.key] for run in noise if point.key in run]
        if noise and len(floors) == len(noise):
            level = alpha / (TESTS * len(points))
            found = against(point, floors, units[point.key], level, seed, kept)
        else:
            found = HeldPoint(agreement=point, input_bitwise=None)
        found = _bounded(replace(found, input_bitwise=whole), (bounds or {}).get(point.key))
        if point.spoilt:
            found = replace(found, diverges=True, place=_first_spoilt(point))
        held.append(found)
    return held


def _first_spoilt(point: PointAgreement) -> Place | None:
    """Return the first token that holds NaN or infinity."""
    for prompt, error in point.errors.items():
        if error.isnan().any():
            return Place(prompt=prompt, token=int(error.isnan().nonzero()[0]))
    return None


def _bounded(held: HeldPoint, bound: HeldBound | None) -> HeldPoint:
    """Let the bound decide where there is one."""
    held = replace(held, bound=bound)
    if bound is None:
        return held
    if bound.exceeding:
        return replace(held, diverges=True, place=bound.first)
    if bound.whole:
        return replace(held, diverges=False, place=None)
    return held


def against(
    point: PointAgreement,
    floors: Sequence[PointAgreement],
    unit: float,
    alpha: float,
    seed: int,
    kept: Sequence[Kept] = (),
) -> HeldPoint:
    """Hold a point against the same point of the noise runs."""
    errors: dict[str, torch.Tensor] = {}
    floor: dict[str, torch.Tensor] = {}
    runs: dict[str, torch.Tensor] = {}
    ratios: dict[str, torch.Tensor] = {}
    for prompt, error in point.errors.items():
        if all(prompt in run.errors for run in floors):
            each = torch.stack([run.errors[prompt] for run in floors]).clamp(min=unit)
            runs[prompt] = each
            floor[prompt] = each.log().mean(0).exp()
            errors[prompt] = error.clamp(min=unit)
            # Run by run, so that the ratio of equal errors is exactly 0.
            ratios[prompt] = (errors[prompt] / each).log().mean(0)
    # An infinite error is a divergence, and no number to take a mean of.
    boundless = any(bool(ratio.isposinf().any()) for ratio in ratios.values())
    finite = [ratio.nan_to_num(nan=math.nan, posinf=0.0) for ratio in ratios.values()]
    found = estimate(finite, seed, by_prompt=True)
    low = found.lower_bound(alpha) if found.known else None
    excess = _excess(errors, runs, seed)
    excess_low = excess.lower_bound(alpha) if excess.known else None
    diverges = boundless or any(bound is not None and bound > 0 for bound in (low, excess_low))
    place = _place(errors, floor, ratios) if diverges else None
    alone = _outlier(point, errors, runs, kept, unit, alpha) if kept else None
    squares_of = [run.relative_error**2 for run in floors]
    return HeldPoint(
        agreement=point,
        input_bitwise=None,
        floor=math.sqrt(sum(squares_of) / len(squares_of)),
        log_ratio=found.mean if math.isfinite(found.mean) else None,
        log_ratio_low=low,
        excess=excess.mean if math.isfinite(excess.mean) else None,
        excess_low=excess_low,
        outlier=alone,
        diverges=diverges or alone is not None,
        place=place if alone is None or place is not None else alone.place,
    )


def _outlier(
    point: PointAgreement,
    errors: Mapping[str, torch.Tensor],
    runs: Mapping[str, torch.Tensor],
    kept: Sequence[Kept],
    unit: float,
    alpha: float,
) -> Outlier | None:
    candidate, *noise = kept

    def tokens(of: Kept, prompt: str) -> torch.Tensor:
        return of.tokens(point.layer, point.point, prompt, len(errors[prompt]))

    return outlier(
        errors,
        runs,
        {prompt: tokens(candidate, prompt) for prompt in errors},
        {prompt: torch.stack([tokens(run, prompt) for run in noise]) for prompt in errors},
        unit,
        alpha,
    )


def _excess(
    errors: Mapping[str, torch.Tensor], runs: Mapping[str, torch.Tensor], seed: int
) -> Estimate:
    """Estimate the mean excess over the errors [noise runs, T] of the noise."""
    flat = [*errors.values(), *(each.flatten() for each in runs.values())]
    every = torch.cat(flat) if flat else torch.empty(0)
    every = every[every.isfinite()].double()
    if not every.numel():
        return estimate([])
    high = float(np.quantile(every.numpy(), HIGH_SHARE))

    def above(values: torch.Tensor) -> torch.Tensor:
        return (values / high).log().clamp(min=0.0)  # NaN stays, and is left out

    return estimate(
        [above(error) - above(runs[prompt]).mean(0) for prompt, error in errors.items()],
        seed,
        by_prompt=True,
    )


def _place(
    errors: Mapping[str, torch.Tensor],
    floor: Mapping[str, torch.Tensor],
    ratios: Mapping[str, torch.Tensor],
) -> Place | None:
    """Return the token to look at first."""
    highest = max((float(values.nan_to_num(0.0).max()) for values in floor.values()), default=0.0)
    for prompt, error in errors.items():
        above = error > highest
        if above.any():
            return Place(prompt=prompt, token=int(above.nonzero()[0]))
    best = max(ratios, key=lambda prompt: float(ratios[prompt].nan_to_num(0.0).max()))
    return Place(prompt=best, token=int(ratios[best].nan_to_num(0.0).argmax()))


def first_divergence(
    held: Sequence[HeldPoint],
    routing: Sequence[LayerRouting],
    noise_routing: Sequence[Sequence[LayerRouting]],
    bounds: Bounds | None = None,
) -> Divergence | None:
    """Return the first point, in the order of the computation, that diverges."""
    bounds = bounds or Bounds()
    found = [
        *_of_values(held),
        *_of_routing(routing, noise_routing, bounds),
        *(
            Divergence(layer=layer, point=ROUTER_EXPERTS, place=place, held_against=BOUND)
            for layer, place in bounds.illegal
        ),
    ]
    return min(found, key=lambda d: (d.layer, ORDER.index(d.point)), default=None)


def _of_values(held: Sequence[HeldPoint]) -> list[Divergence]:
    found = []
    for point in held:
        agreement = point.agreement
        place = point.place
        if point.held_against == NOTHING:
            place = agreement.first_difference if not agreement.bitwise else None
        if place is not None:
            found.append(
                Divergence(
                    layer=agreement.layer,
                    point=agreement.point,
                    place=place,
                    held_against=point.held_against,
                )
            )
    return found


def _of_routing(
    routing: Sequence[LayerRouting],
    noise_routing: Sequence[Sequence[LayerRouting]],
    bounds: Bounds,
) -> list[Divergence]:
    noisy = {
        (layer.layer, flip.place) for run in noise_routing for layer in run for flip in layer.flips
    }
    found = []
    for layer in routing:
        flips = [flip for flip in layer.flips if (layer.layer, flip.place) not in bounds.judged]
        suspects: list[Flip] = [flip for flip in flips if flip.legal is False]
        against = SCORE_ERROR
        if not noise_routing:
            suspects, against = flips, NOTHING
        elif layer.score_error is None:
            suspects = [flip for flip in flips if (layer.layer, flip.place) not in noisy]
            against = NOISE_FLOOR
        if suspects:
            found.append(
                Divergence(
                    layer=layer.layer,
                    point=ROUTER_EXPERTS,
                    place=suspects[0].place,
                    held_against=against,
                )
            )
    return found
