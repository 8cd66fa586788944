"""Engines: how work is spread, behind one small interface.

An engine maps a function over work items. Function, items and results are picklable; results
come back in the order of the items; a callback hears of each as it finishes. Whoever calls knows
nothing else about where the work ran.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Hears of each finished item: its position, and what came of it. Called in the calling process,
#: in the order of finishing.
Finished = Callable[[int, Result], None]


class Engine(Protocol):
    """Maps work over whatever the engine has."""

    def kept(self) -> AbstractContextManager[None]:
        """Keep what is dear to set up, such as a cluster, from one map inside to the next."""
        ...

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

        `prepare(*arguments)` runs once in each worker before its first item. An exception of the
        function is raised here, and what is still waiting is given up.
        """
        ...
