"""The router against a plain count in Python, on ties and on the edges of groups."""

import itertools

import pytest
import torch

from nvfp4ref.deepseek_v3.routing import choose, route


def by_hand(scores: list[float], n_group: int, topk_group: int, top_k: int) -> set[int]:
    """Choose experts with sorted lists alone."""
    size = len(scores) // n_group
    open_experts = list(range(len(scores)))
    if n_group > 1:
        groups = [scores[g * size : (g + 1) * size] for g in range(n_group)]
        strength = [sum(sorted(group)[-2:]) for group in groups]
        best = sorted(range(n_group), key=lambda g: (-strength[g], g))[:topk_group]
        open_experts = [e for e in open_experts if e // size in best]
    return set(sorted(open_experts, key=lambda e: (-scores[e], e))[:top_k])


@pytest.mark.parametrize("bias_mean", [0.0, -0.75, -3.0, 1.0])
@pytest.mark.parametrize(
    ("experts", "n_group", "topk_group", "top_k"),
    [(12, 4, 2, 3), (12, 4, 1, 3), (12, 4, 4, 12), (12, 1, 1, 5), (10, 5, 3, 6), (256, 8, 4, 8)],
)
def test_the_choice_is_that_of_sorted_lists(
    experts: int, n_group: int, topk_group: int, top_k: int, bias_mean: float
) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(50, experts, generator=generator)
    bias = bias_mean + 0.2 * torch.randn(experts, generator=generator)

    chosen, _ = route(logits, bias, n_group, topk_group, top_k, 2.5)

    scores = (logits.sigmoid() + bias).tolist()
    for row, expected in zip(chosen.tolist(), scores, strict=True):
        assert set(row) == by_hand(expected, n_group, topk_group, top_k)


def test_every_order_of_few_scores_is_chosen_right() -> None:
    levels = [-2.0, -1.0, -0.5, 0.25, 0.5, 1.0]
    scores = torch.tensor(list(itertools.permutations(levels)))

    chosen = choose(scores, n_group=3, topk_group=2, top_k=3)

    for row, expected in zip(chosen.tolist(), scores.tolist(), strict=True):
        assert set(row) == by_hand(expected, 3, 2, 3)


def test_ties_go_to_the_lower_index_of_groups_and_of_experts() -> None:
    chosen = choose(torch.zeros(1, 12), n_group=4, topk_group=2, top_k=4)

    assert chosen.tolist() == [[0, 1, 2, 3]]


def test_a_masked_expert_is_not_chosen_though_all_scores_are_negative() -> None:
    scores = torch.tensor([[-1.0, -1.1, -1.2, -9.0, -9.0, -9.0]])

    # A mask of 0.0 would put the second group above the first.
    assert set(choose(scores, n_group=2, topk_group=1, top_k=2).tolist()[0]) == {0, 1}


def test_a_group_counts_the_sum_of_its_two_best_and_not_its_best() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.0, 0.6, 0.6, 0.0]])

    assert set(choose(scores, n_group=2, topk_group=1, top_k=2).tolist()[0]) == {3, 4}


def test_weights_leave_the_bias_out_and_sum_to_the_scaling() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(20, 12, generator=generator)
    bias = torch.linspace(-2, 2, 12)

    experts, weights = route(logits, bias, 4, 2, 3, 2.5)

    unbiased = logits.sigmoid().double().gather(1, experts.long())
    expected = unbiased / (unbiased.sum(dim=1, keepdim=True) + 1e-20) * 2.5
    # sum of 3, division, scaling: five roundings of float32 at most
    assert ((weights - expected).abs() <= 5 * 2**-24 * expected).all()


def test_scores_that_vanish_give_weights_of_zero_and_not_nan() -> None:
    _, weights = route(torch.full((1, 4), -200.0), torch.zeros(4), 1, 1, 2, 2.5)

    assert weights.tolist() == [[0.0, 0.0]]


def test_float64_logits_are_routed_in_float64() -> None:
    logits = torch.tensor([[0.5, 0.5 + 1e-12, 0.0, 0.0]], dtype=torch.float64)

    experts, weights = route(logits, torch.zeros(4), 1, 1, 1, 1.0)

    assert experts.item() == 1
    assert weights.dtype == torch.float64


@pytest.mark.parametrize(
    ("n_group", "topk_group", "top_k"), [(5, 1, 1), (4, 5, 1), (4, 0, 1), (4, 1, 4), (12, 2, 2)]
)
def test_groups_that_do_not_work_out_are_refused(n_group: int, topk_group: int, top_k: int) -> None:
    with pytest.raises(ValueError, match="group"):
        choose(torch.zeros(1, 12), n_group, topk_group, top_k)
