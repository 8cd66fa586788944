"""stdout and stderr, either of which may be full, closed, or read by nobody any more."""

import errno
import os
import sys
from typing import TextIO

from nvfp4check.findings import CheckError


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether someone looks at a stream; one that was closed is None."""
    return stream is not None and stream.isatty()


def write_stdout(text: str, advice: str = "") -> None:
    """Write a result to stdout.

    A reader that goes away, as `head` does, changes nothing about the exit code. `advice` ends the
    message.

    Raises:
        CheckError: It takes nothing.
    """
    try:
        if sys.stdout is None:  # what Python makes of a descriptor that was closed before it began
            raise OSError(errno.EBADF, "it is closed")
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        _silence(sys.stdout)
    except OSError as error:
        _silence(sys.stdout)
        raise CheckError(f"cannot write to stdout: {error.strerror}{advice}") from error


def stdout_that_refuses() -> str:
    """Return what to call stdout if it does not take what a library left in its buffer, else ""."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _silence(sys.stdout)
        return "cannot write to stdout"
    return ""


def write_stderr(text: str) -> None:
    """Write a message to stderr, as far as it takes it: a message lost changes no exit code."""
    try:
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()
    except OSError:
        _silence(sys.stderr)


def _silence(stream: TextIO | None) -> None:
    """Give a stream a place that takes everything: the interpreter flushes it once more at exit."""
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
