"""Operations: their signatures, their calls and what is refused."""

import subprocess
import sys

import pytest
import torch

from nvfp4check.findings import CheckError
from nvfp4check.ops import OPERATIONS, WrongOutputsError, operation, resolve
from nvfp4check.properties import properties_of

NAMES = [
    "quantize",
    "dequantize",
    "swizzle",
    "unswizzle",
    "matmul",
    "grouped_matmul",
    "silu_mul_quantize",
    "rms_norm_quantize",
    "rope",
    "route",
    "mla_decode",
    "dequantize_fp8_block",
]


def test_every_operation_of_the_contract_is_there() -> None:
    assert list(OPERATIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_has_a_reference_and_properties_with_names_of_their_own(name: str) -> None:
    convention = "engine" if OPERATIONS[name].has_convention else None
    laws = properties_of(name)

    assert callable(operation(name).reference(convention))
    assert len({law.name for law in laws}) == len(laws) > 4
    assert {law.operation for law in laws} == {name}


def test_a_signature_says_what_is_optional() -> None:
    assert operation("rms_norm_quantize").signature == (
        "rms_norm_quantize(x, weight, eps, global_decode_scale, residual=None) -> "
        "packed_codes, block_scales, residual"
    )


def test_arguments_go_by_position_and_the_outputs_come_as_a_tuple() -> None:
    taken = {"columns": 2, "rows": 1, "flat": torch.zeros(3)}

    outputs = operation("unswizzle").call(lambda flat, rows, columns: flat + rows - columns, taken)

    assert torch.equal(outputs[0], torch.full((3,), -1.0))


def test_a_missing_and_an_unknown_argument_are_named() -> None:
    with pytest.raises(CheckError, match=r"missing \['block_scales'\], unknown \['scales'\]"):
        operation("swizzle").call(lambda scales: scales, {"scales": 1})


def test_another_number_of_outputs_is_refused() -> None:
    with pytest.raises(WrongOutputsError, match="returned 1 outputs, expected packed_codes"):
        operation("quantize").call(lambda x, g: x, {"x": 1, "global_decode_scale": 2})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("torch", "is not MODULE:FUNCTION"),
        ("torch:", "is not MODULE:FUNCTION"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
        ("torch:no_such_function", "has no 'no_such_function'"),
    ],
)
def test_a_path_that_leads_nowhere_says_why(path: str, message: str) -> None:
    with pytest.raises(CheckError, match=message):
        resolve(path)


def test_a_convention_is_needed_and_known() -> None:
    with pytest.raises(CheckError, match="quantize depends on a convention: name one of"):
        operation("quantize").reference()
    with pytest.raises(CheckError, match="unknown convention 'nvidia'"):
        operation("quantize").reference("nvidia")
    with pytest.raises(CheckError, match="unknown operation 'quantise'"):
        operation("quantise")


def test_the_operations_load_no_torch() -> None:
    code = "import sys, nvfp4check.ops; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
