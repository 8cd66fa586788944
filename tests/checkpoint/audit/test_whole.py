"""Honest conversions are accepted, with their convention; work goes on where it stopped."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvfp4check.checkpoint.audit import passes
from nvfp4check.checkpoint.audit.results import WeightAudit
from nvfp4check.checkpoint.audit.whole import _gap
from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.checkpoint.validation import ValidationOptions, ValidationResult, validate
from nvfp4check.findings import CheckError, Verdict

SMALL = "small-deepseek-v3"
_FROM_FP8 = {"bytes": 43, "dequantised": 76}
_BY_FP8 = {"bytes": 43, "by way of FP8": 76}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., ValidationResult]:
    def with_base(checkpoint: Path, base: Path, **more: Any) -> ValidationResult:
        options = ValidationOptions(base=open_checkpoint(base), journal=tmp_path / "journal.jsonl")
        return validate(open_checkpoint(checkpoint), replace(options, **more))

    return with_base


@pytest.mark.parametrize(
    ("checkpoint", "base", "convention", "made_from", "copied"),
    [
        ("nvfp4", "fp8", "modelopt-0.39", ("fp8-block", "direct"), _FROM_FP8),
        ("nvfp4", "bf16", "modelopt-0.39", ("bf16", "fp8-128x128"), _BY_FP8),
        ("ct", "small_bf16", "compressed-tensors", ("bf16", "direct"), {"bytes": 25}),
        ("fp8", "bf16", None, None, {"bytes": 43, "converted to FP8": 288}),
        ("fp8", "copied", None, None, {"bytes": 331}),
    ],
)
def test_a_real_producers_conversion_is_accepted_with_its_convention(
    golden: SimpleNamespace,
    goldens: Path,
    tmp_path: Path,
    run: Callable[..., ValidationResult],
    checkpoint: str,
    base: str,
    convention: str | None,
    made_from: tuple[str, str] | None,
    copied: dict[str, int],
) -> None:
    places = {**vars(golden), "small_bf16": goldens / SMALL / "bf16"}
    if base == "copied":
        places[base] = shutil.copytree(golden.fp8, tmp_path / "copied")
    result = run(places[checkpoint], places[base], select=("NV7", "NV801"))
    document = result.to_json()["audit"]

    assert result.findings == ()
    assert result.verdict is Verdict.PASS
    assert document["copied"] == copied
    quantized = document["quantized"]
    if convention is None:
        assert quantized["weights"] == 0
        return
    best = document["conventions"][0]
    assert (best["convention"], best["scale_bytes"], best["codes"]) == (convention, 0, 0)
    assert best["weights"] == quantized["weights"] > 0
    assert quantized["off"] == quantized["beyond"] == 0
    assert quantized["nearest_share"] > 0.99
    assert [(made["format"], made["way"]) for made in quantized["made_from"]] == [made_from]


def test_checkpoint_and_base_pass_all_rules_together(
    golden: SimpleNamespace, run: Callable[..., ValidationResult]
) -> None:
    result = run(golden.nvfp4, golden.fp8)

    assert (result.findings, result.coverage.skipped) == ((), ())
    assert {"NV701", "NV702", "NV703", "NV704", "NV705", "NV801"} <= set(result.coverage.rules)
    assert json.dumps(result.to_json())


def test_without_a_base_there_is_no_audit(golden: SimpleNamespace, tmp_path: Path) -> None:
    options = ValidationOptions(journal=tmp_path / "journal.jsonl")
    result = validate(open_checkpoint(golden.nvfp4), options)

    assert result.verdict is Verdict.PASS
    assert "audit" not in result.to_json()
    assert not [rule for rule in result.coverage.rules if rule.startswith("NV70")]


def test_a_base_at_level_headers_is_a_gap(
    golden: SimpleNamespace, run: Callable[..., ValidationResult]
) -> None:
    result = run(golden.nvfp4, golden.fp8, level=RuleLevel.HEADERS)

    assert result.verdict is Verdict.INCOMPLETE
    assert {gap.what[:5] for gap in result.coverage.skipped} == {
        "NV701", "NV702", "NV703", "NV704", "NV705",
    }  # fmt: skip


def test_a_weight_that_the_base_lacks_is_a_gap(
    golden: SimpleNamespace,
    clone_of: Callable[[Path], CheckpointEditor],
    run: Callable[..., ValidationResult],
) -> None:
    base = clone_of(golden.fp8)
    base.drop("model.norm.weight")
    result = run(golden.nvfp4, base.path, select=("NV7",))
    [gap] = result.coverage.skipped

    assert "model.norm.weight" in gap.what
    assert gap.why == "the base has no such weight"


def test_a_base_that_is_the_checkpoint_itself_is_refused(
    golden: SimpleNamespace, run: Callable[..., ValidationResult], tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(golden.nvfp4)

    for base in (golden.nvfp4, link):
        with pytest.raises(CheckError, match="the base is the checkpoint itself"):
            run(golden.nvfp4, base)


def test_what_was_not_audited_is_named_alone_or_counted() -> None:
    assert _gap("weight", ["a"]) == "audit of a"
    assert _gap("weight", ["a", "b"], part="blocks of ") == (
        "audit of blocks of 2 weights, the first a"
    )


def test_equal_copies_of_a_quantised_base_are_a_gap_and_unequal_ones_a_finding(
    golden: SimpleNamespace,
    clone_of: Callable[[Path], CheckpointEditor],
    run: Callable[..., ValidationResult],
) -> None:
    clone = clone_of(golden.nvfp4)
    same = run(clone.path, golden.nvfp4, select=("NV7",))
    [gap] = same.coverage.skipped

    assert (same.verdict, same.findings) == (Verdict.INCOMPLETE, ())
    assert "audit of 212 weights" in gap.what
    assert "the base is quantised already" in gap.why

    clone.raw("model.layers.2.mlp.experts.5.down_proj.weight")[3, 4] ^= 1
    changed = run(clone.path, golden.nvfp4, select=("NV7",))

    assert (changed.verdict, [f.rule for f in changed.findings]) == (Verdict.FAIL, ["NV704"])


def test_two_processes_find_what_one_finds(
    golden: SimpleNamespace, run: Callable[..., ValidationResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "_ITEM_BYTES", 1 << 20)
    one, two = (run(golden.nvfp4, golden.fp8, select=("NV7",), jobs=jobs) for jobs in (1, 2))

    assert one.audit is not None
    assert two.audit is not None
    assert one.audit.weights == two.audit.weights
    assert one.audit.copies == two.audit.copies


def test_an_interrupted_audit_goes_on_where_it_stopped(
    golden: SimpleNamespace,
    run: Callable[..., ValidationResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passes, "_ITEM_BYTES", 1 << 20)
    honest, done = passes.audit_weight, list[str]()

    def interrupted(reader: Any, weight: Any, *rest: Any) -> WeightAudit:
        if len(done) == 100:
            raise CheckError("the power went")
        done.append(weight.name)
        return honest(reader, weight, *rest)

    monkeypatch.setattr(passes, "audit_weight", interrupted)
    with pytest.raises(CheckError, match="the power went"):
        run(golden.nvfp4, golden.fp8, select=("NV7",))
    kept = len(done)
    done.clear()

    def counted(reader: Any, weight: Any, *rest: Any) -> WeightAudit:
        done.append(weight.name)
        return honest(reader, weight, *rest)

    monkeypatch.setattr(passes, "audit_weight", counted)
    resumed = run(golden.nvfp4, golden.fp8, select=("NV7",), resume=True)
    again = len(done)
    whole = run(golden.nvfp4, golden.fp8, select=("NV7",))

    assert again < 212 - kept // 2
    assert resumed.audit is not None
    assert whole.audit is not None
    assert resumed.audit.weights == whole.audit.weights


def test_a_journal_of_another_base_is_not_taken_over(
    golden: SimpleNamespace, run: Callable[..., ValidationResult]
) -> None:
    first = run(golden.nvfp4, golden.fp8, select=("NV7",))
    other = run(golden.nvfp4, golden.bf16, select=("NV7",), resume=True)

    assert first.audit is not None
    assert other.audit is not None
    assert {audit.way for audit in first.audit.weights.values()} == {"direct"}
    assert {audit.way for audit in other.audit.weights.values()} == {"fp8-128x128"}


def test_a_sample_audits_the_weights_that_it_reads(
    golden: SimpleNamespace, run: Callable[..., ValidationResult]
) -> None:
    result = run(golden.nvfp4, golden.fp8, sample=0.1, seed=3)

    assert result.audit is not None
    assert result.sample is not None
    assert 0 < len(result.audit.weights) == result.sample.weights_read < 212
