"""NV001 to NV010: each fires on its planted fault, alone, and names the place."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules.base import RuleLevel, printable
from nvfp4check.checkpoint.validation import ValidationOptions, ValidationResult, validate
from nvfp4check.findings import CheckError, Finding, Severity, Verdict

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"
EXPERT = "model.layers.3.mlp.experts.2.down_proj"
NORM = "model.norm.weight"


def run(path: Path | CheckpointEditor) -> ValidationResult:
    directory = path.path if isinstance(path, CheckpointEditor) else path
    return validate(open_checkpoint(directory), ValidationOptions(level=RuleLevel.HEADERS))


def only(path: Path | CheckpointEditor, rule: str) -> list[Finding]:
    """Give the findings of a checkpoint, and see that no other rule has any."""
    result = run(path)
    assert {finding.rule for finding in result.findings} == {rule}
    return list(result.findings)


@pytest.mark.parametrize("which", ["bf16", "fp8", "nvfp4"])
def test_a_sound_checkpoint_passes_without_a_finding(golden: SimpleNamespace, which: str) -> None:
    result = run(getattr(golden, which))
    assert result.findings == ()
    assert result.coverage.skipped == ()
    assert result.verdict is Verdict.PASS


def test_nv001_names_the_truncated_shard_and_blames_nothing_else(clone: CheckpointEditor) -> None:
    clone.truncate(SECOND, -1)
    [finding] = only(clone, "NV001")
    assert (finding.shard, finding.severity) == (SECOND, Severity.ERROR)
    assert "truncated" in finding.message


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ((1 << 62).to_bytes(8, "little"), "header length"),
        (b"\x04\0\0\0\0\0\0\0[1]\n", "header begins with"),
        (b"\x02\0\0\0\0\0\0\0{}", "belong to no tensor"),
        (b"", "expected at least the 8"),
        (b"\x0f\0\0\0\0\0\0\0" + b'{"x":NaN,"y":1}', "NaN"),
    ],
    ids=["header of 2^62 bytes", "not an object", "data of no tensor", "empty", "NaN"],
)
def test_nv001_says_what_is_wrong_with_a_header(
    clone: CheckpointEditor, header: bytes, said: str
) -> None:
    clone.write_file(FIRST, header + (b"\0" * 16 if header else b""))
    [finding] = only(clone, "NV001")
    assert finding.shard == FIRST
    assert said in finding.message


def test_nv001_sees_two_tensors_in_the_same_bytes(clone: CheckpointEditor) -> None:
    first, second = (f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1))
    shard = clone.entry(first).shard
    with clone.edit_header(shard) as header:
        header[second]["data_offsets"] = header[first]["data_offsets"]
    [finding] = only(clone, "NV001")
    assert finding.shard == shard
    assert "overlap" in finding.message


def test_nv001_sees_bytes_that_no_tensor_claims(clone: CheckpointEditor) -> None:
    first = "model.layers.0.input_layernorm.weight"
    shard = clone.entry(first).shard
    with clone.edit_header(shard) as header:
        del header[first]
    [finding] = only(clone, "NV001")
    assert finding.shard == shard
    assert "hole" in finding.message


def test_nv002_names_the_missing_shard_and_counts_its_tensors(clone: CheckpointEditor) -> None:
    held = len(clone.header(SECOND).entries)
    clone.drop_file(SECOND)
    [finding] = only(clone, "NV002")
    assert (finding.shard, finding.count) == (SECOND, held)


def test_a_lost_shard_behind_an_incomplete_index_leaves_gaps_that_are_told(
    clone: CheckpointEditor,
) -> None:
    with clone.edit_json(INDEX) as index:
        index["weight_map"] = {
            name: shard
            for name, shard in index["weight_map"].items()
            if not name.endswith(("_scale", "_scale_2"))
        }
    clone.truncate(SECOND, -1)
    result = run(clone)
    assert {f.rule for f in result.findings if f.severity is Severity.ERROR} == {"NV001"}
    assert {f.rule for f in result.findings} == {"NV001", "NV004"}
    assert "NV007 total_size of the index" in {gap.what for gap in result.coverage.skipped}


def test_nv003_names_the_tensor_that_its_shard_lacks(clone: CheckpointEditor) -> None:
    clone.drop(f"{EXPERT}.weight_scale", index=False)
    [finding] = only(clone, "NV003")
    assert finding.tensor == f"{EXPERT}.weight_scale"
    assert finding.shard in (FIRST, SECOND)
    assert "no shard does" in finding.message


def test_nv003_says_which_shard_holds_the_tensor_instead(clone: CheckpointEditor) -> None:
    shard = clone.entry(NORM).shard
    with clone.edit_json(INDEX) as index:
        index["weight_map"][NORM] = FIRST if shard == SECOND else SECOND
    [finding] = only(clone, "NV003")
    assert (finding.tensor, finding.observed) == (NORM, shard)


def test_nv004_names_every_scale_that_the_deepseek_script_leaves_out(
    golden: SimpleNamespace,
) -> None:
    result = run(golden.nvfp4_raw)
    missing = {finding.tensor for finding in result.findings if finding.rule == "NV004"}
    scales = ("weight_scale", "weight_scale_2", "input_scale")
    held = open_checkpoint(golden.nvfp4_raw).tensors
    assert missing == {name for name in held if name.rpartition(".")[2] in scales}
    assert len(missing) == 636
    assert {f.rule for f in result.findings if f.severity is Severity.ERROR} == {"NV602"}


def test_nv004_is_a_warning_at_the_tensors_place(clone: CheckpointEditor) -> None:
    with clone.edit_json(INDEX) as index:
        del index["weight_map"][f"{EXPERT}.input_scale"]
    [finding] = only(clone, "NV004")
    entry = clone.entry(f"{EXPERT}.input_scale")
    assert finding.severity is Severity.WARNING
    assert (finding.tensor, finding.shard, finding.offset) == (entry.name, entry.shard, entry.start)


def test_nv005_names_both_shards_and_the_one_the_index_chooses(clone: CheckpointEditor) -> None:
    shard = clone.entry(NORM).shard
    other = FIRST if shard == SECOND else SECOND
    clone.copy(NORM, other)
    with clone.edit_json(INDEX) as index:
        index["metadata"]["total_size"] += clone.entry(NORM).nbytes
    [finding] = only(clone, "NV005")
    assert (finding.tensor, finding.shard, finding.expected) == (NORM, shard, shard)
    assert finding.observed == [FIRST, SECOND]


def test_nv006_names_the_stray_shard_and_leaves_its_tensors_alone(clone: CheckpointEditor) -> None:
    document = {"x._amax": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    raw = json.dumps(document).encode()
    clone.write_file("old.safetensors", len(raw).to_bytes(8, "little") + raw + b"\0" * 4)
    [finding] = only(clone, "NV006")
    assert (finding.shard, finding.severity) == ("old.safetensors", Severity.WARNING)
    assert "1 tensor)" in finding.message


def test_nv006_tells_of_shards_without_an_index(clone: CheckpointEditor) -> None:
    clone.drop_file(INDEX)
    [finding] = only(clone, "NV006")
    assert finding.count == 2


def test_nv007_tells_both_sums(clone: CheckpointEditor) -> None:
    with clone.edit_json(INDEX) as index:
        right = index["metadata"]["total_size"]
        index["metadata"]["total_size"] = right + 2
    [finding] = only(clone, "NV007")
    assert (finding.observed, finding.expected) == (right + 2, right)


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", "a/../../b", "C:x"])
def test_nv008_opens_nothing_that_leads_out(clone: CheckpointEditor, place: str) -> None:
    with clone.edit_json(INDEX) as index:
        index["weight_map"]["far.away"] = place
    [finding] = only(clone, "NV008")
    assert finding.shard == place
    assert "not opened" in finding.message


def test_nv008_names_a_link_that_leads_out(clone: CheckpointEditor, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    (clone.path / "notes.txt").symlink_to(outside)
    [finding] = only(clone, "NV008")
    assert finding.shard == "notes.txt"


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt", ".PT"])
def test_nv009_names_each_kind_of_pickle(clone: CheckpointEditor, suffix: str) -> None:
    clone.write_file(f"extra{suffix}", b"\x80\x04N.")
    [finding] = only(clone, "NV009")
    assert (finding.shard, finding.severity) == (f"extra{suffix}", Severity.WARNING)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '{"a":' * 2000, "\udcff"])
def test_nv010_names_an_index_that_is_no_json(clone: CheckpointEditor, content: str) -> None:
    clone.write_file(INDEX, content.encode("utf-8", "surrogateescape"))
    [finding] = only(clone, "NV010")
    assert finding.shard == INDEX


def test_nv010_names_a_nan_in_a_config(clone: CheckpointEditor) -> None:
    with clone.edit_json("config.json") as config:
        config["rope_theta"] = float("nan")
    [finding] = only(clone, "NV010")
    assert finding.shard == "config.json"
    assert "NaN" in finding.message


def test_nv010_names_a_weight_map_of_the_wrong_type(clone: CheckpointEditor) -> None:
    with clone.edit_json(INDEX) as index:
        index["weight_map"] = ["a", "b"]
    [finding] = only(clone, "NV010")
    assert "weight_map" in finding.message


def test_an_empty_directory_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="empty"):
        open_checkpoint(tmp_path)


def test_control_characters_of_names_reach_no_terminal(clone: CheckpointEditor) -> None:
    hostile = "evil\x1b[2J\nNV999\u202e.weight"
    with clone.edit_json(INDEX) as index:
        index["weight_map"]["nobody"] = f"{hostile}.safetensors"
    [finding] = only(clone, "NV002")
    assert finding.message.isprintable()
    assert "\\x1b[2J\\x0aNV999\\u202e" in finding.message


def test_printable_keeps_what_can_be_shown_and_cuts_what_is_long() -> None:
    assert printable("модель-模型 {}\\") == "модель-模型 {}\\"
    assert printable("\ud800\x7f\x85") == "\\ud800\\x7f\\x85"
    assert len(printable("x" * 1000)) == 200
