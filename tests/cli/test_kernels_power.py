"""`kernels power`: what it plants, what it prints, how it ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvfp4check.cli import kernels_apart
from nvfp4check.faults import power
from nvfp4check.report.formats import Format
from nvfp4check.report.render import render

Run = Callable[..., Any]

MINE = """
from nvfp4ref.nvfp4 import dequantize as reference


def dequantize(packed_codes, block_scales, global_decode_scale, dtype):
    return reference(packed_codes, block_scales, global_decode_scale, dtype)


def broken(packed_codes, block_scales, global_decode_scale, dtype):
    swapped = (packed_codes >> 4) | (packed_codes << 4)
    return reference(swapped, block_scales, global_decode_scale, dtype)


broken.operation = "dequantize"
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_planted_kernels.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kernels_apart, "possible", lambda: False)  # torch is loaded once
    return tmp_path


def test_every_fault_of_an_operation_is_listed_with_the_property_that_sees_it(run: Run) -> None:
    ran = run("kernels", "power", "--op", "unswizzle")

    assert ran.code == 0
    assert "F9a      linear for swizzled scales" in ran.out
    assert "5 faults in 5 forms, 5 seen; 1 correct kernels, 1 accepted" in ran.out


def test_the_document_names_threads_and_faults_that_are_caught_elsewhere(run: Run) -> None:
    ran = run("kernels", "power", "--op", "swizzle", "--format", "json")
    document = json.loads(ran.out)

    assert document["schema"] == "nvfp4check/power/1"
    assert document["verdict"] == "pass"
    assert all(one["seen_by"] for one in document["faults"])
    assert any("https://github.com/" in url for one in document["faults"] for url in one["threads"])
    assert {"F8a", "F13c", "F18"} <= {one["id"] for one in document["elsewhere"]}


@pytest.mark.parametrize("kind", [Format.TEXT, Format.MARKDOWN, Format.HTML])
def test_a_missed_fault_and_a_rejected_kernel_are_shown(run: Run, kind: Format) -> None:
    document = json.loads(run("kernels", "power", "--op", "swizzle", "--format", "json").out)
    document["faults"][0]["seen_by"] = None
    document["variants"][0]["rejected_by"] = "every-shape"

    shown = render(document, kind)

    assert "MISSED in swizzle" in shown
    assert "ejected though correct" in shown


def test_faults_are_planted_in_a_kernel_of_ones_own(run: Run) -> None:
    ran = run("kernels", "power", "--impl", "my_planted_kernels:dequantize", "--format", "json")
    document = json.loads(ran.out)

    assert ran.code == 0
    assert {"F1a", "F6b", "F7a"} <= {one["id"] for one in document["faults"]}
    assert "F3a" not in {one["id"] for one in document["faults"]}  # it replaces a kernel


def test_a_kernel_that_is_broken_already_is_refused(run: Run) -> None:
    ran = run("kernels", "power", "--impl", "my_planted_kernels:broken")

    assert ran.code == 2
    assert "with nothing planted in it" in ran.err


def test_a_failing_kernel_is_diagnosed_by_kernels_test(run: Run) -> None:
    ran = run("kernels", "test", "--impl", "my_planted_kernels:broken", "--format", "json")
    named = {law["diagnosis"] for law in json.loads(ran.out)["properties"] if law["diagnosis"]}

    assert ran.code == 1
    assert named == {"equals F1a: nibbles exchanged"}


def test_rules_and_tolerances_are_shown_for_products(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked in ("sight", "accept"):  # what they say is tested elsewhere, at length
        monkeypatch.setattr(power, asked, lambda *arguments, **named: iter(()))
    ran = run("kernels", "power", "--op", "matmul", "--atol", "0.1", "--rtol", "0.1")

    assert ran.code == 0
    assert "atol 0.1, rtol 0.1" in ran.out
    assert "accepted on model-sized inputs:" in ran.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--atol", "0.1"), "belong together"),
        (("--atol", "1", "--rtol", "1", "--rule", "vllm"), "either --rule or"),
        (("--impl", "triton", "--rule", "vllm"), "leave out --impl"),
        (("--rule", "nobody"), "unknown rule 'nobody'"),
        (("--op", "nothing"), "unknown operation 'nothing'"),
        (("--convention", "nothing"), "unknown convention 'nothing'"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(
    run: Run, arguments: tuple[str, ...], said: str
) -> None:
    ran = run("kernels", "power", *arguments)

    assert ran.code == 2
    assert said in ran.err
