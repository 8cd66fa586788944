"""What the gate of a release tells its reader: what to give, where the page is, what was redone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvfp4check.cli.main import main
from nvfp4check.release import ReleaseOptions, begin

Run = Callable[..., Any]

TINY = Path(__file__).parents[2] / "goldens/tiny-deepseek-v3"
STEPS = ["validate", "forward-base", "noise-1", "noise-2", "forward-candidate", "agree"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a copy of the tiny NVFP4 model that a test may change."""
    return shutil.copytree(TINY / "nvfp4", tmp_path / "nvfp4")


@pytest.fixture
def gate(run: Run, tmp_path: Path, model: Path) -> Run:
    """Return a function that runs the gate of the tiny NVFP4 model in `gate`."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "tokens": [0, 17, 4, 300]}\n{"id": "b", "tokens": [0, 5]}\n')

    def pass_through(*more: str) -> Any:
        return run(
            *("release", str(model), "--base", str(TINY / "fp8")),
            *("--prompts", str(prompts), "--out", str(tmp_path / "gate"), *more),
        )

    return pass_through


def test_a_gate_without_limits_is_undecided_and_says_what_to_give(
    gate: Run, tmp_path: Path
) -> None:
    ended = gate()

    page = (tmp_path / "gate/report.html").read_text(encoding="utf-8")
    state = json.loads((tmp_path / "gate/release.json").read_text(encoding="utf-8"))
    assert ended.code == 3
    assert "not judged: give --max-kl or --min-top1" in ended.out
    assert f"one page: {tmp_path / 'gate/report.html'}" in ended.out
    assert [step["name"] for step in state["steps"]] == STEPS
    assert [step["code"] for step in state["steps"]] == [0, 0, 0, 0, 0, 3]
    assert page.count('<section class="result"') == 1 + len(STEPS)
    assert "not judged: give --max-kl or --min-top1" in page


def test_a_gate_goes_on_where_it_stands_and_judges_anew_what_has_other_limits(
    gate: Run, keeps_to_schema: Callable[[dict[str, Any]], None]
) -> None:
    gate()
    again = gate("--resume")
    judged = gate("--resume", "--max-kl", "0", "--format", "json")

    document = json.loads(judged.out)
    assert again.code == 3
    assert again.err == ""
    assert judged.code == 1
    assert "nvfp4check release: agree" in judged.err
    assert "nvfp4check release: validate" not in judged.err
    keeps_to_schema(document)
    assert document["schema"] == "nvfp4check/release/1"
    assert document["verdict"] == "fail"
    assert document["page"].endswith("report.html")


def test_a_gate_that_was_cut_off_says_that_it_is_incomplete(gate: Run, tmp_path: Path) -> None:
    gate("--max-kl", "5")
    state_file = tmp_path / "gate/release.json"
    state = json.loads(state_file.read_text(encoding="utf-8"))
    state["steps"] = state["steps"][:3]
    state_file.write_text(json.dumps(state), encoding="utf-8")
    options = ReleaseOptions(
        checkpoint=state["checkpoint"],
        base=state["base"],
        out=tmp_path / "gate",
        prompts=tmp_path / "prompts.jsonl",
        max_kl=5.0,
    )

    left = begin(options, resume=True).document()

    assert left["verdict"] == "incomplete"
    assert [step["verdict"] for step in left["steps"]] == ["pass"] * 3 + ["not run"] * 3
    again = gate("--max-kl", "5", "--resume")
    assert again.code == 0
    done = [line.rpartition(" ")[2] for line in again.err.splitlines()]
    assert done == ["noise-2", "forward-candidate", "agree"]


def test_what_was_cut_off_goes_on_from_its_journal(
    gate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate("--max-kl", "5")
    for name in ("validate", "noise-1"):
        (tmp_path / f"gate/{name}.json").unlink()
    commands: list[list[str]] = []

    def listening(argv: list[str]) -> int:
        commands.append(argv)
        return main(argv)

    monkeypatch.setattr("nvfp4check.cli.main.main", listening)
    again = gate("--max-kl", "5", "--resume")

    resumed = {argv[0]: argv[-1] == "--resume" for argv in commands}
    assert again.code == 0
    assert resumed == {"validate": True, "forward": True, "agree": False, "report": False}


def test_a_gate_does_not_take_the_results_of_other_prompts_for_these(
    gate: Run, tmp_path: Path
) -> None:
    gate("--max-kl", "5")
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "tokens": [0, 17, 4, 301]}\n')

    again = gate("--max-kl", "5", "--resume", "--format", "json")

    document = json.loads(again.out)
    verdicts = {step["name"]: step["verdict"] for step in document["steps"]}
    assert again.code == 2
    assert verdicts == {"validate": "pass"} | dict.fromkeys(STEPS[1:-1], "incomplete") | {
        "agree": "not run"
    }
    assert "prompts" in again.err
    # What is not of these prompts is not on the page.
    page = (tmp_path / "gate/report.html").read_text(encoding="utf-8")
    assert page.count('<section class="result"') == 2


def test_a_changed_card_is_read_again_and_nothing_else(
    gate: Run, tmp_path: Path, model: Path
) -> None:
    gate("--max-kl", "5")
    (model / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")

    again = gate("--max-kl", "5", "--resume")

    assert again.err.splitlines() == ["nvfp4check release: validate"]


def test_a_checkpoint_that_changed_needs_a_new_gate(gate: Run, tmp_path: Path, model: Path) -> None:
    gate("--max-kl", "5")
    shard = sorted(model.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)

    again = gate("--max-kl", "5", "--resume")

    assert again.code == 2
    assert "have changed since this gate began" in again.err


def test_a_step_that_is_no_longer_planned_is_not_told_of(gate: Run) -> None:
    gate("--max-kl", "5", "--split")

    again = gate("--max-kl", "5", "--resume", "--format", "json")

    assert again.code == 0
    assert [step["name"] for step in json.loads(again.out)["steps"]] == STEPS


def test_a_kl_that_is_none_is_refused_before_the_first_hour(gate: Run, tmp_path: Path) -> None:
    ended = gate("--max-kl", "5", "--rare-kl", "-1")

    assert ended.code == 2
    assert "--rare-kl -1.0" in ended.err
    assert not (tmp_path / "gate").exists()
