import math

import pytest
import torch

from nvfp4check.agreement.statistics import (
    Decision,
    decide_at_least,
    decide_at_most,
    estimate,
    quantiles,
)


def _prompts(count: int, length: int, seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, generator=generator, dtype=torch.float64) * scale for _ in range(count)
    ]


def test_the_interval_covers_the_true_mean_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nvfp4check.agreement.statistics.RESAMPLES", 200)
    trials = 200
    covered = 0
    for seed in range(trials):
        low, high = estimate(_prompts(8, 64, seed), seed).interval() or (math.nan, math.nan)
        covered += low <= 0 <= high

    # four standard errors of a binomial share below the nominal 95 %
    assert covered / trials >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / trials)
    assert covered < trials


def test_correlated_positions_widen_the_interval() -> None:
    base = _prompts(8, 64, 5)
    repeated = [prompt.repeat_interleave(4) for prompt in base]
    independent = _prompts(8, 256, 6)

    assert estimate(repeated).standard_error > 1.3 * estimate(independent).standard_error


def test_the_same_seed_gives_the_same_interval() -> None:
    prompts = _prompts(3, 40, 7)

    assert estimate(prompts, 11).resamples == estimate(prompts, 11).resamples


@pytest.mark.parametrize(
    ("mean", "decision"),
    [(0.0, Decision.PASS), (2.0, Decision.FAIL), (1.0, Decision.UNDECIDED)],
)
def test_a_limit_is_decided_only_when_the_bound_clears_it(mean: float, decision: Decision) -> None:
    found = estimate([prompt + mean for prompt in _prompts(8, 64, 8)])
    mirrored = estimate([-prompt - mean for prompt in _prompts(8, 64, 8)])

    assert decide_at_most(found, found.mean if mean == 1 else 1.0, 0.05) is decision
    assert decide_at_least(mirrored, mirrored.mean if mean == 1 else -1.0, 0.05) is decision


def test_one_position_decides_nothing() -> None:
    found = estimate([torch.tensor([0.0])])

    assert found.interval() is None
    assert decide_at_most(found, 100.0, 0.05) is Decision.UNDECIDED


def test_the_smallest_effect_is_seen_with_the_stated_power(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nvfp4check.agreement.statistics.RESAMPLES", 400)
    trials, alpha, power = 150, 0.05, 0.8
    seen = 0
    for seed in range(trials):
        effect = estimate(_prompts(8, 64, 1000 + seed), seed).smallest_effect(alpha, power)
        shifted = estimate([prompt + effect for prompt in _prompts(8, 64, seed)], seed)
        seen += shifted.quantile(alpha) > 0

    slack = 4 * math.sqrt(power * (1 - power) / trials)  # four standard errors
    assert power - slack <= seen / trials <= power + slack


def test_contaminated_positions_are_left_out_of_the_mean() -> None:
    prompts = [torch.tensor([1.0, math.nan, 3.0]), torch.tensor([math.nan, 2.0])]

    assert estimate(prompts).mean == 2.0


def test_quantiles_are_linear_between_ranks() -> None:
    prompts = [torch.tensor([4.0, 1.0, math.nan]), torch.tensor([3.0, 2.0])]

    assert quantiles(prompts, (0.0, 0.5, 1.0)) == (1.0, 2.5, 4.0)
