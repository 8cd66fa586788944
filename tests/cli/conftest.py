"""Run a command line inside the test's own process."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from nvfp4check.cli.main import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Return a function that runs a command line and gives its exit code and both streams."""

    def run_line(*argv: str) -> Ran:
        capsys.readouterr()
        code = main(argv)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run_line
