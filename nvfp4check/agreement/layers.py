"""Where two runs part: the error at every recorded point, and which block adds it.

T tokens, D width. r is the reference's value at a point, c the candidate's, both as float64.

Contract:
    relative error   ||c - r|| / ||r|| over all tokens of all prompts (Frobenius)
    sqnr_db          -20 log10 of it; infinite where the values are equal
    worst token      the one with the largest ||c_t - r_t|| / ||r_t||
    share            of the error of `hidden` after a layer, how much came in with the layer's
                     input, how much its attention and how much its MLP added. The residual stream
                     is a sum, h' = h + attention + mlp, so the error is one too, and its
                     projection on itself splits without a rest:
                     <dh, dh'> + <d attention, dh'> + <d mlp, dh'> = <dh', dh'>
                     A share can be negative: that block's error cancels some of what came in.
                     It holds to the rounding in which the run kept its residual stream. Where a
                     run was given the states its layers begin with, no error comes in
    bitwise          equal bytes at every token
    router_weights   compared expert by expert, 0 for the experts that were not chosen, for the
                     order of a token's experts carries no meaning
    NaN, inf         counted on each side; such a token is left out of the sums
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from nvfp4check.activations import HIDDEN, Run

#: Points whose values are compared as numbers, in the order of the computation; the router's
#: choice between router_scores and router_weights is compared by `routing`.
VALUE_POINTS = (
    "attn_input",
    "attn_output",
    "mlp_input",
    "router_scores",
    "router_weights",
    "mlp_output",
    HIDDEN,
)

#: Layer, point and prompt of something that cannot be compared.
Skip = tuple[int, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A token of a prompt."""

    prompt: str
    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PointAgreement:
    """How far two runs lie apart at one point of one layer."""

    layer: int
    point: str
    relative_error: float
    sqnr_db: float
    bitwise: bool
    tokens: int
    #: The token with the largest relative error, and that error.
    worst: Place | None
    worst_error: float
    #: First token, in the order of prompts, at which a byte differs.
    first_difference: Place | None
    nonfinite_reference: int
    nonfinite_candidate: int
    #: Share of the error of this layer's `hidden` that this block added; for `hidden`, the share
    #: that came in with the layer's input. None where the points for it were not recorded.
    share: float | None = None
    #: Relative error of each token by prompt; NaN where a side is not finite.
    errors: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def key(self) -> tuple[int, str]:
        """Layer and point."""
        return self.layer, self.point

    @property
    def spoilt(self) -> bool:
        """Whether the candidate holds NaN or infinity where the reference does not."""
        return self.nonfinite_candidate > self.nonfinite_reference


@dataclass(slots=True)
class Sums:
    """Running sums at one point."""

    difference: float = 0.0
    reference: float = 0.0
    tokens: int = 0
    bitwise: bool = True
    worst: Place | None = None
    worst_error: float = 0.0
    first_difference: Place | None = None
    nonfinite_reference: int = 0
    nonfinite_candidate: int = 0
    errors: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, prompt: str, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        """Add the tokens of one prompt, [T, D]."""
        differing = _differing_tokens(reference, candidate)
        if differing.any():
            self.bitwise = False
            if self.first_difference is None:
                first = int(differing.nonzero()[0])
                self.first_difference = Place(prompt=prompt, token=first)
        r, c = reference.double(), candidate.double()
        self.nonfinite_reference += int((~r.isfinite()).sum())
        self.nonfinite_candidate += int((~c.isfinite()).sum())
        usable = r.isfinite().all(-1) & c.isfinite().all(-1)
        squares = (c - r)[usable].square().sum(-1)
        norms = r[usable].square().sum(-1)
        self.difference += float(squares.sum())
        self.reference += float(norms.sum())
        self.tokens += int(usable.sum())
        errors = _ratio(squares.sqrt(), norms.sqrt())
        by_token = torch.full((len(usable),), torch.nan, dtype=torch.float64)
        by_token[usable] = errors
        self.errors[prompt] = by_token
        if errors.numel() and float(errors.max()) > self.worst_error:
            place = int(errors.argmax())
            self.worst_error = float(errors.max())
            self.worst = Place(prompt=prompt, token=int(usable.nonzero()[place]))

    def finish(self, layer: int, point: str, share: float | None) -> PointAgreement:
        """Return what the sums amount to."""
        error = _quotient(math.sqrt(self.difference), math.sqrt(self.reference))
        decibels = math.inf
        if error:
            decibels = -20 * math.log10(error) if math.isfinite(error) else -math.inf
        return PointAgreement(
            layer=layer,
            point=point,
            relative_error=error,
            sqnr_db=decibels,
            bitwise=self.bitwise,
            tokens=self.tokens,
            worst=self.worst,
            worst_error=self.worst_error,
            first_difference=self.first_difference,
            nonfinite_reference=self.nonfinite_reference,
            nonfinite_candidate=self.nonfinite_candidate,
            share=share,
            errors=self.errors,
        )


