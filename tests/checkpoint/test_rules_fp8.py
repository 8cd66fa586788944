"""NV801: what may be wrong with the scales of DeepSeek's FP8, in a checkpoint and in a base."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.checkpoint.validation import ValidationOptions, ValidationResult, validate
from nvfp4check.findings import Severity

WEIGHT = "model.layers.2.mlp.experts.5.down_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"

CloneOf = Callable[[Path], CheckpointEditor]


@pytest.fixture
def clone(golden: SimpleNamespace, clone_of: CloneOf) -> CheckpointEditor:
    return clone_of(golden.fp8)


def run(path: Path, level: RuleLevel = RuleLevel.BYTES) -> ValidationResult:
    return validate(open_checkpoint(path), ValidationOptions(level=level))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_sound_scales_give_no_finding(golden: SimpleNamespace) -> None:
    result = run(golden.fp8)

    assert result.findings == ()
    assert "NV801" in result.coverage.rules


def test_a_missing_scale_is_one_defect(clone: CheckpointEditor) -> None:
    clone.drop(SCALE)
    [finding] = run(clone.path, RuleLevel.HEADERS).findings

    assert (finding.rule, finding.severity) == ("NV801", Severity.ERROR)
    assert (finding.tensor, finding.expected) == (WEIGHT, SCALE)


def test_a_missing_scale_that_the_index_names_is_not_found_twice(clone: CheckpointEditor) -> None:
    clone.drop(SCALE, index=False)

    assert {f.rule for f in run(clone.path, RuleLevel.HEADERS).findings} == {"NV003"}


def test_scales_of_another_shape_are_found(clone: CheckpointEditor) -> None:
    rows, columns = clone.entry(SCALE).shape
    assert rows != columns
    clone.reshape(SCALE, (columns, rows))
    found = [f for f in run(clone.path, RuleLevel.HEADERS).findings if f.rule == "NV801"]

    assert [(f.tensor, f.observed, f.expected) for f in found] == [
        (SCALE, [columns, rows], [rows, columns])
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "is zero"),
        (-0.0, "is zero"),
        (float("nan"), "is not finite"),
        (float("inf"), "is not finite"),
        (-1.0, "is negative"),
    ],
)
def test_scales_that_no_weight_can_have_are_found(
    clone: CheckpointEditor, value: float, said: str
) -> None:
    clone.array(SCALE, "<f4").reshape(-1)[1] = value
    [finding] = run(clone.path).findings

    assert (finding.rule, finding.tensor, finding.count) == ("NV801", SCALE, 1)
    assert said in finding.message
    assert finding.offset == clone.entry(SCALE).start + 4


@pytest.mark.parametrize(
    ("dtype", "sound", "bad", "said"),
    [
        ("BF16", b"\x80\x3f", b"\x80\x7f", "is not finite"),
        ("BF16", b"\x80\x3f", b"\x00\x00", "is zero"),
        ("F8_E8M0", b"\x7f", b"\xff", "is not finite"),
    ],
)
def test_scales_of_other_dtypes_are_read_too(
    clone: CheckpointEditor, dtype: str, sound: bytes, bad: bytes, said: str
) -> None:
    entry = clone.entry(SCALE)
    for second, rules in ((sound, set()), (bad, {"NV801"})):
        clone.drop(SCALE)
        clone.add(
            SCALE,
            sound + second + sound * (entry.numel - 2),
            dtype=dtype,
            shape=entry.shape,
            shard=entry.shard,
        )
        findings = [f for f in run(clone.path).findings if f.rule == "NV801"]

        assert {finding.rule for finding in findings} == rules
    assert said in findings[0].message
    assert findings[0].offset == clone.entry(SCALE).start + len(sound)


def test_values_are_not_read_at_level_headers(clone: CheckpointEditor) -> None:
    clone.array(SCALE, "<f4").reshape(-1)[1] = 0.0

    assert run(clone.path, RuleLevel.HEADERS).findings == ()


def test_ue8m0_demands_powers_of_two(clone: CheckpointEditor) -> None:
    with clone.edit_json("config.json") as config:
        config["quantization_config"]["scale_fmt"] = "ue8m0"
    names = [name for name in clone.entries() if name.endswith("_scale_inv")]
    for name in names:
        scales = clone.array(name, "<f4")
        scales[...] = np.exp2(np.ceil(np.log2(scales)))
    assert run(clone.path).findings == ()
    clone.array(SCALE, "<f4").reshape(-1)[0] *= 1.5
    [finding] = run(clone.path).findings

    assert (finding.rule, finding.tensor, finding.count) == ("NV801", SCALE, 1)
    assert "no power of two" in finding.message


def test_the_base_is_checked_as_well(golden: SimpleNamespace, clone: CheckpointEditor) -> None:
    clone.drop(SCALE)
    options = ValidationOptions(base=open_checkpoint(clone.path), select=("NV801",))
    [finding] = validate(open_checkpoint(golden.nvfp4), options).findings

    assert finding.message.startswith("in the base: ")
    assert finding.tensor == WEIGHT
