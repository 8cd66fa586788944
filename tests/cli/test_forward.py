"""`nvfp4check forward` and `nvfp4check golden` from the command line."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvfp4check.activations import Run

TINY = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "x\\u001b[31m", "tokens": [0, 41, 574]}\n{"id": "y", "tokens": [7]}')
    return file


def test_a_run_is_written_and_told_as_json(
    run: Callable[..., Any], prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = run(
        *("forward", str(TINY / "nvfp4"), "--prompts", str(prompts), "--out", str(out)),
        *("--activations", "hidden", "--format", "json"),
    )

    document = json.loads(done.out)
    assert done.code == 0
    assert document["schema"] == "nvfp4check/forward/1"
    assert document["mode"] == "stored"
    assert document["layers_computed"] == 5
    opened = Run.open(out)
    assert document["prompts"][1]["next_token"] == int(opened.logits("y")[-1].argmax())
    assert opened.layers == (0, 1, 2, 3, 4)


def test_multi_token_prediction_is_told_beside_the_layers(
    run: Callable[..., Any], prompts: Path, tmp_path: Path
) -> None:
    asked = ("forward", str(TINY / "bf16"), "--prompts", str(prompts), "--mtp")

    some = run(*asked, "--out", str(tmp_path / "run"), "--layers", "0:3")
    rest = run(*asked, "--out", str(tmp_path / "run"), "--resume", "--format", "json")
    told = run(*asked, "--out", str(tmp_path / "run"), "--resume")

    assert "layers      0 to 2, 3 computed by this call" in some.out
    assert (json.loads(rest.out)["mtp"], json.loads(rest.out)["layers_computed"]) == (1, 3)
    assert "0 to 4 and 1 of multi-token prediction, 0 computed by this call" in told.out
    # The second prompt has one token, and nothing is predicted from it.
    assert Run.open(tmp_path / "run").mtp_logits(5, "x\u001b[31m").shape == (2, 1024)


@pytest.mark.parametrize("format", ["text", "markdown", "html"])
def test_a_run_is_told_with_hostile_names_made_harmless(
    format: str, run: Callable[..., Any], prompts: Path, tmp_path: Path
) -> None:
    done = run(
        *("forward", str(TINY / "bf16"), "--prompts", str(prompts), "--out", str(tmp_path / "r")),
        *("--format", format),
    )

    assert done.code == 0
    assert "\x1b" not in done.out
    assert r"x\x1b[31m" in done.out
    assert "unquantized" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--logits", "topk:0"], "give full, hidden, or topk:N"),
        (["--logits", "best"], "give full, hidden, or topk:N"),
        (["--layers", "3"], "give A:B"),
        (["--layers", "4:9"], "the model has layers 0 to 4"),
        (["--layers", "2:4"], "begin with --layers 0:2"),
        (["--perturb", "ulp:int8"], "give ulp:bfloat16"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--device", "toaster"], "--device toaster"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--routing", "nowhere"], "no run.json"),
        (["--mode", "unquantized"], "weights are quantised"),
        (["--max-memory", "inf"], "Invalid value for '--max-memory'"),
        (["--text", "x", "--text", "\udcff"], "half a character"),
        (["--engine", "ray", "--device", "meta"], "give --device cpu, or --engine local"),
    ],
)
def test_what_cannot_be_done_ends_with_a_message_and_exit_code_2(
    arguments: list[str], message: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    done = run("forward", str(TINY / "nvfp4"), "--out", str(tmp_path / "run"), *arguments)

    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def test_a_cluster_without_ray_ends_with_what_to_install(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    done = run("forward", str(TINY / "bf16"), "--out", str(tmp_path / "run"), "--engine", "ray")

    assert done.code == 2
    assert "pip install 'nvfp4check[ray]'" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_a_cluster_that_does_not_answer_is_an_error_at_once(
    address: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", address)

    done = run("forward", str(TINY / "bf16"), "--out", str(tmp_path / "run"), "--engine", "ray")

    assert done.code == 2
    assert f"no Ray cluster at {address}" in done.err
    assert not (tmp_path / "run").exists()


def test_a_golden_is_recorded_then_verified_then_missed(
    run: Callable[..., Any], prompts: Path, tmp_path: Path
) -> None:
    out, golden = str(tmp_path / "run"), str(tmp_path / "golden")
    run("forward", str(TINY / "bf16"), "--prompts", str(prompts), "--out", out)

    recorded = run("golden", "record", out, golden, "--origin", "a test")
    verified = run("golden", "verify", golden, "--run", out)
    fresh = run("golden", "verify", golden, "--checkpoint", str(TINY / "bf16"))
    changed = str(tmp_path / "changed")
    run("forward", str(TINY / "fp8"), "--prompts", str(prompts), "--out", changed)
    other = run(
        *("golden", "verify", golden, "--run", changed, "--close", "float32", "--format", "json")
    )

    given = run(*("golden", "verify", golden, "--checkpoint", str(TINY / "bf16"), "--inputs", out))
    assert given.code == 2
    assert f"--inputs {out}: {golden} was computed without" in given.err
    assert (recorded.code, verified.code, fresh.code) == (1, 0, 0)
    assert "recorded: was missing" in recorded.out
    assert "holds" in verified.out
    assert other.code == 1
    assert json.loads(other.out)["verdict"] == "fail"


@pytest.mark.parametrize("format", ["text", "markdown", "html"])
def test_differences_of_a_golden_are_shown_in_every_format(
    format: str, run: Callable[..., Any], prompts: Path, tmp_path: Path
) -> None:
    out, golden = str(tmp_path / "run"), tmp_path / "golden"
    run("forward", str(TINY / "bf16"), "--prompts", str(prompts), "--out", out)
    run("golden", "record", out, str(golden), "--origin", "a test")
    (golden / "logits.safetensors").unlink()

    done = run("golden", "verify", str(golden), "--format", format)

    assert done.code == 1
    assert "missing, though MANIFEST.json lists it" in done.out


def test_a_golden_that_is_not_there_could_not_be_checked(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    done = run("golden", "verify", str(tmp_path / "none"), "--run", str(tmp_path / "run"))

    assert done.code == 2
    assert done.out == ""
    assert "is no golden: nothing is there" in done.err


def test_progress_on_a_terminal_names_the_part_of_the_model_and_the_bytes(
    prompts: Path, tmp_path: Path
) -> None:
    terminal, side = pty.openpty()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "nvfp4check", "forward", str(TINY / "bf16")),
            *("--prompts", str(prompts), "--out", str(tmp_path / "run"), "--format", "json"),
        ],
        stdout=subprocess.PIPE,
        stderr=side,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        check=True,
    )
    os.close(side)
    shown = os.read(terminal, 1 << 20).decode()
    os.close(terminal)

    document = json.loads(done.stdout)
    megabytes = f"{document['bytes_read'] / 1e6:.1f}"
    assert document["layers_computed"] == 5
    assert "Head" in shown
    assert f"{megabytes}/{megabytes} MB" in shown
