"""Rows that are those of the neighbouring tokens: a position was taken one too far or not at all.

Contract:
    rows     at most of the tokens, row t of the candidate lies nearer to row t + 1 (or t - 1) of
             the reference than to row t, and twice as near in the mean
    choices  of the positions at which the reference's first choice is another than at t + 1 (or
             t - 1), the candidate makes that neighbour's at more than half, and its own place's
             less than half as often
"""

from collections.abc import Collection, Iterator, Mapping

import torch

from nvfp4check.activations import ROUTER_POINTS, Run
from nvfp4check.agreement.layers import VALUE_POINTS, Skip, values
from nvfp4check.agreement.problems import Problem


def shifted_rows(
    reference: Run,
    candidate: Run,
    layers: tuple[int, ...],
    prompts: tuple[str, ...],
    skip: Collection[Skip],
) -> Iterator[Problem]:
    """Find points whose rows are those of the neighbouring tokens."""
    for layer in layers:
        if layer not in reference.layers or layer not in candidate.layers:
            continue
        both = set(reference.points(layer)) & set(candidate.points(layer))
        for point in (p for p in VALUE_POINTS if p in both and p not in ROUTER_POINTS):
            for prompt in (p for p in prompts if (layer, point, p) not in skip):
                r, c = values(reference, candidate, layer, prompt, point)
                shift = shift_of(r.double(), c.double())
                if shift:
                    yield Problem(
                        kind="shifted",
                        run="candidate",
                        layer=layer,
                        point=point,
                        prompt=prompt,
                        message=f"{point} of layer {layer}, prompt {prompt!r}: row t lies nearer "
                        f"to row t {'+' if shift > 0 else '-'} 1 of the reference; the candidate's "
                        "rows are shifted by one token",
                    )


def shift_of(reference: torch.Tensor, candidate: torch.Tensor) -> int:
    """Return 1 or -1 where rows of the candidate are those of the next or last token, else 0."""
    if len(reference) < 3:
        return 0
    inside = candidate[1:-1]
    own = (inside - reference[1:-1]).norm(dim=-1)
    for shift, rows in ((1, reference[2:]), (-1, reference[:-2])):
        other = (inside - rows).norm(dim=-1)
        nearer = (other < own).double().mean()
        if float(nearer) > 0.5 and float(other.mean()) * 2 < float(own.mean()):
            return shift
    return 0


def shifted_choices(choices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[Problem]:
    """Find logits whose rows are those of the neighbouring tokens.

    `choices` are the first choices of reference and candidate at each position, by prompt.
    """
    for shift in (1, -1):
        own, other = [], []
        for reference, candidate in choices.values():
            here = slice(0, -1) if shift > 0 else slice(1, None)
            there = slice(1, None) if shift > 0 else slice(0, -1)
            telling = reference[here] != reference[there]
            telling &= ~(reference[here] + reference[there] + candidate[here]).isnan()
            own.append((candidate[here] == reference[here])[telling])
            other.append((candidate[here] == reference[there])[telling])
        if not own:
            continue
        own_share, other_share = (float(torch.cat(of).double().mean()) for of in (own, other))
        if sum(map(len, own)) >= 3 and other_share > 0.5 and other_share > 2 * own_share:
            yield Problem(
                kind="shifted",
                run="candidate",
                message=f"logits: the first choice at position t is that of t "
                f"{'+' if shift > 0 else '-'} 1 of the reference at {other_share:.0%} of the "
                f"positions where these differ, and that of t at {own_share:.0%}; the candidate's "
                "rows are shifted by one token",
            )
