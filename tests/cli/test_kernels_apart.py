"""A kernel that ends its process, never comes back or spoils the GPU is a result with its name."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

from nvfp4check.cli import kernels_apart
from nvfp4check.cli.kernels_apart import MOST_DEATHS, asked_apart
from nvfp4check.cli.kernels_runs import Key, Question, Record, document, ended
from nvfp4check.findings import CheckError

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

QUESTION = Question(op="swizzle", impl="mine")
HEADER = {"op": "swizzle", "impl": "mine"}


def leaves() -> None:
    os._exit(5)


def leaves_as_if_done() -> None:
    os._exit(0)


def crashes() -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    ctypes.string_at(0)


def interrupts() -> None:
    raise KeyboardInterrupt


def hangs() -> None:
    time.sleep(600)


def refuses() -> None:
    raise CheckError("there is no such kernel")


def has_a_bug() -> None:
    raise LookupError("a bug of ours")


def prints() -> None:
    print("not JSON", flush=True)
    os.write(1, b"nor this\n")


def ask(monkeypatch: pytest.MonkeyPatch, laws: dict[str, object]) -> None:
    """Let the child ask laws that are functions, and pass when they come back."""

    def asked(
        question: Question, known: Mapping[Key, Record], lost: Collection[tuple[str, str]]
    ) -> Iterator[Record]:
        yield {"run": HEADER}
        for name, law in laws.items():
            outcome = known.get(("swizzle", "mine", name))
            if outcome is None and ("swizzle", "mine") in lost:
                outcome = ended(name, "", "skip", "")
            if outcome is None:
                yield {"begun": name, "if_ended": ended(name, "words", "fail", "")}
                if callable(law):
                    law()
                outcome = ended(name, "words", "pass", "")
            yield {"found": name, "outcome": outcome}

    monkeypatch.setattr(kernels_apart, "asked", asked)


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (leaves, "the kernel's process ended with exit code 5"),
        (leaves_as_if_done, "the kernel's process ended with exit code 0"),
        (crashes, "the kernel's process was ended by SIGSEGV"),
        (interrupts, "the kernel's process raised KeyboardInterrupt"),
    ],
)
def test_a_death_fails_the_property_under_way_and_the_others_are_asked(
    monkeypatch: pytest.MonkeyPatch, law: object, message: str
) -> None:
    ask(monkeypatch, {"first": None, "deadly": law, "last": None})

    found = document(QUESTION, asked_apart(QUESTION))

    verdicts = {one["name"]: (one["verdict"], one["message"]) for one in found["properties"]}
    assert verdicts == {"first": ("pass", ""), "deadly": ("fail", message), "last": ("pass", "")}
    assert found["verdict"] == "fail"


def test_a_property_that_does_not_come_back_is_ended_after_the_time_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask(monkeypatch, {"endless": hangs, "last": None})

    found = document(QUESTION, asked_apart(QUESTION, seconds=2))

    assert [one["verdict"] for one in found["properties"]] == ["fail", "pass"]
    assert found["properties"][0]["message"] == (
        "the kernel's process did not come back within 2 s"
    )


def test_a_kernel_that_ends_its_process_again_and_again_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask(monkeypatch, {str(number): leaves for number in range(MOST_DEATHS + 2)})

    found = document(QUESTION, asked_apart(QUESTION))

    assert [one["verdict"] for one in found["properties"]] == ["fail"] * MOST_DEATHS + ["skip"] * 2


def test_after_an_error_that_the_gpu_keeps_another_process_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(
        question: Question, known: Mapping[Key, Record], lost: Collection[tuple[str, str]]
    ) -> Iterator[Record]:
        yield {"run": HEADER}
        for name in ("first", "last"):
            outcome = known.get(("swizzle", "mine", name))
            if outcome is None:
                outcome = ended(name, "words", "fail", f"found by {os.getpid()}")
                yield {"found": name, "outcome": outcome}
                yield {"unusable": "cuda"}
                os._exit(9)  # what comes after is not heard
            yield {"found": name, "outcome": outcome}

    monkeypatch.setattr(kernels_apart, "asked", asked)

    found = document(QUESTION, asked_apart(QUESTION))["properties"]

    assert [one["name"] for one in found] == ["first", "last"]
    assert len({one["message"] for one in found}) == 2


def test_a_death_before_any_property_could_not_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*arguments: object) -> Iterator[Record]:
        leaves()
        yield {}

    monkeypatch.setattr(kernels_apart, "asked", asked)

    with pytest.raises(CheckError, match="mine: the process ended with exit code 5 before"):
        asked_apart(QUESTION)


def test_what_the_child_refuses_and_what_breaks_in_it_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask(monkeypatch, {"first": refuses})
    with pytest.raises(CheckError, match="there is no such kernel"):
        asked_apart(QUESTION)

    ask(monkeypatch, {"first": has_a_bug})
    with pytest.raises(RuntimeError, match="LookupError: a bug of ours"):
        asked_apart(QUESTION)


def test_what_a_kernel_prints_goes_to_the_standard_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(monkeypatch, {"talkative": prints})
    asked_apart(QUESTION)
    out, err = capfd.readouterr()

    assert (out, err) == ("", "not JSON\nnor this\n")


def test_no_child_is_forked_where_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert not kernels_apart.possible()

    monkeypatch.delitem(sys.modules, "torch")
    assert kernels_apart.possible()


KERNEL = """
import os
from nvfp4ref.layout import swizzle as right

