"""Ctrl-C during an import: libraries drop the exception, the program must not."""

import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvfp4check.cli.interrupts import interruptible

#: A module that is interrupted while it is imported, and drops the exception as native code does.
DEAF = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    heard = sum(range(1000))
except KeyboardInterrupt:
    heard = "dropped"
"""


@pytest.fixture(autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """Listen to Ctrl-C as at a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def deaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_deaf_module.py").write_text(DEAF)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_deaf_module", raising=False)
    return "a_deaf_module"


def _interrupted(work: Callable[[], object]) -> None:
    """Do work that is interrupted, and wait for the interrupt."""
    with interruptible():
        work()
        for _ in range(1000):
            signal.sigtimedwait([], 0.01)


def test_an_interrupt_during_an_import_is_heard_once_it_is_over(deaf: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupted(lambda: importlib.import_module(deaf))
    assert sys.modules[deaf].heard != "dropped"


def test_such_a_module_does_drop_an_interrupt(deaf: str) -> None:
    assert importlib.import_module(deaf).heard == "dropped"


def test_an_interrupt_outside_an_import_is_heard_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupted(lambda: os.kill(os.getpid(), signal.SIGINT))


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\n"
        "for _ in range(2):\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "print('imported')\n"
    )
    program = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from nvfp4check.cli.interrupts import interruptible\nwith interruptible():\n import slow"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert (finished.returncode, finished.stdout) == (130, b"")


def test_the_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)
    with interruptible():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_who_listens_already_goes_on_listening() -> None:
    def listen(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGINT, listen)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGINT) is listen
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_no_handler() -> None:
    seen = []

    def look() -> None:
        with interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
