"""What a user got wrong is said in one message before the work begins, and nothing is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvfp4check.report.formats import Format
from nvfp4check.report.render import render

Run = Callable[..., Any]

TINY = Path(__file__).parents[2] / "goldens/tiny-deepseek-v3"
FP8, NVFP4 = str(TINY / "fp8"), str(TINY / "nvfp4")
SERVED = ("--model", "m", "--prompts", "p", "--out", "o")
TOOL = {"name": "nvfp4check", "version": "0"}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "a", "tokens": [0, 17, 4]}\n')
    return str(file)


@pytest.fixture
def forward(run: Run, prompts: str, tmp_path: Path) -> Callable[[str], str]:
    """Run the tiny model of a form, and return the run's directory."""

    def compute(form: str) -> str:
        out = tmp_path / f"run-{form}"
        ended = run(
            *("forward", str(TINY / form), "--prompts", prompts, "--activations", "all"),
            *("--out", str(out)),
        )
        assert ended.code == 0
        return str(out)

    return compute


def refused(ended: Any, *words: str) -> None:
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("nvfp4check: error: ")
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err


@pytest.mark.parametrize(
    "command",
    [
        ("diff", FP8, NVFP4),
        ("inspect", NVFP4),
        ("rules",),
        ("faults", "list"),
        ("kernels", "list"),
        ("kernels", "test", "--impl", "triton"),
        ("kernels", "power"),
        ("kernels", "codegen"),
        ("kernels", "bench", "--predict"),
        ("golden", "verify", NVFP4),
        ("agree", FP8, NVFP4),
        ("report", "validate.json"),
        ("faults", "inject", NVFP4, "broken", "--fault", "F8a"),
        ("golden", "record", "run", "golden", "--origin", "a test"),
        ("release", NVFP4, "--base", FP8, "--out", "gate"),
        ("capture", "logprobs", "--base-url", "http://h", *SERVED),
    ],
)
@pytest.mark.parametrize(
    ("suffix", "why"), [("sarif", "no sarif result"), ("pdf", ".pdf is the suffix of no format")]
)
def test_a_suffix_that_the_command_cannot_write_is_refused_before_the_work(
    suffix: str, why: str, command: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    output = tmp_path / f"result.{suffix}"
    refused(run(*command, "--output", str(output)), str(output), why, "--format text, json, ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("validate", NVFP4), ("forward", NVFP4, "--out", "run")])
def test_a_suffix_of_no_format_is_refused_by_every_command(
    command: tuple[str, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(*command, "--output", "result.pdf"), ".pdf is the suffix of no format", " or ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", ["-1", str(2**63), "9" * 30])
@pytest.mark.parametrize(
    "command",
    [
        ("agree", FP8, NVFP4),
        ("diff", FP8, NVFP4),
        ("validate", NVFP4),
        ("forward", NVFP4, "--perturb", "ulp:bfloat16", "--out", "run"),
        ("faults", "inject", NVFP4, "broken", "--fault", "F8a"),
        ("synth", f"{NVFP4}/config.json", "made"),
        ("kernels", "test", "--op", "quantize", "--impl", "triton"),
        ("kernels", "power", "--op", "quantize"),
    ],
)
def test_a_seed_is_one_that_generators_take(
    command: tuple[str, ...], seed: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(*command, "--seed", seed), f"--seed {seed}", "from 0 to 2**63 - 1")
    assert list(tmp_path.iterdir()) == []


def test_a_forward_whose_summary_has_no_place_does_not_begin(run: Run, tmp_path: Path) -> None:
    out, output = tmp_path / "run", tmp_path / "absent" / "summary.json"
    ended = run("forward", NVFP4, "--text", "a", "--out", str(out), "--output", str(output))
    refused(ended, "there is no directory")
    assert not out.exists()


@pytest.mark.parametrize("limit", ["nan", "-0.5"])
def test_a_limit_on_kl_is_a_number_that_can_be_kept(limit: str, run: Run, tmp_path: Path) -> None:
    refused(run("agree", "a", "b", "--max-kl", limit), f"--max-kl {limit}", "0 or more")
    gate = ("release", NVFP4, "--base", FP8, "--out", str(tmp_path / "gate"), "--plan")
    refused(run(*gate, "--max-kl", limit), f"--max-kl {limit}")
    assert run(*gate, "--max-kl", "0").code == 0


def test_a_gate_does_not_take_a_file_for_its_directory(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "gate"
    file.write_text("mine")
    refused(run("release", NVFP4, "--base", FP8, "--out", str(file)), "is a file", "new directory")
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no licence')", "no licence"),
        ("def quantize(:", "SyntaxError"),
        ("import no_such_library", "No module named 'no_such_library'"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [("test", "--op", "quantize", "--impl"), ("codegen", "--signature", "n=i32", "--kernel")],
)
def test_a_module_that_cannot_be_imported_is_named_with_the_reason(
    command: tuple[str, ...],
    source: str,
    reason: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "broken_kernels.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    refused(run("kernels", *command, "broken_kernels:quantize"), "broken_kernels", reason)


@pytest.mark.parametrize("command", ["test", "power"])
def test_a_device_that_is_not_there_is_refused(command: str, run: Run) -> None:
    asked = ("kernels", command, "--op", "quantize", "--impl", "triton", "--device", "nowhere")
    refused(run(*asked), "--device nowhere")


def test_no_fewer_than_one_example_is_drawn(run: Run) -> None:
    asked = ("kernels", "test", "--op", "quantize", "--impl", "triton", "--max-examples", "0")
    ended = run(*asked)
    assert ended.code == 2
    assert "--max-examples" in ended.err
    assert "Traceback" not in ended.err


def test_a_tolerance_is_a_number(run: Run) -> None:
    asked = ("kernels", "power", "--op", "matmul", "--atol", "nan", "--rtol", "0.1")
    refused(run(*asked), "--atol nan", "must be numbers")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"schema": "nvfp4check/validate/1"}, "no whole validate result"),
        ({"schema": "nvfp4check/validate/1", "findings": 5}, "no whole validate result"),
        ({"schema": "nvfp4check/agree/1", "logits": []}, "no whole agree result"),
        ({"schema": "nvfp4check/validate/9"}, "another version"),
        ({"schema": "nvfp4check/validate/1", "verdict": ["pass"]}, "is no text"),
    ],
)
def test_a_page_of_what_is_no_result_is_refused_by_its_file(
    document: dict[str, Any], words: str, run: Run, tmp_path: Path
) -> None:
    file, page = tmp_path / "result.json", tmp_path / "page.html"
    file.write_text(json.dumps(document))
    refused(run("report", str(file), "--output", str(page)), str(file), words)
    assert not page.exists()


def test_a_run_cut_short_is_refused_by_the_file(run: Run, forward: Callable[[str], str]) -> None:
    whole = Path(forward("fp8"))
    cut = whole.with_name("cut")
    shutil.copytree(whole, cut)
    file = cut / "layers/002.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused(run("agree", str(whole), str(cut)), str(file), "cannot be read")


def test_a_noise_floor_is_of_the_reference_and_a_split_of_the_candidate(
    run: Run, forward: Callable[[str], str]
) -> None:
    reference, candidate, other = forward("fp8"), forward("nvfp4"), forward("bf16")
    pair = ("agree", reference, candidate)
    refused(run(*pair, "--noise", candidate), f"--noise {candidate}", "as the reference")
    refused(run(*pair, "--forced", other), f"--forced {other}", "as the candidate")
    assert run(*pair, "--noise", reference, "--forced", candidate).code == 1


def test_a_run_of_another_checkpoint_is_continued_by_none_and_the_keys_are_named(
    run: Run, prompts: str, forward: Callable[[str], str]
) -> None:
    out = forward("fp8")
    ended = run(
        *("forward", NVFP4, "--prompts", prompts, "--activations", "all"),
        *("--out", out, "--resume"),
    )
    refused(ended, "cannot be continued", "config differs in quantization_config", "headers differ")
    assert "hidden_size" not in ended.err


def test_a_forward_without_shards_says_so(run: Run, prompts: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(TINY / "nvfp4/config.json", bare)
    shutil.copy(TINY / "nvfp4/model.safetensors.index.json", bare)
    asked = ("forward", str(bare), "--prompts", prompts, "--out", str(tmp_path / "run"))
    refused(run(*asked), str(bare), "holds no shard that can be read", "validate")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (
            {"schema": "nvfp4check/codegen/1", "tool": TOOL, "triton": "9.9 <b>", "results": []}
            | {"verdict": "pass"},
            "9.9 &lt;b&gt;",
        ),
        (
            {"schema": "nvfp4check/capture/1", "tool": TOOL, "run": "r", "server": "vllm"}
            | {"base_url": "http://here", "model": "<m>", "prompts": [], "asked": 0}
            | {"logits": "topk:20"},
            "model &lt;m&gt;",
        ),
    ],
)
def test_results_that_are_all_tables_have_a_page_too(document: dict[str, Any], words: str) -> None:
    page = render(document, Format.HTML)
    assert page.startswith("<!doctype html>")
    assert words in page


def test_the_limits_of_chips_have_a_page(run: Run) -> None:
    ended = run("kernels", "bench", "--predict", "--chip", "B200", "--format", "html")
    assert ended.code == 0
    assert "B200, us" in ended.out
