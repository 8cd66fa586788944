"""NV701 to NV705, each with a fault that it alone sees."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.validation import ValidationOptions, validate
from nvfp4check.findings import Finding, Severity
from nvfp4ref import fp8_block
from nvfp4ref.conventions import Convention
from nvfp4ref.nvfp4 import quantize

EXPERT = "model.layers.2.mlp.experts.5"
DOWN = f"{EXPERT}.down_proj"

Findings = Callable[[CheckpointEditor], list[Finding]]


@pytest.fixture
def findings(golden: SimpleNamespace, tmp_path: Path) -> Findings:
    def run(clone: CheckpointEditor) -> list[Finding]:
        options = ValidationOptions(
            base=open_checkpoint(golden.fp8), journal=tmp_path / "journal.jsonl"
        )
        return list(validate(open_checkpoint(clone.path), options).findings)

    return run


def the_only(found: list[Finding], rule: str) -> Finding:
    assert [finding.rule for finding in found] == [rule], found
    return found[0]


def requantize(golden: SimpleNamespace, clone: CheckpointEditor, factor: float) -> None:
    """Quantise an expert's down_proj again under another global scale."""
    base = open_checkpoint(golden.fp8)
    w, scale = (base.torch(base.tensors[f"{DOWN}.weight{part}"]) for part in ("", "_scale_inv"))
    decode = torch.tensor(clone.scalar(f"{DOWN}.weight_scale_2") * factor)
    x = fp8_block.dequantize(w, scale, torch.bfloat16)
    codes, scales = quantize(x, decode, Convention.MODELOPT)
    clone.patch(f"{DOWN}.weight", codes.numpy().tobytes())
    clone.patch(f"{DOWN}.weight_scale", scales.view(torch.uint8).numpy().tobytes())
    clone.set_scalar(f"{DOWN}.weight_scale_2", float(decode))


def test_nv701_sees_one_flipped_bit(clone: CheckpointEditor, findings: Findings) -> None:
    raw = clone.raw(f"{DOWN}.weight")
    raw[3, 5] ^= 0x08
    row = np.array(raw[3]).copy()
    raw[3, 5] = row[5] | 0x07  # large enough not to be a zero with another sign
    finding = the_only(findings(clone), "NV701")

    assert (finding.tensor, finding.severity) == (f"{DOWN}.weight", Severity.ERROR)
    assert finding.offset == clone.entry(f"{DOWN}.weight").start + 3 * raw.shape[1] + 5


def test_nv701_sees_a_scale_that_was_changed(clone: CheckpointEditor, findings: Findings) -> None:
    clone.raw(f"{DOWN}.weight_scale")[2, 1] -= 16
    finding = the_only(findings(clone), "NV701")

    assert "the first at row 2" in finding.message


def test_nv701_says_that_the_global_scale_is_at_fault(
    clone: CheckpointEditor, findings: Findings
) -> None:
    clone.set_scalar(f"{DOWN}.weight_scale_2", 2 * clone.scalar(f"{DOWN}.weight_scale_2"))
    finding = the_only(findings(clone), "NV701")

    assert "the global scale is 2 times amax/2688" in finding.message


def test_nv702_sees_rounding_towards_zero(clone: CheckpointEditor, findings: Findings) -> None:
    raw = clone.raw(f"{DOWN}.weight")
    low = np.argwhere((raw & 7) == 4)[0]  # 2, of 1.75 to 2.5, becomes 1.5
    raw[tuple(low)] -= 1
    finding = the_only(findings(clone), "NV702")

    assert (finding.count, finding.severity) == (1, Severity.WARNING)
    assert finding.offset == clone.entry(f"{DOWN}.weight").start + low[0] * raw.shape[1] + low[1]


def test_nv703_takes_the_place_of_nv701(clone: CheckpointEditor, findings: Findings) -> None:
    for part in ("weight", "weight_scale", "weight_scale_2"):
        clone.swap(f"{EXPERT}.up_proj.{part}", f"{EXPERT}.gate_proj.{part}")
    found = findings(clone)

    assert {finding.rule for finding in found} == {"NV703"}
    assert [finding.tensor for finding in found] == [
        f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.input_layernorm.weight",
        "model.layers.2.self_attn.kv_b_proj.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "lm_head.weight",
    ],
)
def test_nv704_sees_one_changed_bit_of_a_copy(
    clone: CheckpointEditor, findings: Findings, name: str
) -> None:
    entry = clone.entry(name)
    size = 4 if entry.dtype == "F32" else 2
    raw = clone.raw(name).reshape(-1)
    raw[7 * size] ^= 1
    finding = the_only(findings(clone), "NV704")

    assert (finding.tensor, finding.count) == (name, 1)
    assert finding.offset == entry.start + 7 * size


def test_nv705_sees_a_global_scale_that_wastes_range(
    golden: SimpleNamespace, clone: CheckpointEditor, findings: Findings
) -> None:
    requantize(golden, clone, 1.25)
    found = [finding for finding in findings(clone) if finding.rule.startswith("NV7")]
    finding = the_only(found, "NV705")

    assert finding.observed == pytest.approx(1.25, rel=2.0**-22)  # two float32 roundings
    assert "legal if it was searched for" in finding.message


def test_nv705_knows_4_over_6(
    golden: SimpleNamespace, clone: CheckpointEditor, findings: Findings
) -> None:
    requantize(golden, clone, 448 / 256)
    found = [finding for finding in findings(clone) if finding.rule.startswith("NV7")]

    assert "4-over-6" in the_only(found, "NV705").message


@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_nv705_allows_one_unit_in_the_last_place(
    clone: CheckpointEditor, findings: Findings, ulps: int
) -> None:
    clone.array(f"{DOWN}.weight_scale_2", "<u4")[...] += np.uint32(ulps % 2**32)

    assert [f for f in findings(clone) if f.rule == "NV705"] == []
