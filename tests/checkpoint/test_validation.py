import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvfp4check.checkpoint import byte_pass
from nvfp4check.checkpoint.byte_pass import Sample, draw, read_bytes, scannable_weights
from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.journal import Journal, default_path, fingerprint
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules import RULES, select_rules
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.checkpoint.validation import (
    ValidationOptions,
    ValidationResult,
    exit_code,
    validate,
)
from nvfp4check.engine.local import LocalEngine
from nvfp4check.findings import CheckError, Severity, Verdict

EXPERT = "model.layers.3.mlp.experts.2.down_proj"
HEADERS = ValidationOptions(level=RuleLevel.HEADERS)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Journals lie in a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def run(path: Path | CheckpointEditor, options: ValidationOptions = HEADERS) -> ValidationResult:
    directory = path.path if isinstance(path, CheckpointEditor) else path
    return validate(open_checkpoint(directory), options)


# Rules


def test_every_rule_explains_itself() -> None:
    for identifier, rule in RULES.items():
        assert identifier == rule.id
        assert rule.fires_when
        assert not rule.fires_when.endswith(".")
        assert rule.why.endswith(".")
        assert rule.repair.endswith(".")
        assert all(url.startswith("https://github.com/") for url in rule.incidents)
        assert len({*rule.incidents}) == len(rule.incidents)
    assert len({rule.name for rule in RULES.values()}) == len(RULES)
    assert list(RULES) == sorted(RULES)


@pytest.mark.parametrize(
    ("select", "ignore", "chosen"),
    [
        (["NV003"], [], {"NV003"}),
        (["NV60"], [], {"NV601", "NV602", "NV603", "NV604", "NV605", "NV606", "NV607", "NV608"}),
        (["NV60"], ["NV602", "NV604"], {"NV601", "NV603", "NV605", "NV606", "NV607", "NV608"}),
        (["NV602"], ["NV6"], {"NV602"}),
        (["NV602"], ["NV602"], set()),
    ],
)
def test_the_longer_prefix_decides(select: list[str], ignore: list[str], chosen: set[str]) -> None:
    assert {rule.id for rule in select_rules(select, ignore)} == chosen


def test_nothing_selected_is_everything_that_is_not_ignored() -> None:
    assert [rule.id for rule in select_rules()] == list(RULES)
    assert {rule.id for rule in select_rules(ignore=["NV0"])} == {
        identifier for identifier in RULES if not identifier.startswith("NV0")
    }


@pytest.mark.parametrize("prefix", ["NV999", "", "nv0", "X"])
def test_a_prefix_of_no_rule_is_bad_usage(prefix: str) -> None:
    with pytest.raises(CheckError, match="no rule begins with"):
        select_rules([prefix])
    with pytest.raises(CheckError, match="no rule begins with"):
        select_rules(ignore=[prefix])


# Verdict and exit code


def test_a_sound_checkpoint_passes_at_every_level(golden: SimpleNamespace) -> None:
    for which in ("bf16", "fp8", "nvfp4"):
        result = run(getattr(golden, which), ValidationOptions())
        assert [f for f in result.findings if f.severity is Severity.ERROR] == []
        assert result.verdict is Verdict.PASS
        assert exit_code(result) == 0


def test_an_error_fails_and_a_warning_does_not_unless_told(
    golden: SimpleNamespace, clone: CheckpointEditor
) -> None:
    assert exit_code(run(golden.nvfp4_raw)) == 1
    clone.write_file("extra.bin", b"")
    warned = run(clone)
    assert [f.rule for f in warned.findings] == ["NV009"]
    assert (warned.verdict, exit_code(warned)) == (Verdict.PASS, 0)
    assert exit_code(warned, Severity.WARNING) == 1
    strict = run(clone, replace(HEADERS, fail_on=Severity.WARNING))
    assert strict.verdict is Verdict.FAIL


