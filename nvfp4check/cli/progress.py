"""A progress bar on stderr, where stderr is a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from nvfp4check.cli.streams import is_terminal


class Progress(Protocol):
    """Hears how much is done and how much there is in all, and what is being done."""

    def __call__(self, done: int, total: int, label: str | None = None) -> None:
        """Show it."""
        ...


@contextmanager
def progress_bar(label: str, *, in_bytes: bool = False) -> Iterator[Progress | None]:
    """Give a function to report progress to, or None where there is no one to look at it."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    amount = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None)

        def report(done: int, total: int, label: str | None = None) -> None:
            bars.update(task, completed=done, total=total, description=label)

        yield report
