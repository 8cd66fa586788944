"""Router accounting: which experts two runs chose, and whether a different choice is legal.

T tokens, E experts in n_group groups, k of them chosen.

Contract:
    flip       a token and layer at which the two sets of experts differ
    error      the largest |score candidate - score reference| of that token
    margin     the least by which every score must be allowed to move before the candidate's set can
               be the right one, judged by the reference's scores s:
               - an expert left out may not beat one taken from its own or another taken group:
                 half of s(left out) - s(taken), for each must have moved towards the other
               - a group taken from that the reference had closed must have passed one it had open:
                 a quarter of the difference of their scores, for each is a sum of two
               - experts of more groups than are ever open: infinite
    legal      margin <= error. A flip beyond it does not follow from the error of the scores: the
               routing itself differs. What is within may still be wrong, for the margin is a lower
               bound
    weight     what the router gave the experts that were dropped, of all it gave
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.layers import Place, Skip


@dataclass(frozen=True, slots=True)
class Groups:
    """How a model's experts are grouped."""

    n_group: int = 1
    topk_group: int = 1

    @classmethod
    def of(cls, run: Run) -> "Groups":
        """Return the groups that a run's configuration names, else one group of all experts."""
        n_group, topk_group = (run.info.config.get(name) for name in ("n_group", "topk_group"))
        if type(n_group) is int and type(topk_group) is int and 1 <= topk_group <= n_group:
            return cls(n_group, topk_group)
        return cls()


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """One token whose experts differ."""

    layer: int
    place: Place
    #: Experts of the reference that the candidate did not choose, and those it chose instead.
    dropped: tuple[int, ...]
    taken: tuple[int, ...]
    #: How far scores must have moved at least; None where they were not recorded.
    margin: float | None
    score_error: float | None

    @property
    def legal(self) -> bool | None:
        """Whether the error of the scores explains it; None where they were not recorded."""
        if self.margin is None or self.score_error is None:
            return None
        return self.margin <= self.score_error


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRouting:
    """The routing of one layer."""

    layer: int
    tokens: int
    flips: tuple[Flip, ...]
    #: How many tokens each expert got in the reference and in the candidate.
    load_reference: tuple[int, ...]
    load_candidate: tuple[int, ...]
    #: Largest |score candidate - score reference| of the layer; None where not recorded.
    score_error: float | None

    @property
    def exercised(self) -> int:
        """Experts that some token of the reference chose: others were not tested."""
        return sum(count > 0 for count in self.load_reference)


def compare_routing(
    reference: Run,
    candidate: Run,
    prompts: Iterable[str] | None = None,
    skip: Collection[Skip] = (),
) -> Iterator[LayerRouting]:
    """Compare the experts of every layer in which both runs recorded them."""
    chosen = tuple(prompts) if prompts is not None else reference.prompts
    for layer in sorted(set(reference.own_layers) & set(candidate.own_layers)):
        recorded = set(reference.points(layer)) & set(candidate.points(layer))
        here = tuple(p for p in chosen if (layer, "router_experts", p) not in skip)
        if "router_experts" in recorded and here:
            scored = "router_scores" in recorded
            scored &= not any((layer, "router_scores", p) in skip for p in here)
            yield _compare_layer(reference, candidate, layer, here, scored=scored)


def _compare_layer(
    reference: Run, candidate: Run, layer: int, prompts: tuple[str, ...], *, scored: bool
) -> LayerRouting:
    groups = Groups.of(reference)
    flips: list[Flip] = []
    tokens = 0
    error: float | None = None
    chosen: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    width = 0
    for prompt in prompts:
        experts = [run.point(layer, prompt, "router_experts") for run in (reference, candidate)]
        scores = None
        if scored:
            pair = [run.point(layer, prompt, "router_scores") for run in (reference, candidate)]
            scores = (pair[0].double(), pair[1].double())
            width = max(width, scores[0].shape[-1])
            largest = float((scores[1] - scores[0]).abs().max()) if scores[0].numel() else 0.0
            error = largest if error is None else max(error, largest)
        tokens += experts[0].shape[0]
        for side, table in zip(chosen, experts, strict=True):
            side.append(table.flatten().long())
        flips += _flips(layer, prompt, experts[0], experts[1], scores, groups)
    flat = [torch.cat(side) if side else torch.empty(0, dtype=torch.int64) for side in chosen]
    width = max(width, *(int(side.max()) + 1 if side.numel() else 0 for side in flat))
    loads = [tuple(side.bincount(minlength=width).tolist()) for side in flat]
    return LayerRouting(
        layer=layer,
        tokens=tokens,
        flips=tuple(flips),
        load_reference=loads[0],
        load_candidate=loads[1],
        score_error=error,
    )


def _flips(
    layer: int,
    prompt: str,
    reference: torch.Tensor,
    candidate: torch.Tensor,
    scores: tuple[torch.Tensor, torch.Tensor] | None,
    groups: Groups,
) -> Iterator[Flip]:
    sorted_sets = (reference.sort(-1).values, candidate.sort(-1).values)
    if sorted_sets[0].shape != sorted_sets[1].shape:
        differing = torch.arange(reference.shape[0])
    else:
        differing = (sorted_sets[0] != sorted_sets[1]).any(-1).nonzero().squeeze(-1)
    for token in differing.tolist():
        before, after = set(reference[token].tolist()), set(candidate[token].tolist())
        dropped, taken = tuple(sorted(before - after)), tuple(sorted(after - before))
        margin = error = None
        if scores is not None:
            row = scores[0][token]
            margin = required_movement(row, after, groups)
            error = float((scores[1][token] - row).abs().max())
        yield Flip(
            layer=layer,
            place=Place(prompt=prompt, token=token),
            dropped=dropped,
            taken=taken,
            margin=margin,
            score_error=error,
        )


def required_movement(scores: torch.Tensor, chosen: set[int], groups: Groups) -> float:
    """Return how far the scores [E] of a token must move at least for `chosen` to be its experts.

    0 for the choice that the scores themselves make.
    """
    width, count = len(scores), groups.n_group
    size = width // count if width % count == 0 and width >= 2 * count else width
    of_expert = torch.arange(width) // size
    grouped = scores.view(-1, size)
    needed = sorted({int(of_expert[expert]) for expert in chosen})
    movement = 0.0
    if len(grouped) > 1:
        if len(needed) > groups.topk_group:
            return float("inf")
        values = grouped.topk(2, dim=-1).values.sum(-1)
        rank = values.sort(descending=True, stable=True).indices.tolist()
        opened = rank[: groups.topk_group]
        closed = [group for group in needed if group not in opened]
        # The least costly exchange: the weakest open groups make room.
        room = [group for group in reversed(opened) if group not in needed]
        for group, leaving in zip(
            sorted(closed, key=lambda g: -float(values[g])), room, strict=False
        ):
            movement = max(movement, float(values[leaving] - values[group]) / 4)
    member = torch.zeros(width, dtype=torch.bool)
    member[sorted(chosen)] = True
    rivals = ~member & torch.isin(of_expert, torch.tensor(needed))
    if chosen and rivals.any():
        movement = max(movement, float(scores[rivals].max() - scores[member].min()) / 2)
    return movement