def compare_layers(
    reference: Run,
    candidate: Run,
    prompts: Iterable[str] | None = None,
    skip: Collection[Skip] = (),
) -> Iterator[PointAgreement]:
    """Compare every point of the model's own layers that both recorded, in order.

    What `skip` lists is left out.
    """
    chosen = tuple(prompts) if prompts is not None else reference.prompts
    before: dict[str, torch.Tensor] = {}
    for layer in sorted(set(reference.own_layers) & set(candidate.own_layers)):
        recorded = set(reference.points(layer)) & set(candidate.points(layer))
        points = [point for point in VALUE_POINTS if point in recorded]
        whole = [p for p in points if not any((layer, p, prompt) in skip for prompt in chosen)]
        given = any(run.info.inputs for run in (reference, candidate))
        shares, before = _shares(
            reference, candidate, layer, whole, chosen, {} if given else before
        )
        for point in points:
            sums = Sums()
            for prompt in chosen:
                if (layer, point, prompt) not in skip:
                    r, c = values(reference, candidate, layer, prompt, point)
                    sums.add(prompt, r, c)
            yield sums.finish(layer, point, shares.get(point))


def values(
    reference: Run, candidate: Run, layer: int, prompt: str, point: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what both runs recorded at a point, so that rows can be compared."""
    r, c = (run.point(layer, prompt, point) for run in (reference, candidate))
    if point != "router_weights":
        return r, c
    if any("router_experts" not in run.points(layer) for run in (reference, candidate)):
        return r, c
    experts = [run.point(layer, prompt, "router_experts").long() for run in (reference, candidate)]
    width = 1 + max((int(e.max()) for e in experts if e.numel()), default=0)
    dense = [
        torch.zeros(len(w), width, dtype=w.dtype).scatter_(1, e, w)
        for w, e in zip((r, c), experts, strict=True)
    ]
    return dense[0], dense[1]


def _shares(
    reference: Run,
    candidate: Run,
    layer: int,
    points: list[str],
    prompts: tuple[str, ...],
    before: dict[str, torch.Tensor],
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return the share of each block, and the error of `hidden` for the next layer."""
    if HIDDEN not in points:
        return {}, {}
    after = {prompt: _error(reference, candidate, layer, prompt, HIDDEN) for prompt in prompts}
    total = sum(float(error.square().sum()) for error in after.values())
    shares: dict[str, float] = {}
    if total > 0:
        if before:
            inherited = sum(float((before[p] * after[p]).sum()) for p in prompts)
            shares[HIDDEN] = inherited / total
        for point in ("attn_output", "mlp_output"):
            if point in points:
                added = sum(
                    float((_error(reference, candidate, layer, p, point) * after[p]).sum())
                    for p in prompts
                )
                shares[point] = added / total
    return shares, after


def _error(reference: Run, candidate: Run, layer: int, prompt: str, point: str) -> torch.Tensor:
    r = reference.point(layer, prompt, point).double()
    difference = candidate.point(layer, prompt, point).double() - r
    return torch.where(difference.isfinite(), difference, 0.0)


def _differing_tokens(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Return which tokens differ in a byte, bool [T]; other dtypes compare by value."""
    if reference.dtype != candidate.dtype:
        return (reference.double() != candidate.double()).any(-1)
    same_bytes = reference.contiguous().view(torch.uint8) == candidate.contiguous().view(
        torch.uint8
    )
    return ~same_bytes.flatten(1).all(-1)


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Divide; zero by zero is zero, for equal values of zero do not differ."""
    return torch.where(numerator == 0, 0.0, numerator / denominator)


def _quotient(numerator: float, denominator: float) -> float:
    if numerator == 0:
        return 0.0
    return numerator / denominator if denominator else math.inf
