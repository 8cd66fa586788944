"""Ctrl-C that is heard, also while a library is being imported.

Native code that runs in the middle of an import, torch's above all, drops the exceptions raised in
it, and a KeyboardInterrupt with them: the program then runs on as if nothing had been pressed. So
an interrupt that comes during an import waits until the import is over. One more ends the program
at once.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nvfp4check.cli.exit_codes import ExitCode

#: How often an interrupt that waits looks whether the import is over.
_SECONDS = 0.02

_IMPORT_MACHINERY = "<frozen importlib._bootstrap>"


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the block, but no import in it.

    Where someone else listens to Ctrl-C already, or the timer is in use, nothing changes.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL
    ):
        yield
        return
    try:
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGALRM, _interrupt)
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    if not _imports(frame):
        raise KeyboardInterrupt
    one_waits = signal.getitimer(signal.ITIMER_REAL)[0] > 0
    if signum == signal.SIGINT and one_waits:
        os._exit(ExitCode.INTERRUPTED)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)


def _imports(frame: FrameType | None) -> bool:
    """Tell whether this frame runs for an import."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_MACHINERY:
            return True
        frame = frame.f_back
    return False
