"""Each law of rotation, routing and attention sees the fault that it is there for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nvfp4check.faults.variants import correct_variants
from nvfp4check.tolerance import Facts, Ties
from nvfp4ref.deepseek_v3 import attention, rotary, routing

Tensor = torch.Tensor
Failing = Callable[..., set[str]]


def test_halves_for_pairs_are_seen(failing: Failing) -> None:
    def kernel(x: Tensor, positions: Tensor, config: Any) -> Tensor:
        pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        turned = rotary.rope(pairs, positions, config)
        return turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    assert "one-live-element" in failing("rope", kernel)


def test_a_position_off_by_one_is_seen(failing: Failing) -> None:
    def kernel(x: Tensor, positions: Tensor, config: Any) -> Tensor:
        return rotary.rope(x, positions + 1, config)

    assert "position-zero-is-the-identity" in failing("rope", kernel)


def test_frequencies_that_are_not_stretched_are_seen(failing: Failing) -> None:
    def kernel(x: Tensor, positions: Tensor, config: Any) -> Tensor:
        return rotary.rope(x, positions, {**config, "rope_scaling": None})

    assert "every-kind-of-position" in failing("rope", kernel)


def _route(change: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def kernel(
        logits: Tensor, bias: Tensor, groups: int, kept: int, top_k: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        experts = routing.choose(change(logits, bias), groups, kept, top_k)
        return experts, routing.weigh(logits, experts, scaling)

    return kernel


def test_a_bias_in_bfloat16_is_seen(failing: Failing) -> None:
    kernel = _route(lambda logits, bias: logits.sigmoid() + bias.bfloat16().float())

    assert "biases-choose-and-do-not-weigh" in failing("route", kernel)


def test_softmax_scores_are_seen(failing: Failing) -> None:
    kernel = _route(lambda logits, bias: logits.softmax(-1) + bias)

    assert "biases-choose-and-do-not-weigh" in failing("route", kernel)


def test_groups_masked_with_zero_are_seen(failing: Failing) -> None:
    def kernel(
        logits: Tensor, bias: Tensor, groups: int, kept: int, top_k: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        scores = routing.choice_scores(logits, bias)
        grouped = scores.view(len(scores), groups, scores.shape[1] // groups)
        best = grouped.topk(2, dim=-1).values.sum(-1)
        order = best.sort(-1, descending=True, stable=True).indices[:, :kept]
        open_groups = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, order, True)
        masked = torch.where(open_groups.unsqueeze(-1), grouped, 0.0).flatten(1)
        experts = routing.choose(masked, 1, 1, top_k)
        return experts, routing.weigh(logits, experts, scaling)

    assert "biases-choose-and-do-not-weigh" in failing("route", kernel)


def test_weights_with_the_bias_are_seen(failing: Failing) -> None:
    def kernel(
        logits: Tensor, bias: Tensor, groups: int, kept: int, top_k: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        scores = routing.choice_scores(logits, bias)
        experts = routing.choose(scores, groups, kept, top_k)
        weights = scores.gather(-1, experts.long())
        return experts, weights / (weights.sum(-1, keepdim=True) + 1e-20) * scaling

    assert "biases-choose-and-do-not-weigh" in failing("route", kernel)


def to_the_higher_index(
    logits: Tensor, bias: Tensor, groups: int, kept: int, top_k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    mirrored = routing.route(logits.flip(-1), bias.flip(-1), groups, kept, top_k, scaling)
    return logits.shape[1] - 1 - mirrored[0], mirrored[1]


def test_ties_may_go_to_the_higher_index_unless_the_lower_is_declared(failing: Failing) -> None:
    declared = Facts(ties=Ties.LOWER_INDEX)

    assert failing("route", to_the_higher_index) == set()
    assert failing("route", to_the_higher_index, facts=declared) == {"tie-breaking"}


def test_a_choice_that_no_order_of_ties_gives_is_seen(failing: Failing) -> None:
    """The worst expert taken instead of the best: illegal among equals of another level."""

    def kernel(
        logits: Tensor, bias: Tensor, groups: int, kept: int, top_k: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        experts, _ = routing.route(logits, bias, groups, kept, top_k, scaling)
        scores = logits.sigmoid() + bias
        free = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, experts.long(), False)
        worst = torch.where(free, scores, torch.inf).argmin(-1)
        experts = torch.cat([experts[:, :-1], worst.unsqueeze(-1).int()], dim=-1)
        return experts, routing.weigh(logits, experts, scaling)

    assert "tie-breaking" in failing("route", kernel)


def test_experts_of_a_group_that_is_not_open_are_seen(failing: Failing) -> None:
    """One group fewer is open: of levels, some token has its best experts in the one left out."""

    def kernel(
        logits: Tensor, bias: Tensor, groups: int, kept: int, top_k: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        return routing.route(logits, bias, groups, max(kept - 1, 1), top_k, scaling)

    assert "biases-choose-and-do-not-weigh" in failing("route", kernel)


def test_sums_split_by_the_batch_break_only_what_is_declared(failing: Failing) -> None:
    (variant,) = (one for one in correct_variants("mla_decode") if "batch" in one.name)
    rows = "rows-are-independent"

    assert failing("mla_decode", variant.kernel) == set()
    assert failing("mla_decode", variant.kernel, only=rows, facts=Facts(batch_invariant=True)) == {
        rows
    }


@pytest.mark.parametrize("factor", [1.01, 192**-0.5 / 0.1352337788608801], ids=["1 %", "no m"])
def test_another_softmax_scale_is_seen(failing: Failing, factor: float) -> None:
    def kernel(*arguments: Any) -> Tensor:
        return attention.mla_decode(*arguments[:-1], arguments[-1] * factor)

    assert "every-length" in failing("mla_decode", kernel)


def test_a_token_too_many_is_seen(failing: Failing) -> None:
    def kernel(*arguments: Any) -> Tensor:
        latent, table, lengths = arguments[2], arguments[4], arguments[5]
        longer = (lengths + 1).clamp(max=table.shape[1] * latent.shape[1])
        return attention.mla_decode(*arguments[:5], longer, arguments[6])

    assert "one-token-is-returned" in failing("mla_decode", kernel)


def test_a_score_without_the_rotary_part_is_seen(failing: Failing) -> None:
    def kernel(q: Tensor, rope: Tensor, *rest: Any) -> Tensor:
        return attention.mla_decode(q, torch.zeros_like(rope), *rest)

    assert "every-length" in failing("mla_decode", kernel)