def swizzle(block_scales):
    print("noise")
    if block_scales.shape[0] == 129:
        os._exit(0)
    return right(block_scales)
"""


def test_the_command_says_what_ended_and_asks_the_rest(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(KERNEL)
    line = ("kernels", "test", "--impl", "deadly:swizzle", "--format", "json")
    ran = subprocess.run(
        [sys.executable, "-m", "nvfp4check", *line], cwd=tmp_path, capture_output=True, text=True
    )

    properties = json.loads(ran.stdout)["properties"]
    verdicts = [one["verdict"] for one in properties]
    assert ran.returncode == 1
    assert verdicts[0] == "fail"
    assert set(verdicts[1:]) == {"pass"}
    assert properties[0]["message"] == "the kernel's process ended with exit code 0"


DEADLY = """
import os
from nvfp4ref.fp8_block import dequantize

def dequantize_fp8_block(w, scale_inv, dtype):
    if {condition}:
        os._exit(5)
    return dequantize(w, scale_inv, dtype)
"""


def planted_in(folder: Path, condition: str) -> "subprocess.CompletedProcess[str]":
    (folder / "deadly.py").write_text(DEADLY.format(condition=condition))
    line = ("kernels", "power", "--impl", "deadly:dequantize_fp8_block", "--format", "json")
    return subprocess.run(
        [sys.executable, "-m", "nvfp4check", *line], cwd=folder, capture_output=True, text=True
    )


def test_a_planted_fault_that_ends_the_process_is_seen_and_the_others_are_planted(
    tmp_path: Path,
) -> None:
    # The suite's scales are 15 at most; a fault that inverts them makes larger ones.
    ran = planted_in(tmp_path, "(scale_inv > 16).any()")

    planted = {
        one["id"]: (one["seen_by"], one["message"]) for one in json.loads(ran.stdout)["faults"]
    }
    assert ran.returncode == 0
    assert planted == {
        "F7a": ("every-byte", "the kernel's process ended with exit code 5"),
        "F7b": ("every-byte", ""),
        "F7c": ("every-byte", ""),
    }


def test_a_kernel_that_ends_its_process_with_nothing_planted_is_refused(tmp_path: Path) -> None:
    ran = planted_in(tmp_path, "True")

    assert ran.returncode == 2
    assert "(the kernel's process ended with exit code 5) with nothing planted in it" in ran.stderr
