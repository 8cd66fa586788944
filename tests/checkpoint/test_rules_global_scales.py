"""NV301 to NV306, each with a fault that it sees."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.validation import ValidationOptions, validate
from nvfp4check.findings import Finding

MODULE = "model.layers.2.mlp.experts.5.down_proj"
GLOBAL, INPUT = f"{MODULE}.weight_scale_2", f"{MODULE}.input_scale"

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


def test_the_compressed_tensors_checkpoint_has_none_of_these(
    golden: SimpleNamespace, findings: Findings
) -> None:
    assert not [found for found in findings(golden.ct) if found.rule[:3] in ("NV2", "NV3", "NV5")]


@pytest.mark.parametrize("value", [0.0, -1e-4, math.inf, math.nan, 1e-39])
def test_an_unusable_global_scale_is_found(
    clone: CheckpointEditor, findings: Findings, value: float
) -> None:
    clone.set_scalar(GLOBAL, value)
    finding = the_only(findings(clone.path), "NV301")

    assert (finding.tensor, finding.shard) == (GLOBAL, clone.entry(GLOBAL).shard)


def test_a_reciprocal_global_scale_is_found(clone: CheckpointEditor, findings: Findings) -> None:
    clone.set_scalar(GLOBAL, 1 / clone.scalar(GLOBAL))

    assert the_only(findings(clone.path), "NV302").tensor == GLOBAL


def test_compressed_tensors_store_the_reciprocal(
    clone_of: Callable[[Path], CheckpointEditor], golden: SimpleNamespace, findings: Findings
) -> None:
    copy = clone_of(golden.ct)
    name = next(name for name in copy.entries() if name.endswith("o_proj.weight_global_scale"))
    copy.set_scalar(name, 1 / copy.scalar(name))
    found = [finding for finding in findings(copy.path) if finding.rule.startswith("NV3")]

    assert the_only(found, "NV302").tensor == name


@pytest.mark.parametrize("factor", [2.0**-12, 2.0**5])
def test_a_decoded_weight_of_odd_size_is_found(
    clone: CheckpointEditor, findings: Findings, factor: float
) -> None:
    clone.set_scalar(GLOBAL, clone.scalar(GLOBAL) * factor)
    finding = the_only(findings(clone.path), "NV303")

    assert finding.tensor == f"{MODULE}.weight"
    assert isinstance(finding.observed, float)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_an_unusable_input_scale_is_found(
    clone: CheckpointEditor, findings: Findings, value: float
) -> None:
    clone.set_scalar(INPUT, value)
    found = [finding for finding in findings(clone.path) if finding.rule.startswith("NV3")]

    assert the_only(found, "NV304").tensor == INPUT


def test_a_missing_input_scale_is_found(clone: CheckpointEditor, findings: Findings) -> None:
    clone.drop(INPUT)
    found = [finding for finding in findings(clone.path) if finding.rule.startswith("NV3")]

    assert the_only(found, "NV304").tensor == f"{MODULE}.weight"


def test_a_reciprocal_input_scale_is_found(clone: CheckpointEditor, findings: Findings) -> None:
    clone.set_scalar(INPUT, 1 / clone.scalar(INPUT))
    found = findings(clone.path)

    assert {finding.rule for finding in found} == {"NV305", "NV306"}
    assert all(finding.tensor == INPUT for finding in found)


def test_input_scales_that_are_all_reciprocals_are_found(
    clone: CheckpointEditor, findings: Findings
) -> None:
    names = [name for name in clone.entries() if name.endswith(".input_scale")]
    for name in names:
        clone.set_scalar(name, 1 / clone.scalar(name))
    found = findings(clone.path)

    assert {finding.rule for finding in found} == {"NV305"}
    assert {finding.tensor for finding in found} == set(names)


def test_activations_of_thousands_are_no_reciprocal(
    clone: CheckpointEditor, findings: Findings
) -> None:
    clone.set_scalar("model.layers.0.mlp.down_proj.input_scale", 5000 / 2688)

    assert findings(clone.path) == []


@pytest.mark.parametrize("factor", [2.0**-7, 2.0**6])
def test_an_expert_far_from_its_siblings_is_found(
    clone: CheckpointEditor, findings: Findings, factor: float
) -> None:
    siblings = [
        f"model.layers.2.mlp.experts.{expert}.down_proj.input_scale" for expert in range(16)
    ]
    median = float(np.median([clone.scalar(name) for name in siblings]))
    clone.set_scalar(INPUT, median * factor)

    assert the_only(findings(clone.path), "NV306").tensor == INPUT


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_factor_of_the_input_that_cannot_be_is_found(
    clone: CheckpointEditor, findings: Findings, value: float
) -> None:
    name = f"{MODULE}.pre_quant_scale"
    factors = np.ones(64, np.float32)
    factors[5] = value
    clone.add(name, factors.tobytes(), dtype="F32", shape=(64,))
    finding = the_only([f for f in findings(clone.path) if f.rule.startswith("NV3")], "NV304")

    assert (finding.tensor, finding.count) == (name, 1)
    assert "at column 5" in finding.message


def test_factors_of_the_input_are_one_a_column(clone: CheckpointEditor, findings: Findings) -> None:
    name = f"{MODULE}.pre_quant_scale"
    clone.add(name, np.ones(64, np.float32).tobytes(), dtype="F32", shape=(64,))
    assert not [f for f in findings(clone.path) if f.rule.startswith("NV3")]
    clone.drop(name)
    clone.add(name, np.ones(32, np.float32).tobytes(), dtype="F32", shape=(32,))
    found = [f for f in findings(clone.path) if f.rule.startswith("NV3")]

    assert the_only(found, "NV304").message == "pre_quant_scale has 32 factors, expected 64"
