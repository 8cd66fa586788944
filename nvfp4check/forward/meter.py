"""Where the time of a run goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Meter:
    """Seconds by kind of work, and bytes read.

    `read` is the time of the reading thread and runs beside the others; `wait` is what the
    computation lost waiting for it.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0

    @contextmanager
    def timing(self, work: str) -> Iterator[None]:
        """Add the time inside to one kind of work."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(work, time.perf_counter() - start)

    def add(self, other: "Meter") -> None:
        """Add what another has measured, in a worker; its seconds ran beside these."""
        self.bytes_read += other.bytes_read
        for work, spent in other.seconds.items():
            self._add(work, spent)

    def _add(self, work: str, spent: float) -> None:
        self.seconds[work] = self.seconds.get(work, 0.0) + spent
