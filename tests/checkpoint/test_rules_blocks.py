"""NV108 and NV110: the shape of block scales, and blocks that tensor parallelism would cut."""

from collections.abc import Callable

import numpy as np
import pytest

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.checkpoint.validation import ValidationOptions, ValidationResult, validate
from nvfp4check.findings import Severity

INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.3.mlp.experts.2.down_proj"


def run(clone: CheckpointEditor, tp: int | None = None) -> ValidationResult:
    with clone.edit_json(INDEX) as index:  # other sizes of tensors are not the planted fault
        total = sum(entry.nbytes for entry in clone.entries().values())
        index["metadata"]["total_size"] = total
    options = ValidationOptions(level=RuleLevel.HEADERS, tp=tp)
    return validate(open_checkpoint(clone.path), options)


def _padded(rows: int, columns: int) -> tuple[int, ...]:
    return (-(-rows // 128) * 128, -(-columns // 4) * 4)


@pytest.mark.parametrize(
    ("reshaped", "said"),
    [
        (lambda rows, columns: (columns, rows), "transposed"),
        (lambda rows, columns: (rows, columns // 2), "one for 32"),
        (lambda rows, columns: (rows, 2 * columns), "one for 8"),
        (lambda rows, columns: (rows, 1), "one for a row"),
        (lambda rows, columns: (rows * columns,), "in another shape"),
        (_padded, "128x4"),
        (lambda rows, columns: (_padded(rows, columns)[0] * _padded(rows, columns)[1],), "tiled"),
        (lambda rows, columns: (1, columns // 8), "128 x 128"),
        (lambda rows, columns: (), "whole tensor"),
    ],
)
def test_nv108_says_what_a_wrong_shape_looks_like(
    clone: CheckpointEditor, reshaped: Callable[[int, int], tuple[int, ...]], said: str
) -> None:
    module = "model.layers.3.mlp.experts.2.gate_proj"
    rows, columns = clone.entry(f"{module}.weight_scale").shape
    assert (rows, columns) == (64, 16)
    shape = reshaped(rows, columns)
    clone.replace(f"{module}.weight_scale", b"\x38" * int(np.prod(shape)), shape=shape)
    [finding] = run(clone).findings
    assert finding.rule == "NV108"
    assert (finding.tensor, finding.observed) == (f"{module}.weight_scale", [*shape])
    assert finding.expected == [rows, columns]
    assert said in finding.message


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_nv110_is_silent_where_borders_fall_between_blocks(
    clone: CheckpointEditor, tp: int
) -> None:
    assert run(clone, tp).findings == ()


@pytest.mark.parametrize(
    ("tp", "said"), [(8, "8 a shard is no multiple of 16"), (3, "3 does not divide it")]
)
def test_nv110_names_the_weights_that_a_border_cuts(
    clone: CheckpointEditor, tp: int, said: str
) -> None:
    result = run(clone, tp)
    findings = {f.tensor: f for f in result.findings}
    assert {f.rule for f in result.findings} == {"NV110"}
    assert said in findings[f"{EXPERT}.weight"].message
    assert findings[f"{EXPERT}.weight"].severity is Severity.INFO
    assert all(name and name.endswith(("o_proj.weight", "down_proj.weight")) for name in findings)
    assert result.verdict == "pass"
