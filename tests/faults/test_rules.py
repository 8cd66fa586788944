"""The published rules: what each accepts, what it draws, and what it sees of planted faults."""

import math

import pytest
import torch

from nvfp4check.faults import draws, sensitivity
from nvfp4check.faults.power import on_own_inputs, outcomes_on
from nvfp4check.faults.published_rules import RULES, published_rule, tolerance_rule
from nvfp4check.findings import CheckError
from nvfp4check.properties import products
from nvfp4ref import nvfp4
from nvfp4ref.matmul import exact
from nvfp4ref.rounding import round_to

EXPECTED = torch.linspace(-4, 4, 4096, dtype=torch.float64).view(64, 64)

#: A relative error of every element that each rule accepts, and one that it does not.
LIMITS = {
    "vllm": (0.09, 0.3),
    "flashinfer-fuzz": (0.1, 0.3),
    "transformer-engine": (7e-3, 2e-2),
    "tensorrt-llm": (9e-3, 2e-2),
    "torchao": (0.15, 0.17),
    "cutlass": (0.0, 1e-5),
    "flashinfer-bench": (9e-3, 2e-2),
    "flashinfer-bench-low-bit": (9e-3, 2e-2),
    "triton_kernels": (3e-3, 1e-2),
    "sglang": (0.03, 0.1),
    "deepgemm": (0.1, 0.3),
    "kernelbench": (9e-3, 3e-2),
}

#: Rules that do not look at the size of a result.
SCALE_FREE = ("flashinfer", "tt-metal")


@pytest.fixture(scope="module")
def own():
    return on_own_inputs(RULES)


@pytest.fixture(scope="module")
def smallest():
    return {rule.name: sensitivity.of_rule(rule) for rule in RULES}


@pytest.mark.parametrize("name", LIMITS)
def test_a_rule_accepts_a_small_error_and_refuses_a_large_one(name):
    small, large = LIMITS[name]
    rule = published_rule(name)

    assert rule.accepts((EXPECTED * (1 + small)).float(), EXPECTED)
    assert not rule.accepts((EXPECTED * (1 + large)).float(), EXPECTED)


@pytest.mark.parametrize("name", SCALE_FREE)
def test_cosine_and_correlation_accept_any_scale(name):
    rule = published_rule(name)

    assert rule.accepts((1000 * EXPECTED).float(), EXPECTED)
    assert not rule.accepts(EXPECTED.roll(7, 0).float(), EXPECTED)


def test_every_rule_has_its_limits_shown():
    assert {rule.name for rule in RULES} == {*LIMITS, *SCALE_FREE}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_accepts_correct_kernels_on_its_own_inputs(rule, own):
    outcome = own[rule.name]

    assert not outcome.refused
    assert outcome.seen
    assert set(outcome.seen) <= set(outcome.showing)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_nan_is_refused_by_all_but_those_that_set_it_to_zero(rule):
    lets_pass = rule.name in ("transformer-engine", "tt-metal")
    expected = EXPECTED.clone()
    expected[0, 0] = 0.0
    poisoned = expected.clone()
    poisoned[0, 0] = math.nan

    assert rule.accepts(poisoned.float(), expected) == lets_pass


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_nan_and_infinity_must_stand_where_they_are_due_and_the_rest_is_judged(rule):
    expected = EXPECTED.clone()
    expected[0, 0], expected[0, 1], expected[0, 2] = math.nan, math.inf, 1e39
    right = expected.float()
    elsewhere = right.roll(5, 1)
    wrong_sign = right.clone()
    wrong_sign[0, 1] = -math.inf
    wrong_rest = torch.where(expected.isfinite(), -expected, expected).float()
    wrong_rest[0, 2] = math.inf

    assert rule.accepts(right, expected)
    assert not rule.accepts(elsewhere, expected)
    assert not rule.accepts(wrong_sign, expected)
    assert not rule.accepts(wrong_rest, expected)
    assert not rule.accepts(right[:2], expected)


