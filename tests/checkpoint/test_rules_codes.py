"""NV401 to NV404, each with a fault that it sees."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules.codes import why_not_a_weight
from nvfp4check.checkpoint.scan import scan_bytes
from nvfp4check.checkpoint.validation import ValidationOptions, validate
from nvfp4check.findings import Finding
from nvfp4ref.conventions import Convention
from nvfp4ref.nvfp4 import global_decode_scale, quantize

MODULE = "model.layers.2.mlp.experts.5.down_proj"
DENSE = "model.layers.0.mlp.down_proj"
WEIGHT, SCALES = f"{MODULE}.weight", f"{MODULE}.weight_scale"

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


def test_a_block_without_a_six_is_found(clone: CheckpointEditor, findings: Findings) -> None:
    raw = clone.raw(WEIGHT)
    raw.reshape(raw.shape[0], -1, 8)[2, 1] = 0x56
    finding = the_only(findings(clone.path), "NV401")

    assert (finding.tensor, finding.count) == (SCALES, 1)
    assert finding.offset == clone.entry(SCALES).start + 1 + 2 * clone.raw(SCALES).shape[1]
    assert "legal in 4-over-6" in finding.message


@pytest.mark.parametrize("byte", [0x00, 0x88])
def test_a_weight_of_zeros_is_found(clone: CheckpointEditor, findings: Findings, byte: int) -> None:
    clone.raw(WEIGHT)[...] = byte

    assert the_only(findings(clone.path), "NV402").tensor == WEIGHT


def test_random_bytes_are_no_weight(clone: CheckpointEditor, findings: Findings) -> None:
    codes = clone.raw(f"{DENSE}.weight")
    codes[...] = np.random.default_rng(0).integers(0, 256, codes.shape, dtype=np.uint8)
    found = findings(clone.path)

    # A twelfth of random blocks has no six, which is as true.
    assert {finding.rule for finding in found} == {"NV401", "NV403"}
    assert found[-1].tensor == f"{DENSE}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: np.full_like(codes, 0x77), "one value"),
        (lambda codes: codes & 0x77, "one sign"),
        (lambda codes: codes | 0x77, "saturated"),
    ],
)
def test_histograms_of_no_weight_are_found(
    clone: CheckpointEditor,
    findings: Findings,
    change: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]],
    message: str,
) -> None:
    codes = clone.raw(WEIGHT)
    codes[...] = change(np.array(codes))
    finding = the_only(findings(clone.path), "NV403")

    assert finding.tensor == WEIGHT
    assert message in finding.message


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.1])
def test_honest_weights_of_any_tail_have_honest_histograms(power: float, kept: float) -> None:
    rng = np.random.default_rng(int(10 * power))
    magnitudes = rng.gamma(1 / power, 1, (64, 512)) ** (1 / power)
    values = magnitudes * rng.choice([-0.02, 0.02], magnitudes.shape)
    values *= rng.random(values.shape) < kept
    weight = torch.from_numpy(values).float()
    scale = global_decode_scale(weight.abs().max(), Convention.MODELOPT)
    codes, scales = quantize(weight, scale, Convention.MODELOPT)
    scan = scan_bytes(
        "w", codes.numpy().reshape(-1), scales.view(torch.uint8).numpy().reshape(-1), 32
    )

    assert why_not_a_weight(scan) is None


@pytest.mark.parametrize(
    "other", ["model.layers.2.mlp.experts.6.down_proj", "model.layers.3.mlp.experts.5.down_proj"]
)
def test_an_expert_in_anothers_place_is_found(
    clone: CheckpointEditor, findings: Findings, other: str
) -> None:
    for part in ("weight", "weight_scale"):
        clone.patch(f"{other}.{part}", clone.raw(f"{MODULE}.{part}").tobytes())
    finding = the_only(findings(clone.path), "NV404")

    assert finding.tensor == WEIGHT
    assert finding.observed == [WEIGHT, f"{other}.weight"]


def test_a_plain_matrix_in_anothers_place_is_found(
    clone: CheckpointEditor, findings: Findings
) -> None:
    first, second = (f"model.layers.{layer}.self_attn.q_b_proj.weight" for layer in (1, 3))
    clone.patch(second, clone.raw(first).tobytes())

    assert the_only(findings(clone.path), "NV404").observed == [first, second]


def test_blocks_in_another_order_are_not_the_same_bytes(
    clone: CheckpointEditor, findings: Findings
) -> None:
    other = "model.layers.2.mlp.experts.6.down_proj"
    for part in ("weight", "weight_scale"):
        clone.patch(f"{other}.{part}", clone.raw(f"{MODULE}.{part}")[::-1].tobytes())

    assert findings(clone.path) == []


def test_a_layer_of_token_prediction_may_be_started_from_the_last(
    clone: CheckpointEditor, findings: Findings
) -> None:
    source, target = (f"model.layers.{layer}.self_attn.q_b_proj.weight" for layer in (4, 5))
    clone.patch(target, clone.raw(source).tobytes())

    assert findings(clone.path) == []
