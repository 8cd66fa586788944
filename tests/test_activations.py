"""Run directories: what is written is read back, and what is no run is refused with a reason."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4check.activations import (
    LOGITS_FILE,
    TOKENS_FILE,
    PromptInfo,
    Run,
    RunInfo,
    bounds_file,
    layer_file,
    leftovers,
    write_bytes,
    write_info,
    write_tensors,
)
from nvfp4check.findings import CheckError

FINISHED: dict[str, Any] = {
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

    write_tensors(tmp_path / LOGITS_FILE, {"a": whole.T, "b": whole[:, 1:2]})
    write_info(tmp_path, RunInfo(prompts=(PromptInfo(id="a", tokens=4),), complete=True))

    opened = Run.open(tmp_path)
    assert torch.equal(opened.logits("a"), whole.T)
    assert torch.equal(opened.logits("b"), whole[:, 1:2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a run"),
        ("[]", "not a run: no JSON object"),
        ("[" * 100_000, "not a run: maximum recursion depth"),
        *(
            (json.dumps({**FINISHED, field: []}), f"not a run: {field} is no object")
            for field in ("checkpoint", "config", "versions")
        ),
        *(
            (json.dumps({**FINISHED, **wrong}), f"not a run: {message}")
            for wrong, message in (
                ({"prompts": FINISHED["prompts"] * 2}, "a prompt id occurs twice"),
                ({"prompts": [{"id": "a", "tokens": 1, "text": 5}]}, "the text of a prompt"),
                ({"dtype": ["float32"]}, "dtype is no text"),
                ({"bounds": "float32"}, "bounds is no list"),
                ({"bounds": [["float32"]]}, "bounds is no list"),
                ({"inputs": [1]}, "inputs is no object"),
                ({"mtp": "1"}, "mtp is no number"),
                ({"seed": "x"}, "seed is no whole number"),
                ({"complete": "no"}, "complete is neither"),
                ({"layers": [1, 2, 3]}, "layers .1, 2, 3., expected the first and"),
                ({"layers": "ab"}, "layers 'ab', expected"),
                ({"prompts": [{"id": "a", "tokens": -5}]}, "a prompt has fewer than 0 tokens"),
                ({"prompts": [{"id": "a", "tokens": float("inf")}]}, ".*without id or number"),
            )
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


@pytest.mark.parametrize(
    ("point", "rows", "message"),
    [
        ("hidden", torch.ones(2), r"'a/b/hidden' is float32 \[2\], expected real numbers in 2"),
        ("hidden", torch.ones(2, 3, dtype=torch.int32), "is int32"),
        ("hidden", torch.ones(2, 3, dtype=torch.complex64), "is complex64"),
        ("router_experts", torch.ones(2, 1), "expected whole numbers"),
        ("router_experts", torch.tensor([[0], [-1]]), "holds expert -1, expected 0 to 3"),
        ("router_experts", torch.tensor([[4], [0]]), "holds expert 4, expected 0 to 3"),
    ],
)
def test_a_point_that_cannot_be_one_is_refused(
    point: str, rows: torch.Tensor, message: str, run: Path
) -> None:
    scores = {"a/b/router_scores": torch.ones(2, 4)}
    write_tensors(layer_file(run, 2), {**scores, f"a/b/{point}": rows})

    with pytest.raises(CheckError, match=message):
        Run.open(run).point(2, "a/b", point)


def test_an_expert_that_run_json_has_not_is_refused(run: Path) -> None:
    info = RunInfo(prompts=PROMPTS, complete=True, config={"n_routed_experts": 1})
    write_info(run, info)

    with pytest.raises(CheckError, match="holds expert 1, expected 0 to 0"):
        Run.open(run).point(2, "a/b", "router_experts")


@pytest.mark.parametrize(
    "tokens", [torch.ones(2), torch.ones(1, 2, dtype=torch.int64), torch.tensor([True, False])]
)
def test_tokens_that_are_no_numbers_in_a_row_are_refused(tokens: torch.Tensor, run: Path) -> None:
    write_tensors(run / TOKENS_FILE, {"a/b": tokens})

    with pytest.raises(CheckError, match="expected whole numbers in 1 dimension"):
        Run.open(run).tokens("a/b")


@pytest.mark.parametrize(
    ("values", "tokens", "total"),
    [((2, 0), (2, 0), (2,)), ((2, 3), (2, 2), (2,)), ((2, 3),) * 2 + ((1,),)],
)
def test_best_logits_whose_parts_do_not_fit_are_refused(
    values: tuple[int, ...], tokens: tuple[int, ...], total: tuple[int, ...], run: Path
) -> None:
    parts = {
        "a/b/values": torch.zeros(values),
        "a/b/tokens": torch.zeros(tokens, dtype=torch.int32),
        "a/b/logsumexp": torch.zeros(total),
    }
    write_tensors(run / LOGITS_FILE, parts)

    with pytest.raises(CheckError, match=r"expected \[T, N\], \[T, N\] and \[T\]"):
        Run.open(run).top_logits("a/b")


@pytest.mark.parametrize("wrong", [[float("nan"), 1.0], [-1.0, 1.0], [1.0]])
def test_a_bound_that_nothing_could_exceed_is_refused(wrong: list[float], run: Path) -> None:
    bound = {"a/b/hidden/float32": torch.tensor(wrong, dtype=torch.float64)}
    write_tensors(bounds_file(run, 0), bound)

    with pytest.raises(CheckError, match="expected a number from 0 on for each of 2 tokens"):
        Run.open(run).bound(0, "a/b", "hidden", "float32")


@pytest.mark.parametrize("name", ["run.json", "tokens.safetensors", "logits.safetensors", "layers"])
@pytest.mark.parametrize("kind", ["circle", "pipe"])
def test_a_part_that_is_a_circle_of_links_or_a_pipe_is_refused(
    name: str, kind: str, run: Path
) -> None:
    file = run / name
    if file.is_dir():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    if kind == "circle":
        file.symlink_to(file)
    else:
        os.mkfifo(file)

    with pytest.raises(CheckError, match=f"{name}: is no (file|folder) and leads to none"):
        Run.open(run)


def test_a_folder_in_the_place_of_a_layer_is_refused(run: Path) -> None:
    layer_file(run, 1).mkdir()

    with pytest.raises(CheckError, match=r"001\.safetensors: cannot be read as part of a run"):
        Run.open(run).points(1)


def test_a_layer_beyond_any_model_s_is_refused_and_none_before_it_is_looked_for(run: Path) -> None:
    layer_file(run, 2).rename(run / "layers" / f"{10**20}.safetensors")

    with pytest.raises(CheckError, match="holds a layer 100000000000000000000, expected numbers"):
        _ = Run.open(run).layers


def test_tokens_are_as_many_as_run_json_says(run: Path) -> None:
    document = json.loads((run / "run.json").read_text())
    document["prompts"][0]["tokens"] = 2**40
    (run / "run.json").write_text(json.dumps(document))

    with pytest.raises(
        CheckError, match=r"holds 2 tokens of prompt 'a/b', and run\.json says 1,09"
    ):
        Run.open(run).tokens("a/b")


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
