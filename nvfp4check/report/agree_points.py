"""The points of an agreement's layers in rows: how far off, where worst, held against what."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from nvfp4check.report.agree_words import Document, Row, number
from nvfp4check.report.visible import visible

POINT_HEADERS = (
    "layer",
    "point",
    "error",
    "SQNR",
    "worst token",
    "held against",
    "times",
    "",
)

#: What the columns mean that do not say it.
POINT_LEGEND = (
    "times: over a bound, the largest of any token; over the noise floor, the geometric mean of all"
)


def point_rows(document: Document, layer: int | None = None) -> list[Row]:
    """Return a row for each point, of all layers or of one."""
    return [
        (
            str(point["layer"]),
            point["point"],
            "equal" if point["bitwise"] else number(point["relative_error"]),
            "-" if point["sqnr_db"] is None else f"{point['sqnr_db']:.1f} dB",
            _worst(point["worst"]),
            _held_against(point),
            _times(point),
            "; ".join(_said(point)),
        )
        for point in document["layers"]
        if layer is None or point["layer"] == layer
    ]


def parting_layer(document: Document) -> int | None:
    """Return the layer at which the runs part; None where they do not."""
    found = document["first_divergence"]
    return None if found is None else int(found["layer"])


def _worst(worst: Mapping[str, Any] | None) -> str:
    if worst is None:
        return "-"
    place = f"{visible(worst['prompt'], 20)}, {worst['token']}"
    return f"{place}: {number(worst['relative_error'])}"


def _held_against(point: Mapping[str, Any]) -> str:
    against = point["held_against"]
    what = {"bound": point.get("bound"), "noise floor": point["floor"]}.get(against)
    return f"{against}, {number(what)}" if what is not None else str(against)


def _times(point: Mapping[str, Any]) -> str:
    if point["held_against"] == "bound":
        return number(point.get("bound_ratio"))
    ratio = point["log_ratio"]
    return "-" if ratio is None else number(math.exp(min(ratio, 700.0)))


def _said(point: Mapping[str, Any]) -> Iterator[str]:
    """Say by what a point diverges."""
    alone = point.get("outlier")
    if point["held_against"] == "bound" and point.get("bound_exceeding"):
        yield f"beyond at {point['bound_exceeding']:,} of {point['bound_tokens']:,} tokens"
    elif alone:
        first = f"{visible(alone['prompt'], 20)}, {alone['token']}"
        many = alone["tokens"] > 1
        yield (
            f"{alone['tokens']:,} token{'s' if many else ''} farther than noise takes any"
            f"{' (first ' if many else ' ('}{first}): {'up to ' if many else ''}"
            f"{number(alone['error'])}, noise at most {number(alone['noise'])}"
        )
    elif point["diverges"]:
        yield "beyond"
    spoilt = point["nonfinite_candidate"]
    if spoilt:
        yield f"{spoilt:,} values are NaN or infinite"
