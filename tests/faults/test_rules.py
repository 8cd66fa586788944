"""The published rules: what each accepts, what it draws, and what it sees of planted faults."""

import pytest
import torch

from nvfp4check.faults.power import on_own_inputs, outcomes_on
from nvfp4check.faults.published_rules import RULES, published_rule, tolerance_rule
from nvfp4check.findings import CheckError

EXPECTED = torch.linspace(-4, 4, 4096, dtype=torch.float64).view(64, 64)

#: A relative error of every element that each rule accepts, and one that it does not.
LIMITS = {
    "vllm": (0.09, 0.3),
    "transformer-engine": (7e-3, 2e-2),
    "flashinfer-bench": (9e-3, 2e-2),
    "triton_kernels": (3e-3, 1e-2),
    "sglang": (0.03, 0.1),
    "deepgemm": (0.1, 0.3),
    "kernelbench": (9e-3, 3e-2),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_rule_accepts_a_small_error_and_refuses_a_large_one(name):
    small, large = LIMITS[name]
    rule = published_rule(name)

    assert rule.accepts(EXPECTED * (1 + small), EXPECTED)
    assert not rule.accepts(EXPECTED * (1 + large), EXPECTED)


@pytest.mark.parametrize("name", ["flashinfer", "tt-metal"])
def test_cosine_and_correlation_accept_any_scale(name):
    rule = published_rule(name)

    assert rule.accepts(1000 * EXPECTED, EXPECTED)
    assert not rule.accepts(EXPECTED.roll(7, 0), EXPECTED)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_accepts_correct_kernels_on_its_own_inputs_and_refuses_another_nan(rule):
    outcome = on_own_inputs(rule)
    poisoned = EXPECTED.clone()
    poisoned[0, 0] = torch.nan

    assert not outcome.refused
    assert set(outcome.seen) <= set(outcome.showing)
    assert not rule.accepts(poisoned, EXPECTED)
    assert not rule.accepts(EXPECTED[:2], EXPECTED)


def test_rules_without_scale_miss_a_wrong_global_scale_on_random_inputs():
    seen = on_own_inputs(published_rule("flashinfer")).seen

    assert not {"F7a", "F7b", "F7c"} & set(seen)


def test_a_fault_that_needs_more_than_random_data_does_not_show_on_it():
    outcome = on_own_inputs(published_rule("kernelbench"))

    assert "F3c as 0, of B" not in outcome.showing
    assert "F10a of B" not in outcome.showing


def test_a_tolerance_of_zero_refuses_correct_kernels_that_round():
    rule = tolerance_rule(0.0, 0.0)
    sample = rule.model_sized_sample(0)

    outcome = outcomes_on([(sample.inputs, sample.quantised)], (rule,))[rule.name]

    assert "chunks of 64, toward zero" in outcome.refused


def test_negative_tolerances_and_unknown_rules_are_refused():
    with pytest.raises(CheckError, match="negative"):
        tolerance_rule(-1.0, 0.0)
    with pytest.raises(CheckError, match="unknown rule 'nobody': one of vllm"):
        published_rule("nobody")
