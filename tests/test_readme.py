"""The README tells the truth: its commands run and print what it says they print."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4check.cli.main import main
from nvfp4check.cli.table import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

#: A fenced block: its language and its text.
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
CONSOLE = [text for language, text in BLOCKS if language == "console"]
SHELL = [text.strip() for language, text in BLOCKS if language == "sh"]


def matches(shown: str, printed: str) -> bool:
    """Tell whether a block shows what was printed.

    A line of `…` stands for any number of lines, and a time for any time.
    """
    lines = shown.rstrip("\n").split("\n")
    pattern = "\n".join(r"(?:.*\n)*?.*" if line == "…" else re.escape(line) for line in lines)
    pattern = re.sub(r"\d+\\\.\d\\ s\b", r"\\d+\\.\\d s", pattern)
    return re.fullmatch(pattern, printed.rstrip("\n")) is not None


def commands_and_output(block: str) -> tuple[list[str], str]:
    """Split a block into its command lines, which begin with `$ `, and what is shown below."""
    lines = block.splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return commands, "\n".join(lines[len(commands) :])


@pytest.mark.parametrize("block", CONSOLE, ids=lambda block: commands_and_output(block)[0][-1])
def test_a_block_shows_what_its_commands_print(
    block: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "goldens").symlink_to(ROOT / "goldens")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    (*before, line), shown = commands_and_output(block)
    for command in before:
        subprocess.run(command, shell=True, check=True)
    program, *arguments = shlex.split(line)
    assert program == "nvfp4check"
    main(arguments)
    printed = capsys.readouterr().out
    assert matches(shown, printed), printed


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\nb\n", "a\nc\n", False),
        ("a\n…\nd\n", "a\nb\nc\nd\n", True),
        ("a\n…\nd\n", "a\nb\nc\n", False),
        ("in 1.2 s.\n", "in 13.4 s.\n", True),
        ("in 1.2 s.\n", "in 1.2 m.\n", False),
        ("a.b\n", "acb\n", False),
    ],
)
def test_the_comparison_sees_a_block_that_lies(shown: str, printed: str, expected: bool) -> None:
    assert matches(shown, printed) is expected


def test_there_are_blocks_to_compare() -> None:
    assert len(CONSOLE) >= 3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_section_and_its_line_in_the_table(name: str) -> None:
    assert f"\n### {name}\n" in README
    assert re.search(rf"^\| `nvfp4check {name}\b.*` \|", README, re.MULTILINE)


def test_no_command_is_named_that_does_not_exist() -> None:
    named = set(re.findall(r"^\| `nvfp4check (\w+)", README, re.MULTILINE))
    named |= {shlex.split(commands_and_output(block)[0][-1])[1] for block in CONSOLE}
    assert named <= set(COMMANDS)


def test_the_first_commands_install_and_then_run_every_test() -> None:
    assert SHELL[0] == (
        "python3 -m venv .venv && .venv/bin/pip install . "
        "&& .venv/bin/nvfp4check validate goldens/tiny-deepseek-v3/nvfp4 "
        "--base goldens/tiny-deepseek-v3/fp8"
    )
    assert SHELL[1] == "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox"


def test_ci_runs_the_readmes_test_command() -> None:
    last = (ROOT / ".ci/run").read_text(encoding="utf-8").strip().splitlines()[-1]
    assert last == SHELL[1]


def test_every_path_that_is_named_exists() -> None:
    paths = re.findall(r"`((?:nvfp4check|reference|tests|goldens)/[\w./-]+)`", README)
    paths = [path for path in paths if not re.search(r"/\d+$", path)]  # a schema's name
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_json_of_a_validation_has_the_fields_that_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (shown,) = (json.loads(text) for language, text in BLOCKS if language == "json")
    main(["validate", str(ROOT / "goldens/tiny-deepseek-v3/nvfp4-raw"), "--format", "json"])
    document = json.loads(capsys.readouterr().out)
    assert document.keys() == shown.keys()
    assert document["findings"][0].keys() == shown["findings"][0].keys()
    for part in ("tool", "checkpoint", "coverage"):
        assert document[part].keys() == shown[part].keys()
