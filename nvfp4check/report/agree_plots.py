"""Plots of an agreement: where lines, bars and cells lie, in per cent of their box."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvfp4check.report.agree_words import number
from nvfp4check.report.histograms import Bar, Plot, histogram
from nvfp4check.report.visible import visible

#: More ticks than this do not stand beside one another, and more decades neither.
_MOST_TICKS = 12
_MOST_DECADES = 9


@dataclass(frozen=True, slots=True)
class Line:
    """One series: its name, its class, and its pieces as SVG points; a gap breaks it."""

    name: str
    tone: str
    pieces: tuple[str, ...]
    #: x, y and words of each value.
    dots: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True, slots=True)
class LinePlot:
    """Lines over a logarithmic scale."""

    title: str
    caption: str
    lines: tuple[Line, ...]
    #: Words and height from the top of each line of the grid.
    grid: tuple[tuple[str, float], ...]
    ticks: tuple[str, ...]
    #: What the ticks are.
    axis: str = ""


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Counts by row and column; a cell's strength is its share of the largest count."""

    title: str
    caption: str
    rows: tuple[tuple[str, tuple[tuple[int, float, str], ...]], ...]
    columns: int
    ticks: tuple[str, ...]
    axis: str = ""


def line_plot(
    title: str,
    caption: str,
    series: Sequence[tuple[str, str, Sequence[float | None]]],
    labels: Sequence[str],
    axis: str = "",
) -> LinePlot | None:
    """Return the plot of positive values; zeros and absent ones are gaps. None without any."""
    logs = [math.log10(v) for _, _, values in series for v in values if v]
    if not logs:
        return None
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high = max(high, low + 1)

    def height(value: float) -> float:
        return round(100 * (high - math.log10(value)) / (high - low), 2)

    count = max(1, len(labels))
    lines = []
    for name, tone, values in series:
        pieces: list[list[str]] = [[]]
        dots = []
        for place, value in enumerate(values):
            if not value:
                pieces.append([])
                continue
            x = round(100 * (place + 0.5) / count, 2)
            pieces[-1].append(f"{x},{height(value)}")
            dots.append((x, height(value), f"{name}, {labels[place]}: {number(value)}"))
        whole = tuple(" ".join(piece) for piece in pieces if len(piece) > 1)
        lines.append(Line(name, tone, whole, tuple(dots)))
    step = max(1, (high - low) // 6)
    grid = tuple((f"1e{e}", height(10.0**e)) for e in range(low, high + 1, step))
    return LinePlot(title, caption, tuple(lines), grid, _ticks(labels), axis)


def _ticks(labels: Sequence[str]) -> tuple[str, ...]:
    step = max(1, math.ceil(len(labels) / _MOST_TICKS))
    return tuple(label if i % step == 0 else "" for i, label in enumerate(labels))


def error_plot(document: Mapping[str, Any]) -> LinePlot | None:
    """Return the relative error of each layer, with the noise floor and the derived bound."""
    layers = list(dict.fromkeys(point["layer"] for point in document["layers"]))
    points = {(point["layer"], point["point"]): point for point in document["layers"]}

    def values(point: str, name: str) -> list[float | None]:
        return [points.get((layer, point), {}).get(name) for layer in layers]

    series = [
        (point, tone, values(point, "relative_error"))
        for point, tone in (
            ("attn_output", "line-a"),
            ("mlp_output", "line-b"),
            ("hidden", "line-c"),
        )
    ]
    if any(values("hidden", "floor")):
        series.append(("noise floor of hidden", "line-floor", values("hidden", "floor")))
    if any(values("hidden", "bound")):
        series.append(("bound of hidden", "line-bound", values("hidden", "bound")))
    return line_plot(
        "Relative error by layer",
        "|candidate - reference| / |reference|, logarithmic; equal points have no mark",
        series,
        [str(layer) for layer in layers],
        "layer",
    )


def position_plot(document: Mapping[str, Any]) -> LinePlot | None:
    """Return the mean KL by how far into the prompt a position lies."""
    buckets = document["logits"]["by_position"]
    return line_plot(
        "Mean KL by position",
        "in nats, over all prompts that are so long; logarithmic",
        [("KL", "line-c", [bucket["kl_mean"] for bucket in buckets])],
        [f"{bucket['low']:g}" for bucket in buckets],
        "position in the prompt",
    )


def kl_plot(document: Mapping[str, Any]) -> Plot:
    """Return the histogram of KL by decade, from the lowest that occurs to the highest."""
    rows = [(label, count) for label, count in document["logits"]["kl_histogram"]]
    there = [place for place, (_, count) in enumerate(rows) if count]
    low = max(0, min(there, default=0) - 1)
    high = max(there, default=0) + 2
    shown = dict(rows[low:high])
    labels = [_decade(label) for label in shown]
    step = max(1, math.ceil(len(labels) / _MOST_DECADES))
    return histogram(
        "Positions by their KL",
        f"number of positions, {sum(shown.values()):,} in all",
        shown,
        [label if i % step == 0 else "" for i, label in enumerate(labels)],
        "KL in nats, from this power of ten to the next",
    )


def _decade(label: str) -> str:
    """Return a label with signs that do not break a line."""
    return label.replace("-", "\u2212").replace(">=", "\u2265").replace("<", "<\u2060")


def prompt_plot(document: Mapping[str, Any]) -> Plot:
    """Return top-1 agreement by prompt."""
    prompts = document["logits"]["by_prompt"]
    bars = tuple(
        Bar(
            1,
            max(0.7, round(100 * (prompt["top1"] or 0), 2)),
            f"{visible(prompt['id'])}: {number(prompt['top1'], '%')} of {prompt['positions']:,}",
        )
        for prompt in prompts
    )
    return Plot(
        "Top-1 agreement by prompt",
        "share of positions where both rank the same token first",
        bars,
        _ticks([visible(prompt["id"], 12) for prompt in prompts]),
        (("0 %", 100.0), ("50 %", 50.0), ("100 %", 0.0)),
        "prompt",
    )


def flip_map(document: Mapping[str, Any]) -> HeatMap | None:
    """Return where choices of experts differ; None where none does."""
    routing = document["routing"]
    most = max((count for layer in routing["layers"] for count in layer["by_position"]), default=0)
    if not most:
        return None
    width = routing["position_width"]
    rows = tuple(
        (
            f"layer {layer['layer']}",
            tuple(
                (
                    place,
                    round(0.25 + 0.75 * count / most, 3),
                    f"layer {layer['layer']}, positions {place * width} to "
                    f"{(place + 1) * width - 1}: {count}",
                )
                for place, count in enumerate(layer["by_position"])
                if count
            ),
        )
        for layer in routing["layers"]
    )
    columns = max(len(layer["by_position"]) for layer in routing["layers"])
    ticks = _ticks([str(place * width) for place in range(columns)])
    caption = f"number of tokens that went to other experts; the darkest cell is {most}"
    return HeatMap("Other experts", caption, rows, columns, ticks, "position in the prompt")
