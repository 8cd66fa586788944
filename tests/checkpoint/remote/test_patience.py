"""What requests to one server know together. Waits are noted, and take no time."""

import logging
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nvfp4check.checkpoint.patience import PassingError, Patience, Retry
from nvfp4check.findings import CheckError


class Waits(list[float]):
    """The waits of all requests; what happens meanwhile; a clock that only they move."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: list[Callable[[], object]] = []

    def wait(self, over: threading.Event, seconds: float) -> None:
        self.append(seconds)
        if self.meanwhile:
            self.meanwhile.pop(0)()

    def patience(self, chance: Callable[[], float] = lambda: 1.0, **options: Any) -> Patience:
        retry = Retry(wait=self.wait, clock=lambda: sum(self), chance=chance, **options)
        return Patience(retry)


def failing(*delays: float | None) -> Callable[[], str]:
    """An action that fails once for each delay that the server asks for, then succeeds."""
    left: Iterator[float | None] = iter(delays)

    def action() -> str:
        for delay in left:
            raise PassingError("busy", delay=delay)
        return "done"

    return action


def test_each_wait_is_twice_the_last_up_to_a_minute_and_attempts_are_counted() -> None:
    waits = Waits()
    patience = waits.patience(attempts=9)
    assert patience.run("x", failing(*[None] * 8)) == "done"
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    with pytest.raises(CheckError, match="x: busy, after 9 attempts; run again later"):
        patience.run("x", failing(*[None] * 9))


@pytest.mark.parametrize(("drawn", "share"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_a_part_of_each_wait_is_drawn_so_that_requests_do_not_come_back_together(
    drawn: float, share: float
) -> None:
    waits = Waits()
    assert waits.patience(lambda: drawn).run("x", failing(None, None, 30.0)) == "done"
    assert waits == [share * 1, share * 2, 30 + share * 4]


def test_what_the_defaults_draw_differs() -> None:
    random.seed(0)
    drawn = {Retry().jittered(8.0) for _ in range(99)}
    assert all(4.0 <= delay <= 8.0 for delay in drawn)
    assert len(drawn) > 90


def test_nobody_asks_a_server_that_asks_to_be_left_alone() -> None:
    waits = Waits()
    patience = waits.patience()
    asked_at: list[float] = []
    patience._leave_alone("x", 30.0)
    patience.run("beside", lambda: asked_at.append(sum(waits)))
    assert (waits, asked_at) == ([31.0], [31.0])


def test_requests_that_wait_end_with_the_reason_of_the_one_that_was_given_up() -> None:
    waits = Waits()
    patience = waits.patience(attempts=3)

    def beside() -> None:
        with pytest.raises(CheckError, match="beside: busy, after 3 attempts"):
            patience.run("beside", failing(*[None] * 9))

    waits.meanwhile = [beside]
    with pytest.raises(CheckError, match="beside: busy, after 3 attempts"):
        patience.run("x", failing(None))
    assert patience.run("later", failing(None, None)) == "done"


def test_requests_that_wait_end_with_the_reason_of_one_for_which_waiting_does_not_help() -> None:
    waits = Waits()
    patience = waits.patience()

    def refused() -> None:
        raise CheckError("beside: refused")

    def beside() -> None:
        with pytest.raises(CheckError, match="beside: refused"):
            patience.run("beside", refused)

    waits.meanwhile = [beside]
    with pytest.raises(CheckError, match="beside: refused"):
        patience.run("x", failing(None, None))
    assert waits == [1]


def test_a_server_that_asks_for_too_long_is_not_waited_for() -> None:
    waits = Waits()
    with pytest.raises(CheckError, match="busy, and asks to wait for 3,600 seconds; run again"):
        waits.patience().run("x", failing(3600.0))
    assert waits == []
    assert waits.patience().run("x", failing(600.0)) == "done"


def test_a_long_wait_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    waits = Waits()
    patience = waits.patience()
    with caplog.at_level(logging.WARNING):
        patience.run("x", failing(9.0))
        assert caplog.records == []
        patience._leave_alone("x", 300.0)
        patience._leave_alone("y", 300.0)
    assert [record.getMessage() for record in caplog.records] == [
        "x: the server asks to wait for 300 seconds"
    ]


def test_who_gives_up_wakes_what_waits() -> None:
    patience = Patience(Retry(first_delay=60.0))  # a real wait, of half a minute at least
    under_way = threading.Event()

    def action() -> None:
        under_way.set()
        raise PassingError("busy")

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(patience.run, "x", action)
        under_way.wait()
        with patience.giving_up():
            with pytest.raises(CheckError, match="given up"):
                waiting.result()
            with pytest.raises(CheckError, match="y: given up"):
                patience.run("y", action)
    assert patience.run("z", lambda: "done") == "done"


def test_a_copy_knows_that_the_server_was_reached_and_nothing_else() -> None:
    patience = Patience(Retry(attempts=3))
    patience.run("x", lambda: None)
    patience._leave_alone("x", 1e9)
    copy = pickle.loads(pickle.dumps(patience))
    assert (copy.reached, copy.retry) == (True, patience.retry)
    assert copy.run("x", lambda: "done") == "done"
