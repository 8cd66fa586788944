"""Histograms of codes and scales, as bars with heights in per cent of the tallest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: A bar that stands for anything at all is drawn at least this high, in per cent.
_LEAST_HEIGHT = 0.7


@dataclass(frozen=True, slots=True)
class Bar:
    """One value, how often it occurs, and how high that is drawn."""

    count: int
    height: float
    title: str


@dataclass(frozen=True, slots=True)
class Plot:
    """A histogram: its bars, and the words that stand evenly spaced below them."""

    title: str
    caption: str
    bars: tuple[Bar, ...]
    ticks: tuple[str, ...]


def histogram(
    title: str, caption: str, counts: Mapping[str, int], ticks: Sequence[str] | None = None
) -> Plot:
    """Return the histogram of counts by label; the labels are the ticks unless others are given."""
    total = sum(counts.values())
    tallest = max(counts.values(), default=0)
    bars = tuple(
        Bar(
            count,
            max(_LEAST_HEIGHT, round(100 * count / tallest, 2)) if count else 0.0,
            f"{label}: {count:,} ({count / total:.2%})" if total else f"{label}: 0",
        )
        for label, count in counts.items()
    )
    return Plot(title, caption, bars, tuple(counts if ticks is None else ticks))
