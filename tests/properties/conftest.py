"""Helpers of the tests of properties."""

from collections.abc import Callable

import pytest

from nvfp4check.ops import Kernel
from nvfp4check.properties import properties_of
from nvfp4check.properties.law import Setting, Verdict
from nvfp4check.tolerance import Facts

Failing = Callable[..., set[str]]


@pytest.fixture
def failing() -> Failing:
    """Return a function that names the properties of an operation which a kernel breaks."""

    def run(
        operation: str,
        kernel: Kernel,
        convention: str | None = None,
        only: str | None = None,
        facts: Facts | None = None,
    ) -> set[str]:
        setting = Setting(convention=convention, facts=facts or Facts(), max_examples=10)
        return {
            law.name
            for law in properties_of(operation)
            if only in (None, law.name) and law.run(kernel, setting).verdict is Verdict.FAIL
        }

    return run