def test_zeros_for_zeros_are_refused_where_a_project_divides_by_their_norm():
    zeros = torch.zeros(8, 8)
    refused = {rule.name for rule in RULES if not rule.accepts(zeros, zeros.double())}

    assert refused == {"flashinfer", "sglang", "cutlass", "torchao"}


def test_a_relative_tolerance_of_the_actual_value_lets_larger_values_pass():
    ours, theirs = published_rule("transformer-engine"), published_rule("kernelbench")
    expected = torch.full((4,), 1000.0, dtype=torch.float64)

    assert theirs.accepts(torch.full((4,), 1010.05), expected)
    assert not ours.accepts(torch.full((4,), 1008.05), expected)


def test_draws_are_what_their_projects_draw():
    generator = torch.Generator().manual_seed(0)
    sparse = draws.sparse_on_the_grid(generator, 64, 256)
    planted = draws.planted_maxima(generator, 64, 64).original
    integers = draws.small_integers(generator, 64, 256)
    by_value = draws.normal_by_largest_value(generator, 8, 64)
    decoded = nvfp4.dequantize(integers.codes, integers.scales, integers.global_scale)

    assert 0.7 < float((sparse.original == 0).float().mean()) < 0.9
    assert torch.equal(planted[:32, :32].diagonal().abs(), planted[:32, :32].abs().max().expand(32))
    assert torch.equal(decoded, integers.original)
    assert by_value.global_scale == by_value.original.max().float() / 2688
    assert float(draws.uniform(generator, 8, 64).original.min()) >= 0


def test_rules_without_scale_miss_a_wrong_global_scale_on_random_inputs(own):
    assert not {"F7a", "F7b", "F7c"} & set(own["flashinfer"].seen)


def test_a_fault_that_needs_more_than_random_data_does_not_show_on_it(own):
    showing = own["triton_kernels"].showing

    assert "F3c as 0, of B" not in showing
    assert "F10a of B" not in showing


def test_a_tolerance_of_zero_refuses_correct_kernels_that_round():
    rule = tolerance_rule(0.0, 0.0)
    generator = torch.Generator().manual_seed(0)
    a, b = (products.operand(generator, 8, 64, certified=False) for _ in "ab")
    inputs = dict(products.case("all scales", a, b).inputs)
    expected = exact(*a, *b).value

    outcome = outcomes_on([(inputs, {rule.name: expected})], (rule,))[rule.name]

    assert "chunks of 64, toward zero" in outcome.refused


def test_the_derived_bound_sees_smaller_errors_than_any_rule_but_equality(smallest):
    bound = sensitivity.of_derived_bound()
    others = [seen for name, seen in smallest.items() if name != "cutlass"]

    assert bound.flipped_signs == 1
    assert bound.scale_error is not None
    assert bound.scale_error < 2.0**-9
    assert all(one.scale_error is None or one.scale_error > bound.scale_error for one in others)


def test_rules_that_ask_for_a_share_or_an_angle_miss_many_wrong_signs(smallest):
    fewest = {name: seen.flipped_signs for name, seen in smallest.items()}

    assert fewest["flashinfer-bench-low-bit"] == 1024
    assert fewest["flashinfer"] == 256
    assert fewest["transformer-engine"] == fewest["kernelbench"] == 1


def test_every_rule_accepts_the_rounded_product_of_model_sized_inputs():
    for rule in RULES:
        sample = rule.model_sized_sample(3)
        assert rule.accepts(round_to(sample.product, rule.dtype), rule.expected(sample)), rule.name


def test_negative_tolerances_and_unknown_rules_are_refused():
    with pytest.raises(CheckError, match="negative"):
        tolerance_rule(-1.0, 0.0)
    with pytest.raises(CheckError, match="unknown rule 'nobody': one of vllm"):
        published_rule("nobody")
