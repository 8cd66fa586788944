import os
import pty
import subprocess
import sys

import pytest

from nvfp4check.cli.progress import progress_bar

DRAW = (
    "from nvfp4check.cli.progress import progress_bar\n"
    "with progress_bar('Reading', in_bytes=True) as report:\n"
    "    report(5_000_000, 10_000_000)\n"
    "print('result')\n"
)


def test_where_nobody_looks_there_is_no_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with progress_bar("Reading") as report:
        assert report is None


def test_on_a_terminal_progress_goes_to_stderr_and_the_result_to_stdout() -> None:
    terminal, side = pty.openpty()
    finished = subprocess.run(
        [sys.executable, "-c", DRAW],
        stdout=subprocess.PIPE,
        stderr=side,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        check=True,
    )
    os.close(side)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert finished.stdout == b"result\n"
    assert "Reading" in shown
    assert "5.0/10.0 MB" in shown
