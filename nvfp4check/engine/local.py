"""The local engine: worker processes on this machine, or this process when one is enough."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from threadpoolctl import threadpool_limits

from nvfp4check.engine import Engine, Finished, Item, Result
from nvfp4check.findings import CheckError

#: Items handed out ahead for each worker: one to work on, one waiting. Bounds what lies in
#: memory when results are large.
_AHEAD = 2
#: What another process takes to start and to load what the work needs, torch and compiled kernels.
START_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """Work on this machine with `jobs` processes; with one, in the calling process."""

    jobs: int = 1

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise CheckError(f"cannot work with {self.jobs} jobs; give --jobs 1 or more")

    def kept(self) -> AbstractContextManager[None]:
        """Keep nothing: each map has its own processes."""
        return nullcontext()

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
            CheckError: A worker process died.
        """
        if self.jobs == 1 or len(items) <= 1:
            yield from _here(function, items, prepare, arguments, finished)
            return
        # Spawned, not forked: a fork of a process with threads (torch, rich) may deadlock.
        pool = ProcessPoolExecutor(
            min(self.jobs, len(items)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(prepare, arguments),
        )
        try:
            yield from _ordered(pool, function, items, self.jobs * _AHEAD, finished)
        except BrokenProcessPool as error:
            raise CheckError(
                f"a worker process died ({error}); often memory ran out: try fewer --jobs"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def alone_if_sooner(engine: Engine, seconds: float) -> Engine:
    """Take this process in place of several that would start for longer than they save.

    `seconds` is what the work takes one process.
    """
    if isinstance(engine, LocalEngine) and seconds * (1 - 1 / engine.jobs) <= START_SECONDS:
        return LocalEngine(1)
    return engine


def one_thread() -> None:
    """Have linear algebra computed in the thread that asks for it, here and in what loads later.

    Work is spread over processes. Threads of each besides would wait for those of the others, and
    wait by turning in a circle: two processes on two cores then take many times as long as one.
    """
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    threadpool_limits(limits=1)


def _begin(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    one_thread()
    if prepare is not None:
        prepare(*arguments)


def _here(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    prepare: Callable[..., None] | None,
    arguments: tuple[Any, ...],
    finished: "Finished[Result] | None",
) -> Iterator[Result]:
    """Work through the items in this process."""
    if prepare is not None and items:
        prepare(*arguments)
    for position, item in enumerate(items):
        result = function(item)
        if finished is not None:
            finished(position, result)
        yield result


def _ordered(
    pool: ProcessPoolExecutor,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    ahead: int,
    finished: "Finished[Result] | None",
) -> Iterator[Result]:
    """Hand out items a few ahead of the next result due, and yield results in order."""
    positions: dict[Future[Result], int] = {}
    results: dict[int, Result] = {}
    handed_out = 0
    for due in range(len(items)):
        while due not in results:
            while handed_out < len(items) and handed_out < due + ahead:
                positions[pool.submit(function, items[handed_out])] = handed_out
                handed_out += 1
            done, _ = wait(positions, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=positions.__getitem__):
                position = positions.pop(future)
                results[position] = future.result()
                if finished is not None:
                    finished(position, results[position])
        yield results.pop(due)
