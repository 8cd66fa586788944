"""A kernel whose outputs have another form than the operation's breaks laws; it crashes none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nvfp4check.faults.diagnosis import with_diagnosis
from nvfp4check.ops import OPERATIONS
from nvfp4check.properties import properties_of
from nvfp4check.properties.law import Case, Property, Runner, Setting, Verdict

SETTING = Setting(convention="engine", max_examples=2)

FORMS: dict[str, Callable[[], Any]] = {
    "one element": lambda: torch.zeros(1),
    "bytes of rank 3": lambda: torch.zeros((2, 2, 2), dtype=torch.uint8),
    "no data": lambda: torch.zeros(1, device="meta"),
    "text": lambda: "x",
}


def _kernel(name: str, form: str) -> Callable[..., Any]:
    count = sum(not value.optional for value in OPERATIONS[name].outputs)

    def kernel(*arguments: Any) -> Any:
        return tuple(FORMS[form]() for _ in range(count))

    return kernel


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_outputs_of_another_form_break_a_law_and_crash_none(name: str, form: str) -> None:
    kernel = _kernel(name, form)
    outcomes = [law.run(kernel, SETTING) for law in properties_of(name)]
    assert any(outcome.verdict is Verdict.FAIL for outcome in outcomes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["quantize", "unswizzle"])
def test_no_fault_is_named_for_outputs_of_another_form(name: str, form: str) -> None:
    kernel = _kernel(name, form)
    law = properties_of(name)[0]
    assert with_diagnosis(law.run(kernel, SETTING), kernel, SETTING).diagnosis is None


def _breaks(runner: Runner, case: Case) -> None:
    runner(case.inputs)[0].view(16, 16)


LAW = Property(
    name="a-law",
    operation="dequantize",
    law="the values are 256",
    generate=lambda setting: (),
    check=_breaks,
)
CASE = Case(
    "one row",
    {
        "packed_codes": torch.zeros((1, 8), dtype=torch.uint8),
        "block_scales": torch.ones((1, 1)).to(torch.float8_e4m3fn),
        "global_decode_scale": torch.tensor(1.0),
        "dtype": torch.float32,
    },
)


def test_the_message_names_the_output_its_form_and_the_right_one() -> None:
    runner = Runner(OPERATIONS["dequantize"], lambda *arguments: torch.zeros(3), Setting())

    failure = LAW.ask(runner, CASE)

    assert failure is not None
    assert failure.message == "returned values as float32 [3], expected float32 [1, 16]"


def test_a_law_that_fails_on_outputs_of_the_right_form_is_no_fault_of_the_kernel() -> None:
    runner = Runner(OPERATIONS["dequantize"], lambda *arguments: torch.zeros((1, 16)), Setting())

    with pytest.raises(RuntimeError, match="invalid for input of size 16"):
        LAW.ask(runner, CASE)
