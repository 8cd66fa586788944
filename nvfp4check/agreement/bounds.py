"""A candidate held against derived bounds, where the inputs of a layer are golden.

T tokens. The bounds of a run are those of `nvfp4check.forward.bounds`: how far a correct candidate
of a declared dtype may lie from each token, if the layer was given the reference's states.

Contract:
    golden      layer 0: the tokens are the same. A later layer: both runs were given the same
                states (their digests are equal: `forward --inputs`, `capture(inputs=...)`); else
                the tokens of a prompt up to the first whose recorded `hidden` of the layer before
                differs from the reference's, rounded to the candidate's dtype: attention is causal
    arithmetic  of the dtype and the ranks that the candidate's run.json says (`declared`)
    applies     not to a candidate of another checkpoint, mode or cache, nor to one with noise:
                what it should compute is something else
    held        ||c_t - r_t|| <= bound_t at every golden token; one that exceeds it is a divergence.
                An infinite bound holds nothing: its token counts as not compared
    prediction  a layer of it begins with the state after the layer before, as every later layer
    experts     where the candidate chose others than the reference: a divergence if the reach of
                the scores leaves no other choice; else legal, and the token has no bound at
                router_weights, mlp_output and hidden. So has a token whose choice may change and
                was not recorded
    cache       a candidate that keeps values where the reference's cache is FP8 may lie within
                every bound; by its direction the error tells (`uncached`), and that is a fault
    not covered engines that quantise queries or attention weights, as FP8 kernels of FlashMLA,
                FlashAttention and TensorRT-LLM do: their scales are in no checkpoint, so there is
                nothing to derive from. A noise floor, or logits, judge these
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from nvfp4check.activations import HIDDEN, MTP_ENDS, SETTLED, Run
from nvfp4check.agreement.declared import declared, described
from nvfp4check.agreement.integrity import Problem
from nvfp4check.agreement.layers import Place, PointAgreement, values
from nvfp4check.agreement.uncached import POINT, CacheShare, Group, cache_share, groups_of
from nvfp4check.forward.bounds.arithmetic import risk
from nvfp4check.layer_inputs import LayerInputs
from nvfp4ref.rounding import UNIT_ROUNDOFF, round_to

#: Points that follow the choice of experts.
AFTER_ROUTER = ("router_weights", "mlp_output", HIDDEN, *MTP_ENDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBound:
    """What came of holding a point against its bound."""

    #: Tokens with golden inputs and a bound.
    tokens: int
    #: Tokens with golden inputs that have none, as another choice of experts is legal.
    free: int
    #: Whether every token that was compared is one of these.
    whole: bool
    #: The bound as a relative error over the held tokens.
    relative: float
    #: The largest error over its bound, and where.
    ratio: float
    worst: Place | None
    #: Tokens beyond their bound.
    exceeding: int
    #: The first of them, in the order of prompts.
    first: Place | None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Everything that was held against bounds."""

    #: The declared arithmetic, a dtype or `bfloat16/tp8`; None where bounds do not apply.
    dtype: str | None = None
    points: Mapping[tuple[int, str], HeldBound] = field(default_factory=dict)
    #: Tokens that chose other experts though no other choice is legal.
    illegal: tuple[tuple[int, Place], ...] = ()
    #: Layers and tokens whose choice of experts was judged by the bounds.
    judged: frozenset[tuple[int, Place]] = frozenset()
    problems: tuple[Problem, ...] = ()
    #: Whether the candidate's cache holds FP8 codes; None where the reference's does not.
    cache: CacheShare | None = None

    @property
    def risk(self) -> float:
        """Probability that a correct candidate exceeds any of these bounds, at most."""
        return min(1.0, risk() * sum(held.tokens for held in self.points.values()))


def hold_bounds(
    reference: Run,
    candidate: Run,
    prompts: Sequence[str],
    points: Sequence[PointAgreement],
    asked: str | None = None,
) -> Bounds:
    """Hold a candidate against the bounds of the reference, as far as they apply.

    Raises:
        CheckError: The reference has no bounds for the arithmetic that is `asked` for.
    """
    dtype = declared(reference.info, candidate.info, asked)
    if not reference.info.bounds:
        return Bounds()
    why = _not_applicable(reference, candidate)
    if dtype is None:
        there = ", ".join(reference.info.bounds)
        why = why or f"{described(candidate.info)}, and the bounds are for {there}"
    if why is not None or dtype is None:
        message = f"not held against the reference's bounds: {why}"
        note = Problem(kind="bounds", run="candidate", message=message, fatal=False)
        return Bounds(problems=(note,))
    if points and not any(reference.bounded(layer) for layer in reference.own_layers):
        message = f"its run.json declares bounds for {', '.join(reference.info.bounds)}, and it "
        lost = Problem(kind="missing", run="reference", message=f"{message}holds none", fatal=False)
        return Bounds(problems=(lost,))
    return _Holding(reference, candidate, dtype, prompts).all(points)


def _not_applicable(reference: Run, candidate: Run) -> str | None:
    """Say why a candidate computes something else than the reference; None if it does not."""
    ours, theirs = reference.info, candidate.info
    made, meant = (info.checkpoint.get("fingerprint") for info in (theirs, ours))
    if made is not None and meant is not None and made != meant:
        return "it is of another checkpoint"
    if theirs.perturb is not None:
        return "it has noise on its states"
    if theirs.mode not in (None, "captured", ours.mode):
        return f"its mode is {theirs.mode}, the reference's {ours.mode}"
    if theirs.kv_cache not in (None, ours.kv_cache):
        return f"its cache is {theirs.kv_cache}, the reference's {ours.kv_cache}"
    return None


