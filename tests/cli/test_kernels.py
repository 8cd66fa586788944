"""`kernels list` and `kernels test`: what they find, what they print, how they end."""

import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from nvfp4check.cli import kernels_apart

Run = Callable[..., Any]

MINE = """
from nvfp4ref.layout import swizzle
from nvfp4ref.nvfp4 import quantize as reference
from nvfp4check.ops import UnsupportedError


def quantize(x, global_decode_scale):
    return reference(x, global_decode_scale, "modelopt")


def swapped(x, global_decode_scale):
    codes, scales = quantize(x, global_decode_scale)
    return (codes >> 4) | (codes << 4), scales


swapped.operation = "quantize"
swapped.convention = "modelopt"


def takes_nothing(block_scales):
    raise UnsupportedError("nothing")
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_fp4_kernels.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_fp4_kernels", raising=False)
    monkeypatch.setattr(kernels_apart, "possible", lambda: False)  # torch is loaded once
    return tmp_path


def test_the_list_names_every_operation_and_says_what_is_missing(run: Run) -> None:
    ended = run("kernels", "list", "--format", "json")

    document = json.loads(ended.out)
    assert ended.code == 0
    assert document["schema"] == "nvfp4check/kernels-list/1"
    assert len(document["operations"]) == 12
    quantizers = {one["name"]: one for one in document["operations"][0]["implementations"]}
    assert quantizers["reference"]["available"]
    assert quantizers["vllm"]["available"] is False
    assert "vllm is not installed: pip install vllm" in quantizers["vllm"]["why"]


@pytest.mark.parametrize("format", ["text", "markdown", "html"])
def test_the_list_is_readable(run: Run, format: str) -> None:
    ended = run("kernels", "list", "--op", "rope", "--format", format)

    signature = "rope(x, positions, config) -> rotated"
    assert signature.replace(">", "&gt;" if format == "html" else ">") in ended.out
    assert "reference" in ended.out
    assert "matmul" not in ended.out


def test_a_sound_kernel_of_the_current_directory_passes(run: Run) -> None:
    ended = run(
        "kernels",
        "test",
        "--impl",
        "my_fp4_kernels:quantize",
        "--convention",
        "modelopt",
        "--format",
        "json",
    )

    document = json.loads(ended.out)
    assert ended.code == 0
    assert document["schema"] == "nvfp4check/kernels/1"
    assert (document["op"], document["impl"]) == ("quantize", "my_fp4_kernels:quantize")
    assert (document["convention"], document["device"]) == ("modelopt", "cpu")
    assert document["verdict"] == "pass"
    assert {law["verdict"] for law in document["properties"]} == {"pass"}
    assert all(law["cases"] > 0 for law in document["properties"])


def test_a_broken_kernel_exits_with_one_and_shows_the_worst(run: Run) -> None:
    ended = run("kernels", "test", "--impl", "my_fp4_kernels:swapped", "--format", "json")

    document = json.loads(ended.out)
    assert ended.code == 1
    assert document["verdict"] == "fail"
    broken = {law["name"]: law for law in document["properties"] if law["verdict"] == "fail"}
    worst = broken["one-hot-elements"]["worst"]
    assert worst["expected_bits"] == "0x07"
    assert worst["actual_bits"] == "0x00"


@pytest.mark.parametrize("format", ["text", "markdown", "html"])
def test_a_failure_is_told_in_words(run: Run, format: str) -> None:
    ended = run("kernels", "test", "--impl", "my_fp4_kernels:swapped", "--format", format)

    assert ended.code == 1
    assert "a single live element lands in its own nibble" in ended.out
    assert "bits 40c0 0000" in ended.out


def test_what_could_not_be_asked_is_not_a_pass(run: Run) -> None:
    arguments = ("kernels", "test", "--op", "swizzle", "--impl", "my_fp4_kernels:takes_nothing")

    assert run(*arguments).code == 2
    assert run(*arguments, "--allow-skips").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say which kernel"),
        (("--impl", "nobody"), "no implementation 'nobody'"),
        (("--op", "quantise"), "unknown operation 'quantise'"),
        (("--impl", "vllm", "--op", "quantize"), "vllm is not available"),
        (("--impl", "my_fp4_kernels:quantize"), "name its --convention"),
        (("--impl", "my_fp4_kernels:quantize", "--convention", "nv"), "unknown convention 'nv'"),
        (("--impl", "my_fp4_kernels:absent"), "has no 'absent'"),
        (("--impl", "my_fp4_kernels:takes_nothing"), "which operation is"),
        (("--impl", "no_such_module:f"), "cannot import 'no_such_module'"),
    ],
)
def test_what_cannot_be_asked_exits_with_two(
    run: Run, arguments: tuple[str, ...], message: str
) -> None:
    ended = run("kernels", "test", *arguments)

    assert ended.code == 2
    assert message in ended.err


def test_an_entry_point_is_an_implementation(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint("mine.quantize", "my_fp4_kernels:swapped", "nvfp4check.kernels"),
        EntryPoint("badly-named", "my_fp4_kernels:quantize", "nvfp4check.kernels"),
    ]
    monkeypatch.setattr("nvfp4check.cli.kernels_found.entry_points", lambda group: entries)

    listed = json.loads(run("kernels", "list", "--format", "json").out)
    ended = run("kernels", "test", "--impl", "mine")

    assert listed["unusable"][0]["name"] == "badly-named"
    assert "NAME.OPERATION" in listed["unusable"][0]["why"]
    assert ended.code == 1


def test_several_runs_come_in_one_document(run: Run) -> None:
    ended = run("kernels", "test", "--impl", "reference", "--op", "swizzle", "--format", "json")
    assert json.loads(ended.out)["op"] == "swizzle"

    both = run("kernels", "test", "--impl", "triton", "--op", "unswizzle", "--format", "json")
    assert json.loads(both.out)["verdict"] == "pass"


def test_what_is_no_function_is_refused(run: Run, project: Path) -> None:
    (project / "my_fp4_kernels.py").write_text("quantize = 3")

    ended = run("kernels", "test", "--impl", "my_fp4_kernels:quantize", "--convention", "engine")

    assert ended.code == 2
    assert "my_fp4_kernels:quantize is int, expected a function" in ended.err


def test_the_page_of_a_failure_keeps_the_lines_of_its_message(run: Run) -> None:
    asked = ("kernels", "test", "--impl", "my_fp4_kernels:swapped", "--max-examples", "2")

    ended = run(*asked, "--format", "html")

    assert ended.code == 1
    assert "\\x0a" not in ended.out
    assert "\n  x = " in ended.out
