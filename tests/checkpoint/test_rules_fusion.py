"""NV501 to NV503, each with a fault that it sees."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.validation import ValidationOptions, validate
from nvfp4check.findings import Finding

EXPERT = "model.layers.2.mlp.experts.5"

Findings = Callable[[Path], list[Finding]]


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    def run(path: Path) -> list[Finding]:
        options = ValidationOptions(journal=tmp_path / "journal.jsonl")
        return list(validate(open_checkpoint(path), options).findings)

    return run


def the_only(found: list[Finding], rule: str) -> Finding:
    assert [finding.rule for finding in found] == [rule], found
    return found[0]


@pytest.mark.parametrize(("part", "rule"), [("weight_scale_2", "NV501"), ("input_scale", "NV502")])
@pytest.mark.parametrize(
    "module", [EXPERT, "model.layers.0.mlp", "model.layers.1.mlp.shared_experts"]
)
def test_gate_and_up_that_differ_are_found(
    clone: CheckpointEditor, findings: Findings, part: str, rule: str, module: str
) -> None:
    name = f"{module}.up_proj.{part}"
    clone.set_scalar(name, clone.scalar(name) * 1.25)
    finding = the_only(findings(clone.path), rule)

    assert finding.tensor == f"{module}.gate_proj.{part}"
    assert "by a factor of 1.25" in finding.message


def test_a_difference_of_one_ulp_is_a_difference(
    clone: CheckpointEditor, findings: Findings
) -> None:
    name = f"{EXPERT}.gate_proj.weight_scale_2"
    value = np.float32(clone.scalar(name))
    clone.set_scalar(name, float(np.nextafter(value, np.float32(1))))

    assert the_only(findings(clone.path), "NV501").count == 2


def test_down_proj_is_fused_with_nothing(clone: CheckpointEditor, findings: Findings) -> None:
    name = f"{EXPERT}.down_proj.weight_scale_2"
    clone.set_scalar(name, clone.scalar(name) * 1.25)

    assert findings(clone.path) == []


@pytest.mark.parametrize("part", ["weight_global_scale", "input_global_scale"])
def test_latent_projections_that_differ_are_found(
    clone_of: Callable[[Path], CheckpointEditor],
    golden: SimpleNamespace,
    findings: Findings,
    part: str,
) -> None:
    copy = clone_of(golden.ct)
    name = f"model.layers.1.self_attn.q_a_proj.{part}"
    copy.set_scalar(name, copy.scalar(name) * 2)
    found = [finding for finding in findings(copy.path) if finding.rule.startswith("NV5")]

    # Twice the reciprocal is half the scale: the member with the smaller scale comes out too large.
    assert the_only(found, "NV503").tensor == name
