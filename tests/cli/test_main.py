import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import typer

import nvfp4check
from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.table import COMMANDS, Entry
from nvfp4check.findings import CheckError

Run = Callable[..., Any]

GROUPS = ("capture", "faults", "golden", "kernels")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Return a function that puts a command named `planted` into the table."""

    def plant(function: Callable[[], int]) -> None:
        module = ModuleType("planted_command")
        module.app = make_app()  # type: ignore[attr-defined]
        command(module.app, examples=("nvfp4check planted",))(function)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "planted_command", module)
        monkeypatch.setitem(COMMANDS, "planted", Entry("planted_command", "Planted by a test."))

    return plant


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_what_a_command_returns_is_the_exit_code(run: Run, planted: Any, code: int) -> None:
    planted(lambda: code)
    assert run("planted").code == code


def test_what_cannot_be_checked_is_one_line_and_exit_code_2(run: Run, planted: Any) -> None:
    def refuse() -> int:
        raise CheckError("model.safetensors: it is a directory; give a file")

    planted(refuse)
    ran = run("planted")
    assert ran.code == 2
    assert ran.err == "nvfp4check: error: model.safetensors: it is a directory; give a file\n"
    assert ran.out == ""


def test_a_message_moves_no_cursor(run: Run, planted: Any) -> None:
    def refuse() -> int:
        raise CheckError("a\x1b[2Jb\nc\u202ed\re")

    planted(refuse)
    assert run("planted").err == "nvfp4check: error: a\\x1b[2Jb\nc\\u202ed\\x0de\n"


class PanicException(BaseException):
    """Stands for what libraries written in Rust raise: it is no Exception."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("boom"),
        AssertionError(),
        MemoryError(),
        EOFError(),
        typer.Abort(),
        PanicException("boom"),
    ],
)
def test_a_crash_is_never_exit_code_1(run: Run, planted: Any, error: BaseException) -> None:
    def crash() -> int:
        raise error

    planted(crash)
    assert run("planted").code == 2


def test_a_crash_shows_its_traceback_and_asks_for_a_report(run: Run, planted: Any) -> None:
    def crash() -> int:
        raise RuntimeError("boom")

    planted(crash)
    ran = run("planted")
    assert "RuntimeError: boom" in ran.err
    assert "internal error" in ran.err
    assert "report it" in ran.err


def test_what_the_machine_refuses_is_one_line_with_the_file(run: Run, planted: Any) -> None:
    def refuse() -> int:
        with open("a" * 300, "rb"):
            return 0

    planted(refuse)
    ran = run("planted")
    assert ran.code == 2
    assert ran.err == f"nvfp4check: error: {'a' * 300}: File name too long\n"


def test_a_full_disk_is_no_bug_and_a_missing_file_may_be_one(run: Run, planted: Any) -> None:
    def fill() -> int:
        raise OSError(28, "No space left on device")

    def lose() -> int:
        raise FileNotFoundError(2, "No such file or directory", "journal.json")

    planted(fill)
    assert run("planted").err == "nvfp4check: error: No space left on device\n"
    planted(lose)
    assert "internal error" in run("planted").err


def test_an_interrupt_is_one_line_and_exit_code_130(run: Run, planted: Any) -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    planted(interrupt)
    ran = run("planted")
    assert ran.code == 130
    assert ran.err == "\nnvfp4check: interrupted\n"


def test_the_version_is_the_packages(run: Run) -> None:
    ran = run("--version")
    assert (ran.code, ran.out) == (0, f"nvfp4check {nvfp4check.__version__}\n")


def test_no_arguments_show_the_help_as_bad_usage(run: Run) -> None:
    ran = run()
    assert ran.code == 2
    assert "Usage: nvfp4check" in ran.out + ran.err


def test_help_lists_every_command_of_the_table(run: Run) -> None:
    ran = run("--help")
    assert ran.code == 0
    for name, entry in COMMANDS.items():
        assert f"  {name} " in ran.out
        assert entry.help in ran.out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_misspelt_command_is_met_with_the_right_one(run: Run, name: str) -> None:
    ran = run(name[:-2] + name[-1])
    assert ran.code == 2
    assert f"Did you mean '{name}'" in ran.err


def test_a_misspelt_option_is_met_with_the_right_one(run: Run) -> None:
    ran = run("rules", "--formta", "json")
    assert ran.code == 2
    assert "--format" in ran.err


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_ends_with_examples_of_itself(run: Run, name: str, flag: str) -> None:
    ran = run(name, flag)
    assert ran.code == 0
    text, _, examples = ran.out.partition("\n  Examples:\n")
    assert f"Usage: nvfp4check {name}" in text
    lines = examples.strip().splitlines()
    assert lines
    assert all(line.strip().startswith(f"nvfp4check {name}") for line in lines)


def _app(name: str) -> typer.Typer:
    app: typer.Typer = importlib.import_module(COMMANDS[name].module).app
    return app


def test_the_commands_with_subcommands_are_these() -> None:
    assert {name for name in COMMANDS if _app(name).registered_callback} == set(GROUPS)


@pytest.mark.parametrize("name", GROUPS)
def test_every_subcommands_help_ends_with_examples_of_itself(run: Run, name: str) -> None:
    app = _app(name)
    assert app.registered_commands
    for info in app.registered_commands:
        sub = info.name or getattr(info.callback, "__name__", "")
        text, _, examples = run(name, sub, "--help").out.partition("\n  Examples:\n")
        assert f"Usage: nvfp4check {name} {sub}" in text
        lines = examples.strip().splitlines()
        assert lines
        assert all(line.strip().startswith(f"nvfp4check {name} {sub}") for line in lines)


@pytest.mark.parametrize("name", GROUPS)
def test_a_groups_help_cuts_no_sentence_short(run: Run, name: str) -> None:
    listed = " ".join(run(name, "--help").out.split())
    for info in _app(name).registered_commands:
        assert f" {info.short_help} " in listed
        assert info.short_help.endswith(".")


def test_a_command_is_imported_only_when_it_is_called(run: Run, monkeypatch: Any) -> None:
    monkeypatch.setitem(COMMANDS, "broken", Entry("no_such_module", "Cannot be imported."))
    assert run("--help").code == 0
    assert run("rules", "--help").code == 0
    assert "No module named 'no_such_module'" in run("broken").err


def test_the_package_runs_as_a_module() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "nvfp4check", "--version"], capture_output=True, text=True
    )
    assert (finished.returncode, finished.stdout) == (0, f"nvfp4check {nvfp4check.__version__}\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_offers_the_commands(shell: str) -> None:
    words = {"bash": "complete_bash", "zsh": "complete_zsh", "fish": "complete_fish"}
    environment = os.environ | {
        "_NVFP4CHECK_COMPLETE": words[shell],
        "COMP_WORDS": "nvfp4check ru",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "nvfp4check ru",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    finished = subprocess.run(
        [sys.executable, "-m", "nvfp4check"], capture_output=True, text=True, env=environment
    )
    assert "rules" in finished.stdout


def test_completion_offers_a_commands_own_options() -> None:
    environment = os.environ | {
        "_NVFP4CHECK_COMPLETE": "complete_bash",
        "COMP_WORDS": "nvfp4check rules --f",
        "COMP_CWORD": "2",
    }
    finished = subprocess.run(
        [sys.executable, "-m", "nvfp4check"], capture_output=True, text=True, env=environment
    )
    assert finished.stdout.split() == ["--format"]