class _Holding:
    """One candidate being held."""

    def __init__(self, reference: Run, candidate: Run, dtype: str, prompts: Sequence[str]) -> None:
        self._reference = reference
        self._candidate = candidate
        self._dtype = dtype
        self._prompts = prompts
        self._sources = [_Source(run) for run in (reference, candidate)]
        self._illegal: list[tuple[int, Place]] = []
        self._judged: set[tuple[int, Place]] = set()

    def all(self, points: Sequence[PointAgreement]) -> Bounds:
        """Hold every point."""
        found: dict[tuple[int, str], HeldBound] = {}
        groups: list[Group] = []
        for layer in dict.fromkeys(point.layer for point in points):
            names = self._reference.bounded(layer)
            if not names:
                continue
            golden = {prompt: self._golden(layer, prompt) for prompt in self._prompts}
            bound_here = {
                prompt: self._settled(layer, prompt, golden[prompt], names)
                for prompt in self._prompts
            }
            groups += groups_of(self._reference, self._candidate, layer, golden, self._dtype)
            for point in points:
                if point.layer == layer:
                    held = self._hold(point, golden, bound_here, names)
                    if held is not None:
                        found[point.key] = held
        cache = cache_share(groups)
        return Bounds(
            dtype=self._dtype,
            points=found,
            illegal=tuple(self._illegal),
            judged=frozenset(self._judged),
            cache=cache,
            problems=tuple(_of_cache(cache)),
        )

    def _golden(self, layer: int, prompt: str) -> int:
        """Return how many tokens of a prompt, from its first, have golden inputs at a layer."""
        tokens = self._reference.rows(layer, prompt)
        if layer == 0 or not tokens:
            return tokens
        ours, theirs = (source.of(prompt) for source in self._sources)
        if ours is not None and ours == theirs:
            return tokens
        runs = (self._reference, self._candidate)
        if any(run.info.inputs for run in runs):
            return 0
        if any(HIDDEN not in _points(run, layer - 1) for run in runs):
            return 0
        r, c = (run.point(layer - 1, prompt, HIDDEN) for run in runs)
        if r.shape != c.shape or c.dtype not in UNIT_ROUNDOFF:
            return 0
        same = (round_to(r.double(), c.dtype) == c).all(-1)
        return min(tokens, int(same.long().cumprod(0).sum()))

    def _settled(self, layer: int, prompt: str, golden: int, names: frozenset[str]) -> torch.Tensor:
        """Return which tokens have a bound after the router, and note what was chosen."""
        name = f"{prompt}/{SETTLED}/{self._dtype}"
        every = torch.ones(self._reference.rows(layer, prompt), dtype=torch.bool)
        if name not in names:
            return every
        settled = self._reference.bound(layer, prompt, SETTLED, self._dtype).bool()
        runs = (self._reference, self._candidate)
        if any("router_experts" not in _points(run, layer) for run in runs):
            return settled
        r, c = (run.point(layer, prompt, "router_experts").sort(-1).values for run in runs)
        same = (r == c).all(-1) if r.shape == c.shape else ~every
        places = [Place(prompt=prompt, token=token) for token in range(golden)]
        self._judged.update((layer, place) for place in places)
        self._illegal += [(layer, p) for p in places if settled[p.token] and not same[p.token]]
        return same

    def _hold(
        self,
        point: PointAgreement,
        golden: Mapping[str, int],
        bound_here: Mapping[str, torch.Tensor],
        names: frozenset[str],
    ) -> HeldBound | None:
        tokens = free = exceeding = 0
        squares = norms = ratio = 0.0
        worst = first = None
        for prompt in point.errors:
            count = golden[prompt]
            if f"{prompt}/{point.point}/{self._dtype}" not in names or not count:
                continue
            bound = self._reference.bound(point.layer, prompt, point.point, self._dtype)[:count]
            pair = values(self._reference, self._candidate, point.layer, prompt, point.point)
            r, c = (side[:count].double() for side in pair)
            usable = r.isfinite().all(-1) & c.isfinite().all(-1) & bound.isfinite()
            if point.point in AFTER_ROUTER:
                usable &= bound_here[prompt][:count]
                free += int((~bound_here[prompt][:count]).sum())
            error = (c - r).norm(dim=-1)
            over = torch.where(error > 0, error / bound, 0.0)
            over = torch.where(usable, over, 0.0)
            tokens += int(usable.sum())
            squares += float(bound[usable].square().sum())
            norms += float(r[usable].square().sum())
            beyond = over > 1
            exceeding += int(beyond.sum())
            if beyond.any() and first is None:
                first = Place(prompt=prompt, token=int(beyond.nonzero()[0]))
            if over.numel() and float(over.max()) > ratio:
                ratio = float(over.max())
                worst = Place(prompt=prompt, token=int(over.argmax()))
        if not tokens and not free:
            return None
        compared = sum(len(error) for error in point.errors.values())
        return HeldBound(
            tokens=tokens,
            free=free,
            whole=tokens + free == compared,
            relative=(squares / norms) ** 0.5 if norms else 0.0,
            ratio=ratio,
            worst=worst,
            exceeding=exceeding,
            first=first,
        )


class _Source:
    """Says by a digest what states the layers of a run began with."""

    def __init__(self, run: Run) -> None:
        self._given = run.info.inputs
        self._own = LayerInputs(run)

    def of(self, prompt: str) -> str | None:
        """Return the digest for a prompt; None where it is not known."""
        known = self._given if self._given else self._own.digests
        return known.get(prompt)


def _of_cache(cache: CacheShare | None) -> Iterator[Problem]:
    if cache is not None and cache.kept_values:
        yield Problem(kind="cache", run="candidate", point=POINT, message=cache.message())


def _points(run: Run, layer: int) -> tuple[str, ...]:
    return run.points(layer) if layer in run.layers else ()
