"""Patience with a server, which all requests to it share.

A failure that may pass is waited for and the request made again, each time about twice as long
after; a part of the wait is drawn by chance, so that requests that failed together do not come
back together. While a server asks to be left alone, no request is made. When one request is given
up, so are those beside it: the run ends with that one's reason, and the server is asked no more.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from nvfp4check.findings import CheckError

#: A wait between two attempts grows no longer, unless the server asks for more.
_LONGEST_DELAY = 60.0
#: A server that asks for more is not waited for. The Hub counts requests in windows of 300 seconds.
_LONGEST_ASKED = 600.0
#: Waits from here on are told: else a program that waits looks like one that hangs.
_TOLD = 10.0

_LOG = logging.getLogger(__name__)

Result = TypeVar("Result")


class PassingError(Exception):
    """A failure that may pass.

    `delay` is what the server asked to wait, if it did; `unreachable` says that there was no
    server at all: then waiting rarely helps.
    """

    def __init__(self, why: str, *, delay: float | None = None, unreachable: bool = False) -> None:
        super().__init__(why)
        self.delay = delay
        self.unreachable = unreachable


def _chance() -> float:
    return random.random()


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how patiently a request is repeated.

    A server that has never answered is given `first_attempts`: its name is probably wrong.
    """

    attempts: int = 6
    first_attempts: int = 2
    first_delay: float = 1.0
    #: Wait for seconds, or until the event.
    wait: Callable[[threading.Event, float], object] = threading.Event.wait
    clock: Callable[[], float] = time.monotonic
    #: A number between 0 and 1.
    chance: Callable[[], float] = _chance

    def jittered(self, delay: float) -> float:
        """Give a delay between half and the whole."""
        return min(delay, _LONGEST_DELAY) * (1 + self.chance()) / 2


class _Round:
    """Requests that are given up together: whether they are, and why."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.why = ""


class Patience:
    """What the requests to one server know together. A copy in another process begins anew."""

    def __init__(self, retry: Retry, *, reached: bool = False) -> None:
        self.retry = retry
        #: Whether the server has answered yet.
        self.reached = reached
        self._not_before = self._told_until = float("-inf")
        self._round = _Round()
        self._nobody_takes = 0
        self._lock = threading.Lock()

    def run(self, what: str, action: Callable[[], Result]) -> Result:
        """Do an action until it succeeds.

        Raises:
            CheckError: every attempt failed, here or in a request beside this one.
        """
        with self._lock:
            retry, together, taken = self.retry, self._round, not self._nobody_takes
        if not taken:
            raise CheckError(f"{what}: {_GIVEN_UP}")
        delay = retry.first_delay
        attempt = 0
        while True:
            self._wait_while_asked(together)
            attempt += 1
            try:
                result = action()
            except PassingError as error:
                why = self._why_no_more(error, attempt)
                if why is not None:
                    self._end(together, f"{what}: {why}")
                    raise CheckError(together.why) from error
                asked = max(error.delay or 0.0, 0.0)
                self._leave_alone(what, asked)
                self._wait(together, asked + retry.jittered(delay))
            except CheckError as error:  # waiting does not help: not here, nor beside
                self._end(together, str(error))
                raise
            else:
                self.reached = True
                return result
            delay *= 2

    @contextmanager
    def giving_up(self) -> Iterator[None]:
        """End what waits, and what begins meanwhile: nobody will take its result."""
        with self._lock:
            self._nobody_takes += 1
            self._close(_GIVEN_UP)
        try:
            yield
        finally:
            with self._lock:
                self._nobody_takes -= 1

    def _why_no_more(self, error: PassingError, attempt: int) -> str | None:
        if error.delay is not None and error.delay > _LONGEST_ASKED:
            return f"{error}, and asks to wait for {error.delay:,.0f} seconds{_LATER}"
        new = error.unreachable and not self.reached
        if attempt < (self.retry.first_attempts if new else self.retry.attempts):
            return None
        return f"{error}, after {attempt} attempts{_SPELLING if new else _LATER}"

    def _end(self, together: _Round, why: str) -> None:
        with self._lock:
            if self._round is together:
                self._close(why)

    def _close(self, why: str) -> None:
        self._round.why = why
        self._round.over.set()
        self._round = _Round()

    def _leave_alone(self, what: str, seconds: float) -> None:
        with self._lock:
            now = self.retry.clock()
            self._not_before = max(self._not_before, now + seconds)
            tell = seconds >= _TOLD and now >= self._told_until
            if tell:
                self._told_until = now + seconds
        if tell:
            _LOG.warning("%s: the server asks to wait for %.0f seconds", what, seconds)

    def _wait_while_asked(self, together: _Round) -> None:
        remaining = self._not_before - self.retry.clock()
        if remaining > 0:
            self._wait(together, remaining + self.retry.jittered(self.retry.first_delay))

    def _wait(self, together: _Round, seconds: float) -> None:
        self.retry.wait(together.over, seconds)
        if together.over.is_set():
            raise CheckError(together.why)

    def __reduce__(self) -> tuple[Callable[..., "Patience"], tuple[Retry, bool]]:
        return _anew, (self.retry, self.reached)


def _anew(retry: Retry, reached: bool) -> Patience:
    return Patience(retry, reached=reached)


_GIVEN_UP = "given up, as a request beside it failed"
_SPELLING = "; check the spelling of the address and the network"
_LATER = "; run again later, validate with --resume to go on where it stopped"
