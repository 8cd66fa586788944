import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvfp4check.report.formats import Format

Run = Callable[..., Any]
GOLDENS = Path(__file__).parents[2] / "goldens"
SOUND = GOLDENS / "tiny-deepseek-v3/nvfp4"


@pytest.fixture
def stale(tmp_path: Path) -> Path:
    """The golden checkpoint with the configuration and index that ModelOpt's script leaves."""
    copy = tmp_path / "stale"
    shutil.copytree(SOUND, copy)
    shutil.copytree(GOLDENS / "tiny-deepseek-v3/nvfp4-raw", copy, dirs_exist_ok=True)
    return copy


def rules_found(output: str, severity: str) -> set[str]:
    findings = json.loads(output)["findings"]
    return {finding["rule"] for finding in findings if finding["severity"] == severity}


def test_a_sound_checkpoint_passes_with_exit_code_0(run: Run) -> None:
    ran = run("validate", str(SOUND))
    assert ran.code == 0
    assert ran.out.startswith(f"PASS: no findings in {SOUND}\n")
    assert ran.err == ""


def test_a_checkpoint_with_an_error_fails_with_exit_code_1(run: Run, stale: Path) -> None:
    ran = run("validate", str(stale), "--format", "json")
    assert ran.code == 1
    assert rules_found(ran.out, "error") == {"NV602"}
    assert "NV004" in rules_found(ran.out, "warning")


def test_rules_are_selected_and_ignored(run: Run, stale: Path) -> None:
    only = run("validate", str(stale), "--select", "nv0", "--format", "json")
    assert json.loads(only.out)["coverage"]["rules"] == [f"NV{n:03}" for n in range(1, 11)]
    rest = run("validate", str(stale), "--ignore", "NV0", "--ignore", "NV602", "--format", "json")
    assert not {"NV004", "NV602"} & set(json.loads(rest.out)["coverage"]["rules"])


def test_a_warning_fails_the_run_only_when_asked(run: Run, stale: Path) -> None:
    chosen = ("validate", str(stale), "--select", "NV004")
    assert run(*chosen).code == 0
    assert run(*chosen, "--fail-on", "warning").code == 1


def test_what_could_not_be_checked_is_exit_code_2_unless_allowed(run: Run, stale: Path) -> None:
    config = json.loads((stale / "config.json").read_text())
    config["architectures"] = ["NobodyKnowsThisForCausalLM"]
    (stale / "config.json").write_text(json.dumps(config))
    chosen = ("validate", str(stale), "--level", "headers", "--ignore", "NV602")
    ran = run(*chosen)
    assert ran.code == 2
    assert ran.out.startswith("INCOMPLETE")
    assert run(*chosen, "--allow-skips").code == 0


@pytest.mark.parametrize("format", Format)
def test_every_format_is_written_to_a_file_and_nothing_to_stdout(
    run: Run, stale: Path, tmp_path: Path, format: Format
) -> None:
    target = tmp_path / "report"
    ran = run("validate", str(stale), "--format", format.value, "--output", str(target))
    assert (ran.code, ran.out) == (1, "")
    assert "NV602" in target.read_text(encoding="utf-8")


def test_the_page_has_a_map_of_the_model(run: Run) -> None:
    page = run("validate", str(SOUND), "--format", "html").out
    assert "mlp.experts.*.down_proj, layers 1 to 4: nvfp4, nothing found" in page
    assert "mlp.experts.*.down_proj, layer 5: bf16, nothing found" in page


def test_two_runs_find_the_same_in_the_same_order(run: Run, stale: Path) -> None:
    first, second = (run("validate", str(stale), "--format", "json").out for _ in range(2))
    assert json.loads(first)["findings"] == json.loads(second)["findings"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no/such/place",), "no/such/place"),
        ((str(SOUND), "--select", "NV999"), "no rule begins with 'NV999'"),
        ((str(SOUND), "--sample", "0"), "give 0 < fraction <= 1"),
        ((str(SOUND), "--tp", "0"), "--tp"),
        ((str(SOUND), "--device", "cuda"), "cuda"),
        ((str(SOUND), "--jobs", "0"), "--jobs"),
        ((str(SOUND), "--level", "header"), "header"),
        ((str(SOUND), "--output", str(SOUND)), "it is a directory"),
        ((str(SOUND), "--output", "/no/such/directory/report"), "there is no directory"),
    ],
)
def test_bad_usage_is_one_clear_message_and_exit_code_2(
    run: Run, arguments: tuple[str, ...], said: str
) -> None:
    ran = run("validate", *arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_a_directory_without_a_checkpoint_is_exit_code_2(run: Run, tmp_path: Path) -> None:
    ran = run("validate", str(tmp_path))
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 1


def test_a_truncated_shard_is_a_finding_and_no_crash(run: Run, stale: Path) -> None:
    shard = next(stale.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    ran = run("validate", str(stale), "--format", "json")
    assert ran.code == 1
    assert "NV001" in rules_found(ran.out, "error")
