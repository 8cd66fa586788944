"""NV201 to NV209, each with a fault that it sees."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules.block_scales import tail_bound
from nvfp4check.checkpoint.validation import ValidationOptions, validate
from nvfp4check.findings import Finding, Severity
from nvfp4ref import layout

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
    """The one finding of a rule, with no other finding beside it."""
    assert [finding.rule for finding in found] == [rule], found
    return found[0]


def codes_of(clone: CheckpointEditor, module: str) -> npt.NDArray[np.uint8]:
    """A weight's codes, [N, blocks, 8 bytes], for writing."""
    raw = clone.raw(f"{module}.weight")
    return raw.reshape(raw.shape[0], -1, 8)


def test_the_sound_checkpoint_has_no_finding(golden: SimpleNamespace, findings: Findings) -> None:
    assert findings(golden.nvfp4) == []


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_nan_scale_is_found_at_its_byte(
    clone: CheckpointEditor, findings: Findings, byte: int
) -> None:
    scales = clone.raw(SCALES)
    scales[9, 2] = byte
    scales.flush()  # type: ignore[attr-defined]
    finding = the_only(findings(clone.path), "NV201")
    entry = clone.entry(SCALES)

    assert finding.severity is Severity.ERROR
    assert (finding.tensor, finding.shard, finding.count) == (SCALES, entry.shard, 1)
    assert finding.offset == entry.start + 9 * scales.shape[1] + 2


def test_a_negative_scale_is_found(clone: CheckpointEditor, findings: Findings) -> None:
    clone.raw(SCALES)[3, 1] |= 0x80
    finding = the_only(findings(clone.path), "NV202")

    assert (finding.tensor, finding.count) == (SCALES, 1)


def test_a_zero_scale_over_codes_is_lost(clone: CheckpointEditor, findings: Findings) -> None:
    clone.raw(SCALES)[4:6, 0] = 0
    finding = the_only(findings(clone.path), "NV203")

    assert (finding.tensor, finding.count) == (SCALES, 2)
    assert "row 4, block 0" in finding.message


def test_a_zero_scale_over_sixes_underflowed(clone: CheckpointEditor, findings: Findings) -> None:
    clone.raw(SCALES)[7, 1] = 0
    codes_of(clone, MODULE)[7, 1] = (0x77, 0x7F, 0xF7, 0xFF, 0x77, 0x7F, 0xF7, 0xFF)
    finding = the_only(findings(clone.path), "NV209")

    assert finding.severity is Severity.WARNING
    assert (finding.tensor, finding.count) == (SCALES, 1)


@pytest.mark.parametrize("byte", [0x00, 0x08, 0x20, 0x38])
def test_zero_blocks_of_every_producer_are_sound(
    clone: CheckpointEditor, findings: Findings, byte: int
) -> None:
    row = 1 if clone.raw(SCALES)[0].max() == 0x7E else 0  # not the block of the amax
    clone.raw(SCALES)[row, 1] = byte
    codes_of(clone, MODULE)[row, 1] = 0

    assert findings(clone.path) == []


def test_a_global_scale_too_small_saturates_block_scales(
    clone: CheckpointEditor, findings: Findings
) -> None:
    scales = clone.raw(f"{DENSE}.weight_scale")
    # Three times smaller: scales grow by that, up to the largest.
    values = torch.from_numpy(np.array(scales)).view(torch.float8_e4m3fn).float() * 3
    scales[...] = values.clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    clone.set_scalar(f"{DENSE}.weight_scale_2", clone.scalar(f"{DENSE}.weight_scale_2") / 3)
    finding = the_only(findings(clone.path), "NV204")

    assert finding.tensor == f"{DENSE}.weight_scale"


def test_a_global_scale_too_large_underuses_block_scales(
    clone: CheckpointEditor, findings: Findings
) -> None:
    scales = clone.raw(SCALES)
    scales[...] -= 8  # half of every scale: all of them are normal numbers
    clone.set_scalar(f"{MODULE}.weight_scale_2", clone.scalar(f"{MODULE}.weight_scale_2") * 2)
    finding = the_only(findings(clone.path), "NV205")

    assert (finding.tensor, finding.observed) == (SCALES, "0x76")


def test_one_member_of_a_fused_pair_may_stay_below_the_top(
    clone: CheckpointEditor, findings: Findings
) -> None:
    parts = [
        f"model.layers.2.mlp.experts.5.{leaf}.weight_scale" for leaf in ("gate_proj", "up_proj")
    ]
    first, second = (clone.raw(part) for part in parts)
    assert 0x7E in first or 0x7E in second
    second[second == 0x7E] = 0x7D
    first[0, 0] = 0x7E
    assert findings(clone.path) == []

    first[first == 0x7E] = 0x7D
    assert "fused members" in the_only(findings(clone.path), "NV205").message


def test_swizzled_scales_are_recognised(clone: CheckpointEditor, findings: Findings) -> None:
    scales = clone.raw(f"{DENSE}.weight_scale")
    scales[...] = layout.swizzle(torch.from_numpy(np.array(scales))).numpy().reshape(scales.shape)
    finding = the_only(findings(clone.path), "NV206")

    assert finding.tensor == f"{DENSE}.weight_scale"


def test_blocks_of_32_are_recognised(clone: CheckpointEditor, findings: Findings) -> None:
    scales = clone.raw(f"{DENSE}.weight_scale")
    larger = np.maximum(scales[:, 0::2], scales[:, 1::2])
    scales[:, 0::2] = scales[:, 1::2] = larger
    finding = the_only(findings(clone.path), "NV207")

    assert (finding.tensor, finding.count) == (f"{DENSE}.weight_scale", scales.size // 2)


def test_equal_scales_everywhere_are_no_pairs(clone: CheckpointEditor, findings: Findings) -> None:
    scales = clone.raw(f"{DENSE}.weight_scale")
    scales[...] = np.max(scales, axis=1, keepdims=True)  # rows of one magnitude: +-c

    assert "NV207" not in {finding.rule for finding in findings(clone.path)}


def test_powers_of_two_are_recognised(clone: CheckpointEditor, findings: Findings) -> None:
    scales = clone.raw(SCALES)
    scales[...] &= 0xF8
    found = findings(clone.path)

    assert {finding.rule for finding in found} == {"NV205", "NV208"}
    assert all(finding.tensor == SCALES for finding in found)


def test_the_bound_on_chance_lies_above_the_chance() -> None:
    def exact(successes: int, trials: int, probability: float) -> float:
        from math import comb

        return sum(
            comb(trials, k) * probability**k * (1 - probability) ** (trials - k)
            for k in range(successes, trials + 1)
        )

    for trials in (1, 10, 50):
        for successes in range(trials + 1):
            bound = tail_bound(successes, trials, 0.53)
            assert exact(successes, trials, 0.53) <= bound * (1 + 1e-12)
