"""What roundings add, against roundings that were made."""

import math

import pytest
import torch

from nvfp4check.findings import CheckError
from nvfp4check.forward.bounds.arithmetic import (
    DEVIATIONS,
    DIRECTED_BOUNDED,
    FRESH_RANDOM,
    Declared,
    Roundings,
    risk,
    rounding_variance,
)
from nvfp4check.forward.bounds.uncertain import Uncertain, deviation, minkowski
from nvfp4check.tolerance import Accumulator, Facts, Rounding
from nvfp4ref.rounding import round_to

EXACT = Declared.of_reference(torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_variance_of_a_rounding_is_that_of_many_roundings(dtype: torch.dtype) -> None:
    values = normal(200_000)

    errors = round_to(values, dtype).double() - values

    predicted = rounding_variance(values, dtype)
    assert (errors.abs() <= (3 * predicted).sqrt() * (1 + 1e-12)).all()
    assert float(errors.square().mean() / predicted.mean()) == pytest.approx(1, abs=0.02)


def test_zero_is_not_rounded_and_subnormals_are_by_their_own_step() -> None:
    values = torch.tensor([0.0, 2.0**-140], dtype=torch.float64)

    assert rounding_variance(values, torch.float32).tolist() == [0.0, (2.0**-150) ** 2 / 3]


@pytest.mark.parametrize("seed", range(3))
def test_a_float32_sum_in_any_order_errs_as_predicted(seed: int) -> None:
    terms = normal(400, 512, seed=seed).float().double() + 0.1
    exact = terms.sum(-1)
    total = torch.zeros(400, dtype=torch.float32)
    for column in terms.float().T:
        total = total + column

    roundings = Roundings([Declared.of_candidate("float32")], EXACT)
    predicted = roundings.of_sum(512, exact, terms.square().sum(-1))[0, FRESH_RANDOM]

    measured = (total.double() - exact).square().mean()
    # A float32 is on average a third of a binade above the value whose rounding is largest.
    assert 0.2 < float(measured / predicted.mean()) < 1


def test_an_accumulator_that_truncates_stays_within_its_bounded_error() -> None:
    terms = normal(400, 512, seed=3).abs()
    exact = terms.sum(-1)
    total = torch.zeros(400, dtype=torch.float64)
    for column in terms.T:
        total = total + column
        mantissa, exponent = torch.frexp(total)
        total = torch.ldexp((mantissa * 2**24).floor() / 2**24, exponent)
    facts = Facts(accumulation_chunk=1)
    assert facts.accumulator_rounding is Rounding.ANY

    roundings = Roundings([Declared(torch.float32, facts)], EXACT)
    found = roundings.of_sum(512, exact, terms.square().sum(-1))[0]

    lost = exact - total
    assert (lost > 0).all()
    assert (lost <= deviation(found.unsqueeze(0))[0]).all()
    # Without the bounded part, by random roundings alone, it would not.
    found[DIRECTED_BOUNDED] = 0
    assert (lost > deviation(found.unsqueeze(0))[0]).any()


def test_both_sides_round() -> None:
    values = normal(50)
    both = Roundings([Declared.of_candidate("bfloat16")], Declared.of_reference(torch.float32))

    found = both.of_output(values)[0, FRESH_RANDOM]

    one, other = (rounding_variance(values, d) for d in (torch.bfloat16, torch.float32))
    assert torch.equal(found, one + other)


@pytest.mark.parametrize("directions", [1, 3, 64])
def test_the_risk_holds_whatever_the_correlation(directions: int) -> None:
    mix = normal(64, directions)
    variance = mix.square().sum()
    norms = (normal(40_000, directions, seed=1) @ mix.T).norm(dim=-1) / variance.sqrt()

    for limit in (1.5, 2.0, 2.5):
        at_most = limit * math.exp(-(limit**2 - 1) / 2)
        assert float((norms > limit).double().mean()) <= at_most
    assert risk() == pytest.approx(DEVIATIONS * math.exp(-(DEVIATIONS**2 - 1) / 2))
    assert risk() < 2e-7


def test_errors_of_unknown_correlation_add_by_their_roots() -> None:
    one, other = torch.tensor(4.0), torch.tensor(9.0)

    assert float(minkowski(one, other)) == 25.0


def test_a_common_error_grows_with_the_value_and_an_own_one_does_not() -> None:
    x = Uncertain.exactly(torch.tensor([[3.0, 4.0]]), 1)
    x.common[0, FRESH_RANDOM, 0] = 1e-4
    x = x.plus(torch.full_like(x.variance, 0.0))
    x.variance[0, FRESH_RANDOM, 0, 0] = 0.01

    assert x.total[0, FRESH_RANDOM, 0].tolist() == pytest.approx([0.01 + 9e-4, 16e-4])
    assert float(x.bound) == pytest.approx(DEVIATIONS * math.sqrt(0.01 + 25e-4))


def test_arithmetic_that_cannot_be_declared_is_refused_with_the_choices() -> None:
    with pytest.raises(CheckError, match=r"'float8': give any of float32, bfloat16, float16"):
        Declared.of_candidate("float8")


@pytest.mark.parametrize(
    ("name", "ranks", "absorbs"),
    [
        ("float32", 1, True),
        ("float32/direct", 1, False),
        ("bfloat16/tp8", 8, True),
        ("bfloat16/tp8/direct", 8, False),
    ],
)
def test_a_name_says_ranks_and_the_form_of_attention(name: str, ranks: int, absorbs: bool) -> None:
    side = Declared.of_candidate(name)

    assert (side.ranks, side.absorbs) == (ranks, absorbs)
    assert side.dtype == getattr(torch, name.split("/")[0])
    assert Roundings([side, side], EXACT).absorbs.tolist() == [absorbs] * 2


@pytest.mark.parametrize(
    "name", ["bfloat16/direct/tp8", "direct", "float32/", "bfloat16/tp1/direct"]
)
def test_names_of_another_order_are_refused(name: str) -> None:
    with pytest.raises(CheckError, match="with /direct at the end"):
        Declared.of_candidate(name)


def test_float64_references_have_float64_accumulators() -> None:
    assert EXACT.facts.accumulator is Accumulator.FLOAT64
