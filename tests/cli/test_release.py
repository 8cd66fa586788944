"""What the gate of a release tells its reader: what to give, where the page is, what was redone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

TINY = Path(__file__).parents[2] / "goldens/tiny-deepseek-v3"
STEPS = ["validate", "forward-base", "noise-1", "noise-2", "forward-candidate", "agree"]


@pytest.fixture
def gate(run: Run, tmp_path: Path) -> Run:
    """Return a function that runs the gate of the tiny NVFP4 model in `gate`."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "tokens": [0, 17, 4, 300]}\n{"id": "b", "tokens": [0, 5]}\n')

    def pass_through(*more: str) -> Any:
        return run(
            *("release", str(TINY / "nvfp4"), "--base", str(TINY / "fp8")),
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
