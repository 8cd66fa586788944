import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from nvfp4check.engine.local import LocalEngine
from nvfp4check.findings import CheckError

_base = 0


@pytest.fixture(autouse=True)
def _workers_find_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])


def prepare(base: int) -> None:
    global _base
    _base = base


def shifted(item: int) -> int:
    return _base + item


def slow_when_even(item: int) -> int:
    time.sleep(0.05 * (1 - item % 2))
    return item


def refuse_three(item: int) -> int:
    if item == 3:
        raise ValueError("three")
    return item


def die(item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_the_order_of_the_items(jobs: int) -> None:
    assert list(LocalEngine(jobs).map(slow_when_even, range(9))) == list(range(9))


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_worker_is_prepared_before_its_first_item(jobs: int) -> None:
    done = LocalEngine(jobs).map(shifted, range(5), prepare=prepare, arguments=(100,))
    assert list(done) == [100, 101, 102, 103, 104]


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_callback_hears_of_every_item_once_with_its_result(jobs: int) -> None:
    heard: list[tuple[int, int]] = []
    engine = LocalEngine(jobs)
    list(engine.map(slow_when_even, range(7), finished=lambda *done: heard.append(done)))
    assert sorted(heard) == [(item, item) for item in range(7)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_exception_of_the_function_is_raised_here(jobs: int) -> None:
    with pytest.raises(ValueError, match="three"):
        list(LocalEngine(jobs).map(refuse_three, range(6)))


def test_a_worker_that_dies_is_an_error_with_advice() -> None:
    with pytest.raises(CheckError, match="--jobs"):
        list(LocalEngine(2).map(die, range(4)))


@pytest.mark.parametrize("jobs", [0, -1])
def test_no_jobs_is_bad_usage(jobs: int) -> None:
    with pytest.raises(CheckError, match="--jobs"):
        LocalEngine(jobs)


def test_nothing_to_do_gives_nothing() -> None:
    assert list(LocalEngine(2).map(shifted, [])) == []


def threads_of_linear_algebra(_: int) -> set[int]:
    matrix = np.ones((8, 8))
    _ = matrix @ matrix
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_workers_do_not_spread_their_linear_algebra_over_the_processors_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    counts = list(LocalEngine(2).map(threads_of_linear_algebra, range(4)))
    assert counts == [{1}] * 4
