import math

import mpmath
import pytest
import torch

from nvfp4check.agreement.quantile import beta, beta_share, student_t
from nvfp4check.agreement.statistics import (
    Decision,
    Kind,
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


@pytest.mark.parametrize("kind", list(Kind))
def test_the_same_seed_gives_the_same_interval_in_whatever_order_prompts_come(kind: Kind) -> None:
    prompts = [prompt.abs() for prompt in _prompts(7, 40, 7)]
    if kind is Kind.SHARE:
        prompts = [(prompt < 1.5).double() for prompt in prompts]

    found = estimate(prompts, 11, kind, by_prompt=True)

    assert estimate(prompts[::-1], 11, kind, by_prompt=True).interval() == found.interval()
    assert estimate(prompts, 11, kind, by_prompt=True).interval() == found.interval()


def test_another_seed_draws_other_resamples() -> None:
    prompts = [prompt.abs() for prompt in _prompts(7, 40, 7)]
    one, other = (estimate(prompts, seed, Kind.POSITIVE).interval() for seed in (1, 2))

    assert one != other
    assert one == pytest.approx(other, rel=0.02)


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
        seen += shifted.lower_bound(alpha) > 0

    slack = 4 * math.sqrt(power * (1 - power) / trials)  # four standard errors
    assert power - slack <= seen / trials <= power + slack


def test_contaminated_positions_are_left_out_of_the_mean() -> None:
    prompts = [torch.tensor([1.0, math.nan, 3.0]), torch.tensor([math.nan, 2.0])]

    assert estimate(prompts).mean == 2.0


def test_quantiles_are_linear_between_ranks() -> None:
    prompts = [torch.tensor([4.0, 1.0, math.nan]), torch.tensor([3.0, 2.0])]

    assert quantiles(prompts, (0.0, 0.5, 1.0)) == (1.0, 2.5, 4.0)


def _kl_of_prompts(seed: int, count: int, length: int) -> list[torch.Tensor]:
    """Log-normal values of mean 1, whose prompts differ by a factor."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(count, generator=generator, dtype=torch.float64) * 0.5 - 0.5**2 / 2
    logs = torch.randn(count, length, generator=generator, dtype=torch.float64) * 1.5 - 1.5**2 / 2
    return list((logs + own.unsqueeze(-1)).exp())


def test_four_prompts_that_differ_are_covered_and_their_segments_alone_would_not_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nvfp4check.agreement.statistics.RESAMPLES", 200)
    trials = 150
    inside = {True: 0, False: 0}
    for seed in range(trials):
        prompts = _kl_of_prompts(seed, 4, 200)
        for by_prompt in inside:
            found = estimate(prompts, seed, Kind.POSITIVE, by_prompt=by_prompt)
            low, high = found.interval() or (math.nan, math.nan)
            inside[by_prompt] += low <= 1 <= high

    slack = 4 * math.sqrt(0.95 * 0.05 / trials)  # four standard errors
    assert inside[True] / trials >= 0.95 - slack
    assert inside[False] / trials < 0.85


def test_a_prompt_that_differs_widens_the_error_however_many_positions_it_has() -> None:
    alike = [prompt.abs() for prompt in _prompts(4, 500, 21)]
    found = estimate(alike, 0, Kind.POSITIVE, by_prompt=True)
    other = estimate([*alike[:3], alike[3] * 4], 0, Kind.POSITIVE, by_prompt=True)
    segments = estimate([*alike[:3], alike[3] * 4], 0, Kind.POSITIVE)

    assert other.standard_error > 10 * found.standard_error
    assert other.standard_error > 3 * segments.standard_error
    assert other.freedom == 3


def test_one_long_prompt_among_short_ones_does_not_decide_alone() -> None:
    prompts = [*_prompts(3, 10, 22), *_prompts(1, 400, 23)]
    found, segments = estimate(prompts, by_prompt=True), estimate(prompts)

    assert found.standard_error > 1.5 * segments.standard_error
    assert found.freedom == 3


def test_twenty_four_positions_that_agree_do_not_show_99_percent() -> None:
    found = estimate([torch.ones(6, dtype=torch.float64)] * 4, 0, Kind.SHARE, by_prompt=True)
    interval = found.interval()

    assert interval is not None
    assert interval[1] == 1
    assert interval[0] < 0.8
    assert decide_at_least(found, 0.99, 0.05) is Decision.UNDECIDED
    assert decide_at_least(found, 0.7, 0.05) is Decision.PASS
    assert 0.1 < found.smallest_effect(0.05, 0.8) < 1


def test_a_share_has_the_bounds_of_a_binomial_where_positions_are_independent() -> None:
    """With so many prompts that their number costs nothing, bounds are Clopper and Pearson's."""
    generator = torch.Generator().manual_seed(24)
    prompts = list((torch.rand(1000, 20, generator=generator) < 0.97).double())
    found = estimate(prompts, 0, Kind.SHARE, by_prompt=True)
    agree, positions = round(found.mean * 20_000), 20_000

    low, high = found.interval() or (math.nan, math.nan)

    assert low == pytest.approx(beta(0.025, agree, positions - agree + 1), abs=4e-4)
    assert high == pytest.approx(beta(0.975, agree + 1, positions - agree), abs=4e-4)


def test_the_interval_of_a_divergence_is_never_negative() -> None:
    found = estimate(_kl_of_prompts(3, 2, 5), 0, Kind.POSITIVE, by_prompt=True)

    low, high = found.interval() or (math.nan, math.nan)

    assert 0 < low < found.mean < high


def test_an_infinite_position_breaks_every_limit_and_ranks_nothing() -> None:
    prompts = [torch.tensor([0.1, math.inf, 0.2]), torch.tensor([0.1, 0.1, 0.3])]
    positive = estimate(prompts, 0, Kind.POSITIVE, by_prompt=True)
    signed = estimate(prompts, by_prompt=True)

    assert decide_at_most(positive, 1e6, 0.05) is Decision.FAIL
    assert signed.interval() == (-math.inf, math.inf)


def test_equal_logits_pass_any_limit() -> None:
    found = estimate([torch.zeros(9)] * 2, 0, Kind.POSITIVE, by_prompt=True)

    assert found.interval() == (0, 0)
    assert decide_at_most(found, 0.0, 0.05) is Decision.PASS


@pytest.mark.parametrize("freedom", [1.0, 1.7, 3.0, 11.0, 200.0])
@pytest.mark.parametrize("share", [0.025, 0.8, 0.975, 0.9999])
def test_the_quantile_of_t_leaves_its_share_below(share: float, freedom: float) -> None:
    t = student_t(share, freedom)
    tail = mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) / 2

    assert float(1 - tail if t > 0 else tail) == pytest.approx(share, rel=1e-9)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (13.0, 1.0), (1.0, 30.0), (55.5, 7.25)])
def test_the_share_of_a_beta_distribution_is_that_of_mpmath(a: float, b: float) -> None:
    for x in (1e-6, 0.02, 0.3, 0.5, 0.9, 0.999):
        expected = float(mpmath.betainc(a, b, 0, x, regularized=True))
        assert beta_share(a, b, x) == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert beta_share(a, b, beta(0.05, a, b)) == pytest.approx(0.05, rel=1e-9)


def test_quantiles_of_many_degrees_of_freedom_are_those_of_the_normal() -> None:
    assert student_t(0.975, 1e6) == pytest.approx(1.959964, abs=1e-5)
    assert student_t(0.5, 5.0) == pytest.approx(0.0, abs=1e-8)
