"""Router accounting: which experts two runs chose, and whether a different choice is legal.

T tokens, E experts, k chosen of them.

Contract:
    flip       a token and layer at which the two sets of experts differ
    margin     by how much the reference preferred what the candidate dropped over what it took:
               the least of its scores among the dropped less the greatest among the taken. Groups
               that the reference ruled out can make it negative or large: then the choice of the
               group flipped
    error      the largest |score candidate - score reference| of that token
    legal      margin <= 2 * error: each of the two scores may have moved by `error`, towards each
               other. Such a flip follows from the error of the scores; another one does not, and
               the routing itself differs
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.layers import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """One token whose experts differ."""

    layer: int
    place: Place
    #: Experts of the reference that the candidate did not choose, and those it chose instead.
    dropped: tuple[int, ...]
    taken: tuple[int, ...]
    #: None where the scores were not recorded.
    margin: float | None
    score_error: float | None

    @property
    def legal(self) -> bool | None:
        """Whether the error of the scores explains it; None where they were not recorded."""
        if self.margin is None or self.score_error is None:
            return None
        return self.margin <= 2 * self.score_error


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
    reference: Run, candidate: Run, prompts: Iterable[str] | None = None
) -> Iterator[LayerRouting]:
    """Compare the experts of every layer in which both runs recorded them."""
    chosen = tuple(prompts) if prompts is not None else reference.prompts
    for layer in sorted(set(reference.layers) & set(candidate.layers)):
        recorded = set(reference.points(layer)) & set(candidate.points(layer))
        if "router_experts" in recorded:
            yield _compare_layer(
                reference, candidate, layer, chosen, scored="router_scores" in recorded
            )


def _compare_layer(
    reference: Run, candidate: Run, layer: int, prompts: tuple[str, ...], *, scored: bool
) -> LayerRouting:
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
        flips += _flips(layer, prompt, experts[0], experts[1], scores)
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
        if scores is not None and dropped and taken:
            row = scores[0][token]
            margin = float(row[list(dropped)].min() - row[list(taken)].max())
            error = float((scores[1][token] - row).abs().max())
        yield Flip(
            layer=layer,
            place=Place(prompt=prompt, token=token),
            dropped=dropped,
            taken=taken,
            margin=margin,
            score_error=error,
        )