def test_an_info_never_fails(clone: CheckpointEditor) -> None:
    result = run(clone, replace(HEADERS, tp=8, fail_on=Severity.WARNING))
    assert {f.severity for f in result.findings} == {Severity.INFO}
    assert result.verdict is Verdict.PASS


def test_a_gap_makes_a_run_incomplete_and_is_forgiven_when_told(clone: CheckpointEditor) -> None:
    with clone.edit_json("config.json") as config:
        config["architectures"] = ["SomebodysForCausalLM"]
    result = run(clone)
    assert result.verdict is Verdict.INCOMPLETE
    assert exit_code(result) == 2
    assert exit_code(result, allow_skips=True) == 0
    assert exit_code(result, Severity.WARNING, allow_skips=True) == 1  # NV606 is a warning


def test_what_nobody_asked_for_is_no_gap(clone: CheckpointEditor) -> None:
    with clone.edit_json("config.json") as config:
        config["architectures"] = ["SomebodysForCausalLM"]
    result = run(clone, replace(HEADERS, select=("NV0", "NV601")))
    assert result.coverage.skipped == ()
    assert exit_code(result) == 0


def test_a_rule_that_is_asked_for_and_cannot_run_is_a_gap(golden: SimpleNamespace) -> None:
    result = run(golden.nvfp4, replace(HEADERS, select=("NV1",)))
    [gap] = result.coverage.skipped
    assert gap.what.startswith("NV110")
    assert result.verdict is Verdict.INCOMPLETE
    assert run(golden.nvfp4, replace(HEADERS, select=("NV1",), tp=2)).verdict is Verdict.PASS


@pytest.mark.parametrize(
    "wrong", [{"sample": 0.0}, {"sample": 1.5}, {"sample": math.nan}, {"tp": 0}, {"device": "cuda"}]
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckError):
        ValidationOptions(**wrong)


# The document


def test_the_document_has_the_form_of_the_contract(golden: SimpleNamespace) -> None:
    document = run(golden.nvfp4_raw).to_json()
    text = json.dumps(document, allow_nan=False)
    assert json.loads(text) == document
    assert document["schema"] == "nvfp4check/validate/1"
    assert document["tool"].keys() == {"name", "version"}
    assert document["checkpoint"] == {
        "location": str(golden.nvfp4_raw),
        "producer": "modelopt 0.39.0",
        "architecture": "DeepseekV3ForCausalLM",
        "formats": {"bf16": 114, "f32": 5, "nvfp4": 212},
        "bytes": 7245664,
    }
    assert document["verdict"] == "fail"
    keys = {"rule", "name", "severity", "tensor", "shard", "offset", "count", "message"}
    keys |= {"observed", "expected"}
    assert all(finding.keys() == keys for finding in document["findings"])
    coverage = document["coverage"]
    assert {"tensors", "tensors_checked", "bytes_checked", "rules", "skipped"} <= coverage.keys()
    assert coverage["tensors"] == coverage["tensors_checked"] == 967
    assert coverage["bytes_checked"] == 0


def test_findings_are_sorted_and_the_same_from_run_to_run(golden: SimpleNamespace) -> None:
    first, second = run(golden.nvfp4_raw), run(golden.nvfp4_raw)
    assert first.findings == second.findings
    keys = [(f.severity.rank, f.rule, f.tensor or "") for f in first.findings]
    assert keys == sorted(keys)
    assert Counter(f.rule for f in first.findings) == {"NV602": 1, "NV004": 636}


def test_what_json_has_no_number_for_is_spelt(clone: CheckpointEditor) -> None:
    for part, value in (("weight_scale_2", math.nan), ("input_scale", math.inf)):
        clone.set_scalar(f"{EXPERT}.{part}", value)
    document = run(clone, ValidationOptions()).to_json()
    observed = {finding["rule"]: finding["observed"] for finding in document["findings"]}
    assert observed["NV301"] == "nan"
    assert observed["NV304"] == "inf"
    json.dumps(document, allow_nan=False)


