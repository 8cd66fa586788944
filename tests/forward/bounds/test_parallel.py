"""Roundings of shares and of their sums, against shares that were rounded and added up."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nvfp4check.findings import CheckError
from nvfp4check.forward.bounds.arithmetic import DEVIATIONS, FRESH_RANDOM, Declared, Roundings
from nvfp4check.forward.bounds.parallel import (
    ExpertShares,
    additions,
    of_linear,
    shares,
)
from nvfp4check.forward.bounds.recording import parse_bounds
from nvfp4check.forward.options import ForwardOptions
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt

EXACT = Declared.of_reference(torch.float64)
TOKENS = 60


def over(ranks: int, dtype: str = "bfloat16") -> Roundings:
    return Roundings([Declared.of_candidate(f"{dtype}/tp{ranks}")], EXACT)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain(parts: list[torch.Tensor], seed: int) -> torch.Tensor:
    total, *rest = parts
    for part in rest:
        total = total + part
    return total


def ring(parts: list[torch.Tensor], seed: int) -> torch.Tensor:
    """Every chunk of columns begins at another rank, as in a reduce-scatter around a ring."""
    ranks = len(parts)
    columns = torch.arange(parts[0].shape[-1]).chunk(ranks)
    turned = [[parts[(at + i) % ranks][:, c] for i in range(ranks)] for at, c in enumerate(columns)]
    return torch.cat([chain(each, seed) for each in turned], dim=-1)


def tree(parts: list[torch.Tensor], seed: int) -> torch.Tensor:
    """Any two at a time."""
    generator, left = torch.Generator().manual_seed(seed), list(parts)
    while len(left) > 1:
        one, other = sorted(torch.randperm(len(left), generator=generator)[:2].tolist())
        left.append(left.pop(other) + left.pop(one))
    return left[0]


def one_shot(parts: list[torch.Tensor], seed: int) -> torch.Tensor:
    return torch.stack(parts).float().sum(0).to(parts[0].dtype)


ORDERS = (chain, ring, tree, one_shot)


def assert_predicted(error: torch.Tensor, found: torch.Tensor, least: float) -> None:
    """Hold errors [T, D] against variances: every token inside, the mean below and not far."""
    predicted, measured = found[0, FRESH_RANDOM].sum(-1), error.square().sum(-1)
    assert (measured < DEVIATIONS**2 * predicted).all()
    assert least < float(measured.mean() / predicted.mean()) < 1


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16, 64])
def test_no_order_of_additions_sums_more_than_the_worst(ranks: int) -> None:
    worst = additions(ranks)
    generator = torch.Generator().manual_seed(ranks)
    seen = [0.0, 0.0]
    for attempt in range(60):
        left, squares, spread = [1] * ranks, 0.0, 0.0
        while len(left) > 2:
            at = [1, 0] if attempt == 0 else torch.randperm(len(left), generator=generator)[:2]
            one, other = sorted(int(i) for i in at)
            both = left.pop(other) + left.pop(one)
            left.insert(0, both)
            part = both / ranks
            squares, spread = squares + part**2, spread + part * (1 - part)
        assert squares <= worst.of_value + 1e-12
        assert spread <= worst.of_spread + 1e-12
        seen = [max(seen[0], squares), max(seen[1], spread)]

    # A chain, the first attempt, is the worst of one; of the other no tree seen is far from it.
    assert seen[0] == pytest.approx(worst.of_value)
    assert seen[1] >= 0.8 * worst.of_spread


def test_more_ranks_never_round_less() -> None:
    found = [shares(n) + additions(n) for n in (2, 4, 8, 16, 32, 64, 128)]

    assert found == sorted(found, key=lambda weights: weights.of_value)
    assert found == sorted(found, key=lambda weights: weights.of_spread)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("dtype", "ranks"), [("bfloat16", 2), ("bfloat16", 8), ("float16", 16)])
def test_shares_of_a_product_err_as_predicted(
    dtype: str, ranks: int, order: Callable[[list[torch.Tensor], int], torch.Tensor]
) -> None:
    narrow: torch.dtype = getattr(torch, dtype)
    terms = normal(TOKENS, 256, 48, seed=ranks) + 0.02  # [T, M, D], and a mean
    exact = terms.sum(1)
    parts = [part.sum(1).to(narrow) for part in terms.chunk(ranks, dim=1)]
    roundings = over(ranks, dtype)

    error = order(parts, ranks).double() - exact
    found = of_linear(roundings, exact, terms.square().sum(1), 256) + roundings.of_output(exact)

    # A value is on average a third of a binade above the one whose rounding is the largest, and
    # one shot leaves all additions but the last out.
    assert_predicted(error, found, 0.1 if order is one_shot else 0.3)


def test_heads_that_cancel_have_shares_far_larger_than_their_sum() -> None:
    ranks, heads, width = 8, 16, 32
    head = normal(TOKENS, heads // 2, 1, 48, seed=1).repeat(1, 1, width, 1)  # all of one direction
    terms = torch.cat((head, -head * (1 + 2**-10)), dim=1)
    exact = terms.sum((1, 2))
    parts = [part.sum((1, 2)).bfloat16() for part in terms.chunk(ranks, dim=1)]
    error = chain(parts, 0).double() - exact

    by_head = of_linear(over(ranks), exact, terms.sum(2).square().sum(1), heads)
    by_feature = of_linear(over(ranks), exact, terms.square().sum((1, 2)), heads * width)

    assert_predicted(error, by_head, 0.2)
    measured = error.square().sum(-1)
    assert (measured > 3 * by_feature[0, FRESH_RANDOM].sum(-1)).all()


def test_as_many_terms_as_ranks_are_the_shares_themselves() -> None:
    terms = normal(TOKENS, 4, 48, seed=2)
    exact, squares = terms.sum(1), terms.square().sum(1)
    rest = (squares - exact.square() / 4) * 4 / 3

    found = shares(4).of_value * exact.square() + shares(4).of_spread * rest

    assert torch.allclose(found, squares)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_experts_split_or_whole_and_added_together_or_apart_err_as_predicted(
    order: Callable[[list[torch.Tensor], int], torch.Tensor], whole: bool
) -> None:
    ranks, experts, neurons = 8, 9, 64
    terms = normal(experts, TOKENS, neurons, 48, seed=3)
    weight = normal(experts, TOKENS, 1, seed=4).abs()
    weight[-1] = 1.0  # the shared expert's
    scaled = terms * weight.unsqueeze(-1)
    value, every = scaled.sum((0, 2)), torch.arange(TOKENS)
    collected = ExpertShares(torch.zeros_like(value))
    for part in scaled[:-1]:
        collected.add(part.sum(1), part.square().sum(1), every)
    collected.add_shared(scaled[-1].sum(1), scaled[-1].square().sum(1))
    roundings = over(ranks)
    found = collected.total(value, roundings) + roundings.of_output(value)

    def of_rank(rank: int, chosen: range) -> torch.Tensor:
        total = torch.zeros(TOKENS, 48)
        for expert in chosen:
            neuron = slice(rank * neurons // ranks, (rank + 1) * neurons // ranks)
            part = slice(None) if whole else neuron
            if whole and expert * 5 % ranks != rank:
                continue
            output = terms[expert, :, part].sum(1).bfloat16()
            total += (output.float() * weight[expert].float()).bfloat16().float()
        return total.bfloat16()

    routed = [of_rank(rank, range(experts - 1)) for rank in range(ranks)]
    shared = [of_rank(rank, range(experts - 1, experts)) for rank in range(ranks)]
    together = order([one + other for one, other in zip(routed, shared, strict=True)], 3)
    apart = order(routed, 3) + order(shared, 3)

    for sum_ in (together, apart):
        assert_predicted(sum_.double() - value, found, 0.02)


@pytest.mark.parametrize(
    "name", ["bfloat16/tp1", "bfloat16/tp3", "float8/tp2", "bfloat16/tp", "/tp2"]
)
def test_ranks_that_are_no_power_of_two_are_refused(name: str) -> None:
    with pytest.raises(CheckError, match="N a power of two: bfloat16/tp8"):
        parse_bounds(f"float32,{name}")


def test_ranks_that_the_heads_cannot_be_divided_among_are_refused(
    tiny: object, tmp_path: object
) -> None:
    options = ForwardOptions(bounds=("bfloat16/tp4", "bfloat16/tp8"))

    with pytest.raises(CheckError, match="4 heads cannot be divided among 8 ranks"):
        run_forward(f"{tiny}/bf16", [Prompt(id="p", tokens=(3, 4))], tmp_path / "run", options)  # type: ignore[operator]


def test_engines_of_one_rank_round_no_shares() -> None:
    both = Roundings([Declared.of_candidate(name) for name in ("bfloat16", "bfloat16/tp4")], EXACT)
    value = normal(3, 8, seed=7)

    found = of_linear(both, value, 2 * value.square(), 64)

    assert not found[0].any()
    assert (found[1, FRESH_RANDOM] > 0).all()
    assert replace(both.declared[1], ranks=1) == both.declared[0]
