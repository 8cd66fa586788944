"""The Ray engine: workers on every machine of a Ray cluster.

Each item is one Ray task. A task whose worker or machine is lost is done again elsewhere, up to
`RETRIES` times, so a function must give the same result when it runs twice. Every machine needs
nvfp4check and sees the checkpoint under the same path or URL.

Where a cluster runs (`ray start`, or RAY_ADDRESS), it is used; else one is started on this machine
and stopped at the end.
"""

import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from nvfp4check.engine import Finished, Item, Result
from nvfp4check.findings import CheckError

#: How often an item is done again after its worker was lost.
RETRIES = 3

#: How long a cluster may take to accept a connection.
_ANSWER_SECONDS = 10.0

#: Items handed out ahead for each processor: one to work on, one waiting.
_AHEAD = 2

#: In a worker: the maps whose `prepare` has run there.
_prepared: set[str] = set()


@dataclass(frozen=True, slots=True)
class RayEngine:
    """Work on a Ray cluster.

    `address` is Ray's: None looks for RAY_ADDRESS or a cluster on this machine before it starts
    one with `jobs` workers. Each worker takes as many processors as it has `threads`.
    """

    jobs: int = 1
    address: str | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise CheckError(f"cannot work with {self.jobs} jobs; give --jobs 1 or more")

    def kept(self) -> AbstractContextManager[None]:
        """Stay connected to the cluster from one map to the next."""
        return _connected(_ray(), self.address, self.jobs * self.threads)

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        prepare: Callable[..., None] | None = None,
        arguments: tuple[Any, ...] = (),
        finished: "Finished[Result] | None" = None,
    ) -> Iterator[Result]:
        """Yield the result of each item, in the order of the items.

        Raises:
            CheckError: Ray is not installed, there is no cluster, or an item lost its worker
                more than `RETRIES` times.
        """
        if not items:
            return
        ray = _ray()
        with self.kept():
            workers = _workers(ray, self.threads)
            job = ray.put((uuid.uuid4().hex, function, prepare, arguments))
            task = ray.remote(_work).options(num_cpus=self.threads, max_retries=RETRIES)
            ahead = workers * _AHEAD
            yield from _ordered(ray, lambda item: task.remote(job, item), items, ahead, finished)


def _work(job: tuple[str, Any, Any, tuple[Any, ...]], item: Any) -> Any:
    """Do one item in a worker, after whatever the map prepares there once."""
    name, function, prepare, arguments = job
    if prepare is not None and name not in _prepared:
        prepare(*arguments)
        _prepared.add(name)
    return function(item)


def _ordered(
    ray: ModuleType,
    start: Callable[[Item], Any],
    items: Sequence[Item],
    ahead: int,
    finished: "Finished[Result] | None",
) -> Iterator[Result]:
    """Start items a few ahead of the next result due, and yield results in order."""
    positions: dict[Any, int] = {}
    results: dict[int, Any] = {}
    started = 0
    try:
        for due in range(len(items)):
            while due not in results:
                while started < len(items) and started < due + ahead:
                    positions[start(items[started])] = started
                    started += 1
                done, _ = ray.wait(list(positions), num_returns=1)
                for reference in done:
                    position = positions.pop(reference)
                    results[position] = _result(ray, reference)
                    if finished is not None:
                        finished(position, results[position])
            yield results.pop(due)
    finally:
        for reference in positions:
            ray.cancel(reference, force=True)


def _result(ray: ModuleType, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # Raised by the function: as it is, without Ray's own class around it.
        raise error.cause from error
    except ray.exceptions.RayError as error:
        first = str(error).strip().splitlines()
        raise CheckError(
            f"Ray lost the same piece of work {RETRIES + 1} times "
            f"({first[0] if first else type(error).__name__}); see `ray status` and the logs of "
            "the machines, and run again with --resume"
        ) from error


def _workers(ray: ModuleType, threads: int) -> int:
    """Return how many workers of so many threads the machines of the cluster have room for."""
    processors = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    largest = max(processors, default=0)
    if 0 < largest < threads:
        raise CheckError(
            f"a worker takes {threads} processors, and the largest machine of the Ray cluster has "
            f"{largest}; set OMP_NUM_THREADS={largest}, or start a larger one"
        )
    # A cluster that grows on demand may begin with none.
    return max(1, sum(have // threads for have in processors))


@contextmanager
def _connected(ray: ModuleType, address: str | None, processors: int) -> Iterator[None]:
    """Be connected to a cluster: the one the process already is, one that runs, or a new one."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    chosen = address or os.environ.get("RAY_ADDRESS")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if chosen is not None:
            _require_answer(chosen)
            ray.init(address=chosen, **quiet)
        else:
            _join_or_start(ray, processors, quiet)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise CheckError(
            f"no Ray cluster at {chosen or 'this machine'}: {error}; start one with "
            "`ray start --head`, or give its address in RAY_ADDRESS"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Refuse a host and port where nobody answers: Ray would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()


def _join_or_start(ray: ModuleType, processors: int, quiet: dict[str, Any]) -> None:
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        ray.init(address="local", num_cpus=processors, include_dashboard=False, **quiet)


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise CheckError(
            "--engine ray needs Ray, which is not installed: pip install 'nvfp4check[ray]'"
        ) from None
    module: ModuleType = ray
    return module
