"""`nvfp4check agree`, `report`, `release` and `capture`, as they are called."""

import hashlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

GOLDENS = Path(__file__).parents[2] / "goldens"
TINY = GOLDENS / "tiny-deepseek-v3"
GOLDEN = str(TINY / "activations" / "reference-nvfp4-stored")

Run = Callable[..., Any]
MORE = ("--model", "m", "--prompts", "p", "--out", "o")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short runs of the tiny model."""
    from nvfp4check.cli.main import main

    folder = tmp_path_factory.mktemp("runs")
    lines = {
        "bf16": [],
        "nvfp4": [],
        "noise": ["--perturb", "ulp:bfloat16", "--seed", "1"],
    }
    for name, more in lines.items():
        checkpoint = TINY / ("nvfp4" if name == "nvfp4" else "bf16")
        base = ["forward", str(checkpoint), "--activations", "all", "--out", str(folder / name)]
        assert main([*base, *more, "--output", str(folder / f"{name}.json")]) == 0
    return folder


def test_a_run_agrees_with_itself(run: Run) -> None:
    ran = run("agree", GOLDEN, GOLDEN)

    assert ran.code == 0
    assert ran.out.startswith("PASS: ")
    assert "every point is equal bit for bit" in ran.out


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (["--max-kl", "0.5"], 0),
        (["--max-kl", "4", "--rare-kl", "7"], 0),
        (["--max-kl", "0.5", "--rare-kl", "7"], 3),
        (["--max-kl", "0.0001"], 1),
        (["--min-top1", "0.9999"], 1),
        ([], 3),
    ],
)
def test_the_exit_code_is_the_verdict(run: Run, runs: Path, limits: list[str], code: int) -> None:
    assert run("agree", str(runs / "bf16"), str(runs / "nvfp4"), *limits).code == code


def test_noise_judges_the_layers_unless_nothing_is_to_be_judged(run: Run, runs: Path) -> None:
    line = ["agree", str(runs / "bf16"), str(runs / "nvfp4"), "--noise", str(runs / "noise")]

    judged, unjudged = run(*line), run(*line, "--judge", "none")

    assert (judged.code, unjudged.code) == (1, 3)
    assert "First divergence: layer 0, attn_output" in judged.out


def test_json_is_one_document_with_the_contract_s_numbers(run: Run, runs: Path) -> None:
    ran = run("agree", str(runs / "bf16"), str(runs / "nvfp4"), "--format", "json")

    document = json.loads(ran.out)
    assert document["schema"] == "nvfp4check/agree/1"
    assert document["verdict"] == "undecided"
    assert set(document["first_divergence"]) >= {"layer", "point", "prompt", "token"}
    names = (
        "positions kl_mean kl_ci95 kl_median kl_p95 kl_p99 kl_p999 kl_max kl_reverse_mean jsd_mean "
        "top1 top5_overlap top10_overlap ppl_reference ppl_candidate delta_p_rms"
    )
    assert set(names.split()) <= set(document["logits"])
    low, high = document["logits"]["kl_ci95"]
    assert low < document["logits"]["kl_mean"] < high


@pytest.mark.parametrize("suffix", ["html", "md", "xml"])
def test_every_format_is_written_by_its_suffix(
    run: Run, runs: Path, tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"out.{suffix}"

    run("agree", str(runs / "bf16"), str(runs / "nvfp4"), "--output", str(file))

    starts = {"html": "<!doctype html>", "md": "## UNDECIDED", "xml": "<?xml"}
    assert file.read_text().startswith(starts[suffix])


def test_what_was_not_recorded_forbids_a_pass(run: Run, runs: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs / "bf16", tmp_path / "partial")
    (tmp_path / "partial" / "layers" / "002.safetensors").unlink()
    line = ["agree", str(runs / "bf16"), str(tmp_path / "partial"), "--max-kl", "0.1"]

    assert run(*line).code == 2
    assert run(*line, "--allow-skips").code == 0
    assert "layer 2 was not recorded" in run(*line).out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("agree", "nowhere", GOLDEN), "no run.json"),
        (("agree", GOLDEN, GOLDEN, "--alpha", "2"), "below 0.5"),
        (("agree", GOLDEN, GOLDEN, "--alpha", "nan"), "below 0.5"),
        (("agree", GOLDEN, GOLDEN, "--power", "0.1"), "from 0.5 to below 1"),
        (("agree", GOLDEN, GOLDEN, "--rare-kl", "-1"), "0 or more"),
        (("agree", GOLDEN, GOLDEN, "--rare-kl", "nan"), "and finite"),
        (("agree", GOLDEN, GOLDEN, "--max-kl", "inf"), "and finite"),
        (("agree", GOLDEN, GOLDEN, "--min-top1", "95"), "0.95 for 95 %"),
        (("agree", GOLDEN, GOLDEN, "--seed", "9" * 20), "2**63 - 1"),
        (("agree", GOLDEN, GOLDEN, "--head", "nowhere"), "no run needs it"),
        (("agree", GOLDEN, __file__), "no run.json"),
        (("report", __file__), "it is no JSON"),
        (("report", "nowhere.json"), "cannot be read as a result"),
        (
            ("capture", "logprobs", "--base-url", "localhost", *MORE),
            "http://",
        ),
    ],
)
def test_bad_usage_is_told_in_one_line(run: Run, line: tuple[str, ...], message: str) -> None:
    ran = run(*line)

    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_a_report_holds_every_input_with_its_hash(run: Run, runs: Path, tmp_path: Path) -> None:
    agreement, page = tmp_path / "agree.json", tmp_path / "page.html"
    run("agree", str(runs / "bf16"), str(runs / "nvfp4"), "--output", str(agreement))
    validation = tmp_path / "validate.json"
    run("validate", str(TINY / "nvfp4-raw"), "--level", "headers", "--output", str(validation))

    ran = run("report", str(agreement), str(validation), "--output", str(page))

    text = page.read_text()
    assert ran.code == 0
    for file in (agreement, validation):
        assert text.count(hashlib.sha256(file.read_bytes()).hexdigest()) == 2
    assert "NV602" in text
    assert "Relative error by layer" in text
    assert text.count("<body>") == text.count("<footer") == 1


def test_a_file_that_is_no_result_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"schema": "other/1"}')

    ran = run("report", str(tmp_path / "x.json"))

    assert ran.code == 2
    assert "x.json" in ran.err


def test_a_result_that_was_cut_is_refused_by_what_it_lacks(run: Run, tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"schema": "nvfp4check/agree/1"}')

    ran = run("report", str(tmp_path / "half.json"))

    assert ran.code == 2
    assert "is no whole agree result" in ran.err
    assert "is missing" in ran.err


@pytest.mark.parametrize("command", ["report", "rules"])
def test_help_does_not_speak_of_python_s_types(run: Run, command: str) -> None:
    ran = run(command, "--help")

    assert "list[" not in ran.out
    assert "..." in ran.out


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    lines = [{"id": f"p{i}", "tokens": [i + 2 * t for t in range(24)]} for i in (3, 90, 200)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def gate(prompts: Path, out: Path, *more: str) -> list[str]:
    base = ["release", str(TINY / "nvfp4"), "--base", str(TINY / "bf16"), "--out", str(out)]
    return [*base, "--prompts", str(prompts), "--noise", "1", *more]


def test_the_gate_passes_and_is_not_done_twice(run: Run, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "gate"
    limits = ("--max-kl", "10", "--min-top1", "0.1")

    first = run(*gate(prompts, out, *limits))
    before = {f: f.stat().st_mtime_ns for f in (out / "runs").rglob("*") if f.is_file()}
    again = run(*gate(prompts, out, *limits, "--resume"))

    assert (first.code, again.code) == (0, 0), first.err
    assert again.err == ""
    assert {f: f.stat().st_mtime_ns for f in before} == before
    state = json.loads((out / "release.json").read_text())
    assert state["verdict"] == "pass"
    assert [step["name"] for step in state["steps"]] == [
        "validate",
        "forward-base",
        "noise-1",
        "forward-candidate",
        "agree",
    ]
    page = (out / "report.html").read_text()
    assert hashlib.sha256((out / "release.json").read_bytes()).hexdigest() in page


def test_the_gate_fails_by_its_worst_step(run: Run, prompts: Path, tmp_path: Path) -> None:
    ran = run(*gate(prompts, tmp_path / "gate", "--max-kl", "0.00001"))

    assert ran.code == 1
    assert (tmp_path / "gate" / "report.html").is_file()


def test_the_gate_without_limits_is_undecided(run: Run, prompts: Path, tmp_path: Path) -> None:
    assert run(*gate(prompts, tmp_path / "gate")).code == 3


def test_a_step_whose_input_is_missing_is_not_run(run: Run, prompts: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "tokens": [99999]}\n')

    ran = run(*gate(bad, tmp_path / "gate", "--max-kl", "1"))

    assert ran.code == 2
    assert "agree not run: forward-base did not come about" in ran.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--prompts", "nowhere.jsonl"), "nowhere.jsonl: cannot be read as prompts"),
        (("--logits", "topk:0"), "give full, hidden, or topk:N"),
        (("--base", str(TINY / "nvfp4")), "the base is the checkpoint itself"),
    ],
)
def test_what_a_later_step_would_refuse_is_refused_before_the_first(
    run: Run, prompts: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    ran = run(*gate(prompts, tmp_path / "gate", *more))

    assert ran.code == 2
    assert message in ran.err
    assert "release: validate" not in ran.err
    assert not (tmp_path / "gate").exists()


def test_every_step_runs_alone(run: Run, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "gate"
    out.mkdir()
    planned = run(*gate(prompts, out, "--max-kl", "10", "--plan")).out.splitlines()

    codes = [run(*shlex.split(line)[1:]).code for line in planned]

    assert codes == [0] * len(planned)
    assert (out / "report.html").is_file()
    assert not (out / "release.json").exists()


def test_the_gate_of_another_checkpoint_is_not_continued(
    run: Run, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "gate"
    run(*gate(prompts, out, "--max-kl", "1"))
    line = gate(prompts, out, "--max-kl", "1", "--resume")
    line[1] = str(TINY / "fp8")

    ran = run(*line)

    assert ran.code == 2
    assert "gate of another checkpoint" in ran.err