def test_progress_is_told_to_the_end(golden: SimpleNamespace) -> None:
    heard: list[tuple[str, int, int]] = []
    validate(open_checkpoint(golden.nvfp4), HEADERS, lambda *step: heard.append(step))
    assert heard[-1][0] == "rules"
    assert heard[-1][1] == heard[-1][2]


# The byte pass


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_weight_is_read_whatever_the_jobs(golden: SimpleNamespace, jobs: int) -> None:
    checkpoint = open_checkpoint(golden.nvfp4)
    weights, hindered = scannable_weights(checkpoint)
    assert (len(weights), hindered) == (212, {})
    heard: list[tuple[int, int]] = []
    scans = read_bytes(
        checkpoint, weights, LocalEngine(jobs), progress=lambda *step: heard.append(step)
    )
    assert list(scans) == [weight.name for weight in weights]
    total = sum(weight.nbytes for weight in weights)
    assert heard[0] == (0, total)
    assert heard[-1] == (total, total)


def test_a_weight_that_cannot_be_read_is_a_gap(clone: CheckpointEditor) -> None:
    clone.drop(f"{EXPERT}.weight_scale")
    weights, hindered = scannable_weights(open_checkpoint(clone.path))
    assert len(weights) == 211
    assert list(hindered) == [f"{EXPERT}.weight"]


def test_a_sample_draws_whole_groups_and_the_same_for_a_seed(golden: SimpleNamespace) -> None:
    weights, _ = scannable_weights(open_checkpoint(golden.nvfp4))
    drawn, sample = draw(weights, 0.2, seed=7)
    again, _ = draw(weights, 0.2, seed=7)
    assert drawn == again
    assert drawn != draw(weights, 0.2, seed=8)[0]
    groups = Counter(weight.module.rpartition(".")[0] for weight in weights)
    taken = Counter(weight.module.rpartition(".")[0] for weight in drawn)
    assert all(taken[group] == groups[group] for group in taken)
    assert sample.groups == len(groups)
    assert sample.groups_read == len(taken) == math.ceil(0.2 * len(groups))


@pytest.mark.parametrize("defective", range(1, 7))
@pytest.mark.parametrize("read", range(1, 7))
def test_the_probability_of_a_miss_is_that_of_counting_all_draws(read: int, defective: int) -> None:
    sample = Sample(
        fraction=read / 6, seed=0, groups=6, groups_read=read, weights=6, weights_read=read
    )
    draws = [*combinations(range(6), read)]
    missed = sum(all(group >= defective for group in taken) for taken in draws)
    # Six divisions, their products and the one on the right each round by 2**-53 at most.
    assert sample.missed(defective) == pytest.approx(missed / len(draws), rel=13 * 2**-53, abs=0)


# The journal


def journal_of(path: Path, subject: str = "x", resume: bool = True) -> Journal:
    return Journal(path, subject, resume=resume)


def test_a_journal_gives_back_what_was_finished(tmp_path: Path) -> None:
    path = tmp_path / "a" / "journal.jsonl"
    with journal_of(path) as journal:
        journal.add("one", {"n": 1})
        journal.add_all({"two": [2], "three": None})
    with journal_of(path) as journal:
        assert journal.results == {"one": {"n": 1}, "two": [2], "three": None}


@pytest.mark.parametrize("cut", range(1, 28))
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    with journal_of(path) as journal:
        journal.add("one", 1)
        journal.add("two", "twenty-two")
    assert len('{"key":"two","result":"twenty-two"}\n') > 28
    os.truncate(path, path.stat().st_size - cut)
    with journal_of(path) as journal:
        assert journal.results == {"one": 1}
        journal.add("three", 3)
    with journal_of(path) as journal:
        assert journal.results == {"one": 1, "three": 3}


def test_a_journal_of_other_files_or_of_no_resumption_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for subject, resume in (("y", True), ("x", False)):
        with journal_of(path) as journal:
            journal.add("one", 1)
        with journal_of(path, subject, resume) as journal:
            assert journal.results == {}


