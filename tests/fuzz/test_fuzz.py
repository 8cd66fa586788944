"""A short, deterministic share of what `python -m nvfp4check.bench fuzz` does at length."""

from pathlib import Path

import pytest

from nvfp4check.bench import fuzz
from nvfp4check.bench.fuzz_cases import TARGETS, sound
from nvfp4check.bench.fuzz_lines import LINE_TARGETS, UncaughtError, run_line, sound_home
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.findings import CheckError
from nvfp4check.report.formats import Format


@pytest.mark.parametrize("target", TARGETS)
def test_no_damaged_checkpoint_ends_in_a_traceback(target: str, tmp_path: Path) -> None:
    cases = 25
    counts, crashes = fuzz.run_batch(target, cases, seed=1, directory=tmp_path / "case", seconds=60)
    assert crashes == []
    assert sum(counts.values()) >= cases * 0.8  # hypothesis may end early where cases repeat


@pytest.mark.parametrize("target", LINE_TARGETS)
def test_no_damaged_file_ends_a_command_in_a_traceback(target: str, tmp_path: Path) -> None:
    cases = 12
    counts, crashes = fuzz.run_batch(target, cases, seed=1, directory=tmp_path / "case", seconds=60)
    assert crashes == []
    assert sum(counts.values()) >= cases * 0.8


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("diff {nvfp4} {nvfp4}", "holds"),
        ("validate {nvfp4} --base {fp8}", "holds"),
        ("agree {run} {run}", "holds"),
        ("golden verify {case} --run {run}", "holds"),
    ],
)
def test_what_is_damaged_for_the_command_lines_is_sound(line: str, verdict: str) -> None:
    assert run_line(line, sound_home() / "golden", Format.TEXT)[0] == verdict


def test_a_traceback_of_a_command_is_a_crash_with_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def crash(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("nvfp4check.cli.rules.rules_document", crash)
    with pytest.raises(UncaughtError, match="KeyError: 'x'") as raised:
        run_line("rules NV6", tmp_path, Format.TEXT)
    assert raised.value.where.startswith("rules.py:")


def test_the_checkpoint_that_is_damaged_is_sound(tmp_path: Path) -> None:
    fuzz.write_files(tmp_path / "case", dict(sound()))
    assert fuzz.exercise(tmp_path / "case", RuleLevel.BYTES, tuple(Format)) == "pass"


@pytest.mark.parametrize(
    ("error", "name"),
    [(KeyError("x"), "KeyError"), (fuzz.HangError("5 s"), "HangError"), (MemoryError(), "Memory")],
)
def test_a_crash_is_seen_and_kept_with_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, name: str
) -> None:
    def crash(*_: object) -> str:
        raise error

    monkeypatch.setattr(fuzz, "open_checkpoint", crash)
    counts, crashes = fuzz.run_batch("data", 3, seed=1, directory=tmp_path / "case")
    assert counts == {"crashed": len(crashes)}
    assert crashes[0].error.startswith(name)
    assert crashes[0].target == "data"
    assert "config.json" in crashes[0].files


def test_a_refusal_is_no_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> str:
        raise CheckError("no checkpoint here")

    monkeypatch.setattr(fuzz, "open_checkpoint", refuse)
    counts, crashes = fuzz.run_batch("data", 3, seed=1, directory=tmp_path / "case")
    assert crashes == []
    assert set(counts) == {"refused"}


def test_a_case_that_hangs_is_ended() -> None:
    @fuzz.time_limit(0.05)
    def spin() -> None:
        while True:
            pass

    with pytest.raises(fuzz.HangError, match=r"more than 0\.05 s"):
        spin()


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\u202eb", "a\0b", "\ud800"])
def test_text_that_a_terminal_would_act_upon_is_a_crash(text: str) -> None:
    with pytest.raises(fuzz.OutputError):
        fuzz._check_text(text, "text")
