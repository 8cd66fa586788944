import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvfp4check.engine.ray import RayEngine
from nvfp4check.findings import CheckError

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, in this process

_base = 0


def prepare(base: int) -> None:
    global _base
    _base = base


def shifted(item: int) -> tuple[int, int]:
    return _base + item, os.getpid()


def refuse_three(item: int) -> int:
    if item == 3:
        raise ValueError("three")
    return item


def die_once(item: tuple[int, str]) -> int:
    """Kill the own worker the first time item 5 is done."""
    number, marker = item
    if number == 5 and not os.path.exists(marker):
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * 10


def die(item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


def slow_when_even(item: int) -> int:
    time.sleep(0.05 * (1 - item % 2))
    return item


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """A real cluster of two worker processes that can import this module."""
    root = str(Path(__file__).parents[2])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([*sys.path, root])}},
    )
    yield
    ray.shutdown()


def test_results_come_in_the_order_of_the_items() -> None:
    assert list(RayEngine().map(slow_when_even, range(12))) == list(range(12))


def test_the_work_is_done_in_other_processes_each_prepared_once() -> None:
    done = list(RayEngine().map(shifted, range(8), prepare=prepare, arguments=(100,)))

    assert [value for value, _ in done] == list(range(100, 108))
    assert os.getpid() not in {pid for _, pid in done}


def test_two_maps_are_each_prepared_for_themselves() -> None:
    engine = RayEngine()
    for base in (1000, 2000):
        done = list(engine.map(shifted, range(4), prepare=prepare, arguments=(base,)))
        assert [value for value, _ in done] == [base + item for item in range(4)]


def test_the_callback_hears_of_every_item_once_with_its_result() -> None:
    heard: list[tuple[int, int]] = []

    list(RayEngine().map(slow_when_even, range(7), finished=lambda *d: heard.append(d)))

    assert sorted(heard) == [(item, item) for item in range(7)]


def test_the_items_of_a_killed_worker_are_done_again(tmp_path: Path) -> None:
    marker = tmp_path / "died"
    items = [(number, str(marker)) for number in range(12)]

    assert list(RayEngine().map(die_once, items)) == [number * 10 for number in range(12)]
    assert marker.exists()


def test_an_item_that_kills_every_worker_is_an_error_with_advice() -> None:
    with pytest.raises(CheckError, match="--resume"):
        list(RayEngine().map(die, [1]))


def test_an_exception_of_the_function_is_raised_here_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"^three$"):
        list(RayEngine().map(refuse_three, range(6)))


def test_nothing_to_do_gives_nothing() -> None:
    assert list(RayEngine().map(shifted, [])) == []


def test_no_jobs_is_bad_usage() -> None:
    with pytest.raises(CheckError, match="--jobs"):
        RayEngine(0)