def test_two_runs_do_not_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with journal_of(path), pytest.raises(CheckError, match="another run"):
        journal_of(path)


def test_a_changed_shard_has_another_fingerprint(clone: CheckpointEditor) -> None:
    before = fingerprint(open_checkpoint(clone.path))
    assert fingerprint(open_checkpoint(clone.path)) == before
    shard = clone.path / clone.shards[0]
    os.utime(shard, ns=(1, 1))
    assert fingerprint(open_checkpoint(clone.path)) != before


_KILLED = """
import os, signal, sys
from nvfp4check.checkpoint import byte_pass
from nvfp4check.checkpoint.journal import Journal, default_path, fingerprint
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.engine.local import LocalEngine

byte_pass._ITEM_BYTES = 1 << 16
checkpoint = open_checkpoint(sys.argv[1])
weights, _ = byte_pass.scannable_weights(checkpoint)
def progress(done, total):
    if done > total / 3:
        os.kill(os.getpid(), signal.SIGKILL)
with Journal(default_path(checkpoint), fingerprint(checkpoint), resume=False) as journal:
    byte_pass.read_bytes(checkpoint, weights, LocalEngine(1), journal, progress)
"""


def test_a_run_that_was_killed_goes_on_where_it_stopped(
    golden: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", _KILLED, str(golden.nvfp4)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(command, env=environment, check=False, timeout=600)
    assert killed.returncode == -signal.SIGKILL
    checkpoint = open_checkpoint(golden.nvfp4)
    weights, _ = scannable_weights(checkpoint)
    whole = read_bytes(checkpoint, weights, LocalEngine())
    read: list[str] = []

    def recording(*arguments: Any) -> Any:
        read.append(arguments[1].name)
        return whole[arguments[1].name]

    monkeypatch.setattr(byte_pass, "scan", recording)
    path = default_path(checkpoint)
    with Journal(path, fingerprint(checkpoint), resume=True) as journal:
        finished = {*journal.results}
        scans = read_bytes(checkpoint, weights, LocalEngine(), journal)
    assert 0 < len(finished) < len(weights)
    assert {*read} == {weight.name for weight in weights} - finished
    assert scans == whole


@pytest.fixture
def unwritable(cache: Path) -> Path:
    """A cache where no folder can be made: a file stands in its place."""
    (cache / "nvfp4check").write_text("")
    return cache / "nvfp4check"


def test_who_does_not_resume_needs_no_journal(golden: SimpleNamespace, unwritable: Path) -> None:
    assert run(golden.nvfp4, ValidationOptions()).verdict is Verdict.PASS
    with pytest.raises(CheckError, match="journal"):
        run(golden.nvfp4, ValidationOptions(resume=True))


# Bad input


@pytest.mark.parametrize(
    "config",
    [
        '{"architectures": ["DeepseekV3ForCausalLM"]}',
        '{"architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 1e999}',
        '{"architectures": {"a": 1}, "text_config": 3, "quantization_config": [1]}',
        '{"architectures": ["\\u001b[2J\\n"], "quantization_config": {"quant_method": 7}}',
        '{"quantization_config": {"quant_method": "modelopt", "ignore": 3, "config_groups": []}}',
        '{"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", '
        '"group_size": -1e999}}',
        '{"architectures": [null], "vocab_size": "many", "num_nextn_predict_layers": -1}',
    ],
)
def test_a_config_of_any_form_is_judged_and_never_crashes(
    clone: CheckpointEditor, config: str
) -> None:
    clone.write_file("config.json", config)
    for options in (HEADERS, replace(HEADERS, tp=8)):
        result = run(clone, options)
        assert exit_code(result) in (1, 2)
        assert all(finding.message.isprintable() for finding in result.findings)
        json.dumps(result.to_json(), allow_nan=False)
