"""Run directories: what is written is read back, and what is no run is refused with a reason."""

import json
import os
from pathlib import Path

import pytest
import torch

from nvfp4check.activations import (
    LOGITS_FILE,
    TOKENS_FILE,
    PromptInfo,
    Run,
    RunInfo,
    layer_file,
    leftovers,
    write_bytes,
    write_info,
    write_tensors,
)
from nvfp4check.findings import CheckError

FINISHED = {
    "schema": "nvfp4check/run/1",
    "complete": True,
    "prompts": [{"id": "a", "tokens": 1}],
}
PROMPTS = (PromptInfo(id="a/b", tokens=2, text="…"), PromptInfo(id="c", tokens=1))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_info(tmp_path, RunInfo(prompts=PROMPTS, complete=True, layers=(0, 3), dtype="float32"))
    write_tensors(tmp_path / TOKENS_FILE, {"a/b": torch.tensor([4, 5]), "c": torch.tensor([6])})
    write_tensors(
        layer_file(tmp_path, 2),
        {
            "a/b/router_experts": torch.tensor([[1], [0]], dtype=torch.int32),
            "a/b/hidden": torch.ones(2, 3, dtype=torch.bfloat16),
            "a/b/my_own": torch.ones(2),
        },
    )
    return tmp_path


def test_what_was_written_is_read_back(run: Path) -> None:
    opened = Run.open(run)

    assert opened.info.prompts == PROMPTS
    assert opened.info.layers == (0, 3)
    assert opened.prompts == ("a/b", "c")
    assert opened.tokens("a/b").tolist() == [4, 5]
    assert opened.layers == (2,)
    assert opened.points(2) == ("hidden", "router_experts", "my_own")
    assert torch.equal(opened.point(2, "a/b", "hidden"), torch.ones(2, 3, dtype=torch.bfloat16))
    assert not opened.has_logits
    assert not opened.has_final_hidden


def test_what_is_not_there_is_named(run: Path) -> None:
    opened = Run.open(run)

    with pytest.raises(CheckError, match=r"002\.safetensors: holds no 'c/hidden'"):
        opened.point(2, "c", "hidden")
    with pytest.raises(CheckError, match=r"logits\.safetensors"):
        opened.logits("c")


def test_a_view_into_another_tensor_is_written_as_its_own_values(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)

    write_tensors(tmp_path / LOGITS_FILE, {"a": whole.T, "b": whole[:, 1]})
    write_info(tmp_path, RunInfo(prompts=(PromptInfo(id="a", tokens=4),), complete=True))

    opened = Run.open(tmp_path)
    assert torch.equal(opened.logits("a"), whole.T)
    assert torch.equal(opened.logits("b"), whole[:, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a run"),
        ("[]", "not a run"),
        *(
            (json.dumps({**FINISHED, field: []}), f"not a run: {field} is no object")
            for field in ("checkpoint", "config", "versions")
        ),
        ('{"schema": "nvfp4check/run/9"}', "expected 'nvfp4check/run/1'"),
        ('{"schema": "nvfp4check/run/1", "prompts": []}', "no list of prompts"),
        ('{"schema": "nvfp4check/run/1", "prompts": [{"id": "a"}]}', "without id or number"),
        ('{"schema": "nvfp4check/run/1", "prompts": [7]}', "without id or number"),
        ('{"schema": "nvfp4check/run/1", "prompts": [{"id": "a", "tokens": "x"}]}', "without id"),
        (
            '{"schema": "nvfp4check/run/1", "prompts": [{"id": "a", "tokens": 1}], "layers": 5}',
            "not a run",
        ),
        ('{"schema": "nvfp4check/run/1", "prompts": [{"id": "a", "tokens": 1}]}', "not finished"),
    ],
)
def test_a_document_that_is_no_finished_run_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text(text)

    with pytest.raises(CheckError, match=message):
        Run.open(tmp_path)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"no run\.json"):
        Run.open(tmp_path)


def test_an_unfinished_run_is_opened_where_asked_for(tmp_path: Path) -> None:
    write_info(tmp_path, RunInfo(prompts=PROMPTS))

    assert not Run.open(tmp_path, incomplete=True).info.complete


def test_fields_of_a_later_version_are_left_aside(run: Path) -> None:
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**document, "moon_phase": "full"}))

    assert Run.open(run).info.prompts == PROMPTS


def test_a_broken_shard_of_a_run_is_refused(run: Path) -> None:
    layer_file(run, 2).write_bytes(b"\xff" * 100)

    with pytest.raises(CheckError, match="cannot be read as part of a run"):
        Run.open(run).points(2)


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data"
    write_bytes(file, b"before")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_bytes(file, b"after")

    assert file.read_bytes() == b"before"
    assert list(leftovers(tmp_path)) == []


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((i + 1,), i, dtype=torch.float32) for i in range(20)}

    write_tensors(tmp_path / "one", tensors)
    write_tensors(tmp_path / "two", dict(reversed(tensors.items())))

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
