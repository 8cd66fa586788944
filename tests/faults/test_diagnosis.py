"""A failing kernel is named by the fault it has, and a kernel with another one is not named."""

import pytest

from nvfp4check.faults import fault, kernel_faults
from nvfp4check.faults.diagnosis import with_diagnosis
from nvfp4check.faults.power import REFERENCE_FACTS
from nvfp4check.faults.variants import correct_variants
from nvfp4check.ops import OPERATIONS
from nvfp4check.properties import properties_of
from nvfp4check.properties.law import Setting, Verdict


def diagnosis(operation: str, kernel, convention: str | None = None) -> str | None:
    """Return what the first broken law of a kernel is diagnosed as."""
    setting = Setting(convention=convention, facts=REFERENCE_FACTS)
    for law in properties_of(operation):
        outcome = law.run(kernel, setting)
        if outcome.verdict is Verdict.FAIL:
            return with_diagnosis(outcome, kernel, setting).diagnosis
    raise AssertionError("the kernel breaks no law")


@pytest.mark.parametrize("one", kernel_faults(), ids=lambda one: one.id)
def test_a_planted_fault_is_diagnosed_as_itself(one):
    form = one.forms[0]
    convention = form.convention_for("engine")
    words = f"{one.id}: {one.name}" + (f" ({form.label})" if form.label else "")

    assert diagnosis(form.operation, form.apply(convention), convention) == f"equals {words}"


@pytest.mark.parametrize("identifier", ["F1a", "F3e", "F6b", "F12c"])
def test_a_fault_of_a_product_is_diagnosed_with_its_form(identifier):
    for form in fault(identifier).forms_of("matmul")[:3]:
        assert f"({form.label})" in diagnosis("matmul", form.apply())


def test_a_fault_in_a_kernel_that_rounds_is_diagnosed_within_rounding():
    rounding = next(one for one in correct_variants("matmul") if one.name == "pairwise")
    form = next(one for one in fault("F6a").forms_of("matmul") if one.label == "of both operands")

    named = diagnosis("matmul", form.apply(kernel=rounding.kernel))

    assert named == "as, within rounding, F6a: blocks of 32 (of both operands)"


def test_a_mistake_that_is_in_no_catalogue_is_given_no_name():
    def kernel(packed_codes, block_scales, global_decode_scale, dtype):
        right = OPERATIONS["dequantize"].reference()
        return right(packed_codes, block_scales, global_decode_scale, dtype) * 1.5 + 0.125

    assert diagnosis("dequantize", kernel) is None


def test_a_kernel_that_raises_is_given_no_name():
    def kernel(block_scales):
        raise ArithmeticError("not today")

    assert diagnosis("swizzle", kernel) is None


def test_a_property_that_holds_is_left_as_it_is():
    law = properties_of("swizzle")[0]
    kernel = OPERATIONS["swizzle"].reference()
    outcome = law.run(kernel, Setting())

    assert with_diagnosis(outcome, kernel, Setting()) is outcome
