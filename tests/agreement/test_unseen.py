import math

import mpmath
import numpy as np
import pytest

from nvfp4check.agreement.quantile import beta_share
from nvfp4check.agreement.unseen import FARTHEST, Floats, beyond, blocks, tail_index

RESAMPLES = 20_000
ALPHA = 0.05

#: Four standard errors of the share of resamples beyond a quantile.
SLACK = 4 * math.sqrt(ALPHA * (1 - ALPHA) / RESAMPLES)


def _singles(values: Floats) -> tuple[Floats, Floats]:
    return values, np.ones(len(values))


def test_one_block_and_a_zero_weigh_as_chance_has_it() -> None:
    """The weight of one of two blocks is uniform, so its quantiles are known."""
    found = blocks(np.array([3.0]), np.array([3.0]), np.array([1.0, 1.0]), RESAMPLES, 0)

    assert found.lower(ALPHA) == pytest.approx(ALPHA, abs=SLACK)
    assert found.lower(0.5) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / RESAMPLES))


@pytest.mark.parametrize(("ones", "count"), [(0, 20), (1, 40), (7, 60)])
def test_zeros_and_ones_have_the_bounds_of_clopper_and_pearson(ones: int, count: int) -> None:
    values = np.array([1.0] * ones + [0.0] * (count - ones))
    found = blocks(*_singles(values), values, RESAMPLES, 0, limit=1.0)

    below = beta_share(ones + 1, count - ones, found.upper(ALPHA, 1.0))
    assert below == pytest.approx(1 - ALPHA, abs=SLACK)
    if ones:
        low = beta_share(ones, count - ones + 1, found.lower(ALPHA))
        assert low == pytest.approx(ALPHA, abs=SLACK)


def test_the_weighted_means_are_those_of_a_plain_calculation() -> None:
    random = np.random.default_rng(4)
    sums, sizes = random.exponential(2.0, 9), random.integers(1, 6, 9).astype(float)
    found = blocks(sums, sizes, sums / sizes, 50, 7)

    order = np.argsort(sums)
    draws = np.random.default_rng(7).standard_exponential((50, 10))
    unseen = float((sums / sizes).max()) * min(FARTHEST, beyond(sums / sizes, 0.8))
    means = []
    for draw in draws:
        top = sum(draw[i] * sums[order[i]] for i in range(9)) + draw[9] * sizes.mean() * unseen
        bottom = sum(draw[i] * sizes[order[i]] for i in range(9)) + draw[9] * sizes.mean()
        means.append(top / bottom)

    assert found.upper(0.1) == pytest.approx(sorted(means)[44], rel=1e-12)


def test_many_blocks_are_drawn_in_parts_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).exponential(1.0, 30)
    whole = blocks(*_singles(values), values, 200, 3)
    monkeypatch.setattr("nvfp4check.agreement.unseen.DRAWS_AT_ONCE", 100)

    parts = blocks(*_singles(values), values, 200, 3)

    assert parts.upper(ALPHA) == pytest.approx(whole.upper(ALPHA), rel=1e-14)


def test_the_order_of_blocks_changes_no_bit() -> None:
    random = np.random.default_rng(2)
    sums, sizes = random.exponential(1.0, 40), random.integers(1, 9, 40).astype(float)
    turned = random.permutation(40)

    one = blocks(sums, sizes, sums, 100, 0)
    other = blocks(sums[turned], sizes[turned], sums[turned], 100, 0)

    assert (one.upper(ALPHA), one.lower(ALPHA)) == (other.upper(ALPHA), other.lower(ALPHA))


@pytest.mark.parametrize("confidence", [0.8, 0.9])
def test_the_tail_is_hill_s_estimate_up_to_its_limit(confidence: float) -> None:
    values = np.array([math.e**3, 1.0, math.e, math.e**2, math.e**0.5])  # the largest three over √e
    hill = (2.5 + 1.5 + 0.5) / 3

    found = tail_index(values, confidence)

    # if the index is `found`, three logs of a Pareto tail are as small with this chance
    small = mpmath.gammainc(3, 0, 3 * hill / found, regularized=True)
    assert float(small) == pytest.approx(1 - confidence, rel=1e-9)


def test_the_tail_of_pareto_values_is_theirs() -> None:
    shares = (np.arange(100_000) + 0.5) / 100_000
    values = shares**-0.4

    # its upper limit lies 1 / sqrt(317) * 0.84 above, some 5 %
    assert 0.4 < tail_index(values, 0.8) < 0.4 * 1.1
    assert beyond(values, 0.8) == pytest.approx(1 / (1 - tail_index(values, 0.8)))


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0, 5.0], [0.0], [1.0, 20.0, 400.0]])
def test_a_mean_that_one_value_makes_has_a_tail_without_end(values: list[float]) -> None:
    assert math.isinf(beyond(np.array(values), 0.8))


def test_equal_blocks_have_no_tail() -> None:
    found = blocks(*_singles(np.full(9, 2.0)), np.full(9, 2.0), 100, 0)

    assert found.reach == found.far == 2
    assert found.upper(ALPHA) == pytest.approx(2.0)
