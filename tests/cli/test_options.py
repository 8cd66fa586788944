import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4check.cli.options import line_width, prepared_format, split_ids, wants_color, write
from nvfp4check.findings import CheckError
from nvfp4check.report.formats import Format

TINY = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3" / "nvfp4"


def test_a_file_is_written_whole_with_the_usual_mode(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    mask = os.umask(0o022)
    try:
        write("é\n", target)
    finally:
        os.umask(mask)
    assert target.read_text(encoding="utf-8") == "é\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_exists_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    target.chmod(0o600)
    write("new", target)
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckError, match="No space left on device"):
        write("new", target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_is_kept_and_the_file_behind_it_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    write("new", link)
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_device_is_written_to_and_not_replaced() -> None:
    write("text", Path(os.devnull))
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


@pytest.mark.parametrize("path", ["no/such/directory/report.json", "."])
def test_a_path_that_cannot_be_written_is_refused_with_advice(tmp_path: Path, path: str) -> None:
    with pytest.raises(CheckError, match="give --output a path"):
        write("text", tmp_path / path)


def test_a_reader_that_goes_away_changes_nothing_about_the_exit_code() -> None:
    code = (
        "import sys; from pathlib import Path; from nvfp4check.cli.options import write;"
        "write('x' * 10_000_000, None); sys.exit(1)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    complaint = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert complaint == b""


def shell(line: str, *, buffered: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a line whose first word is left out: the program's name."""
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    return subprocess.run(
        f"{sys.executable} -m nvfp4check {line}",
        shell=True,
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize(
    ("redirection", "why", "buffered"),
    [
        (">/dev/full", "No space left on device", True),
        (">/dev/full", "No space left on device", False),
        (">&-", "it is closed", True),
    ],
)
@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("--help", ""),
        ("kernels list -h", ""),
        ("rules NV602", "; give --output a file"),
    ],
)
def test_a_stdout_that_takes_nothing_is_said_and_is_exit_code_2(
    command: str, advice: str, redirection: str, why: str, buffered: bool
) -> None:
    finished = shell(f"{command} {redirection}", buffered=buffered)

    assert finished.stderr == f"nvfp4check: error: cannot write to stdout: {why}{advice}\n"
    assert finished.returncode == 2


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("agree no such", 2),
        ("no-command", 2),
        ("rules NV602", 0),
        (f"validate {TINY} --level headers", 0),
    ],
)
def test_a_stderr_that_takes_nothing_changes_no_exit_code(
    command: str, code: int, redirection: str
) -> None:
    assert shell(f"{command} {redirection}").returncode == code


@pytest.mark.parametrize("command", ["--help", "agree -h"])
def test_a_help_that_nobody_reads_is_no_error(command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "nvfp4check", *command.split()]
    finished = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)

    assert (finished.returncode, finished.stderr) == (0, b"")


def test_a_stream_that_cannot_say_a_character_gets_its_escape() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", "from nvfp4check.cli.options import write; write('a…', None)"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert finished.stdout == b"a\\u2026"


@pytest.mark.parametrize(
    ("asked", "output", "expected"),
    [
        (None, None, Format.TEXT),
        (None, "r.json", Format.JSON),
        (None, "r.md", Format.MARKDOWN),
        (None, "R.HTML", Format.HTML),
        (None, "r.xml", Format.JUNIT),
        (None, "r.sarif", Format.SARIF),
        (None, "r.1.Sarif.json", Format.SARIF),
        (None, "sarif.json", Format.JSON),
        (None, "r.markdown", Format.MARKDOWN),
        (None, "r.txt", Format.TEXT),
        (None, "r", Format.TEXT),
        (None, "v1.2/r", Format.TEXT),
        (Format.JSON, "r.pdf", Format.JSON),
        (Format.JSON, "r.html", Format.JSON),
    ],
)
def test_the_format_is_the_one_asked_for_else_the_suffix(
    asked: Format | None, output: str | None, expected: Format, tmp_path: Path
) -> None:
    if output is not None:
        (tmp_path / output).parent.mkdir(exist_ok=True)
    assert prepared_format(asked, tmp_path / output if output else None, Format) is expected


@pytest.mark.parametrize("name", ["r.pdf", "r.json.gz", "r.jsn", "r.html~"])
def test_a_suffix_of_no_format_is_refused_with_the_formats(tmp_path: Path, name: str) -> None:
    suffix = Path(name).suffix
    with pytest.raises(CheckError, match=rf"{suffix} is the suffix of no format; .* or sarif$"):
        prepared_format(None, tmp_path / name, Format)


def test_ids_may_be_repeated_or_joined_by_commas() -> None:
    assert split_ids(["nv2, NV602", "NV1"]) == ("NV2", "NV602", "NV1")
    assert split_ids(None) == ()


@pytest.mark.parametrize(
    ("columns", "terminal", "output", "expected"),
    [
        ("60", True, None, 60),
        ("200", True, None, 100),
        ("60", False, None, 100),
        ("60", True, Path("file"), 100),
    ],
)
def test_prose_is_as_wide_as_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch,
    columns: str,
    terminal: bool,
    output: Path | None,
    expected: int,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert line_width(output) == expected


@pytest.mark.parametrize(
    ("environment", "terminal", "output", "expected"),
    [
        ({}, True, None, True),
        ({}, False, None, False),
        ({}, True, Path("file"), False),
        ({"NO_COLOR": "1"}, True, None, False),
        ({"NO_COLOR": ""}, True, None, True),
        ({"TERM": "dumb"}, True, None, False),
    ],
)
def test_colour_needs_a_terminal_and_no_objection(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    terminal: bool,
    output: Path | None,
    expected: bool,
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert wants_color(output) is expected
