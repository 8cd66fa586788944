"""What is in a checkpoint, as text and as Markdown."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from nvfp4check.report.fold import plural, size_text
from nvfp4check.report.histograms import code_counts, scale_counts
from nvfp4check.report.validate_markdown import markdown
from nvfp4check.report.visible import visible

#: Width of the longest bar, in characters.
_BAR = 40

#: How many skipped or not finite tensors are written out before `… and N more`.
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Style:
    """What differs between text and Markdown."""

    heading: Callable[[str], str]
    safe: Callable[[object], str]
    table: str


_TEXT = Style(str, visible, "simple")
_MARKDOWN = Style(lambda words: f"## {words}\n", markdown, "pipe")


def inspect_text(document: Mapping[str, Any]) -> str:
    """Return what is in a checkpoint as plain text."""
    return "\n".join(_lines(document, _TEXT)) + "\n"


def inspect_markdown(document: Mapping[str, Any]) -> str:
    """Return what is in a checkpoint as Markdown."""
    return "\n".join(_lines(document, _MARKDOWN)) + "\n"


def shape_text(shape: list[int]) -> str:
    """Return a shape as `7168 x 2048`, and a scalar's as `1`."""
    return " x ".join(str(size) for size in shape) or "1"


def _lines(document: Mapping[str, Any], style: Style) -> Iterator[str]:
    known = (document["architecture"], document["producer"])
    about = [style.safe(part) for part in known if part]
    size = f"{size_text(document['bytes'])} in {plural(document['tensors'], 'tensor')}"
    yield style.heading(style.safe(document["location"]))
    yield ", ".join([*about, size])
    if document["weight"] is None:
        yield from _whole(document, style)
    else:
        yield from _weight(document["weight"], style)
    for histogram, title, counts in (
        ("code_histogram", "codes", code_counts),
        ("scale_histogram", "block scales", scale_counts),
    ):
        if document[histogram] is not None:
            yield from _bars(title, counts(document[histogram]), style)
    yield from _spreads(document, style)
    yield from _listed(
        "not finite",
        [
            f"{style.safe(e['tensor'])}: {e['nan']:,} NaN, {e['infinite']:,} infinite"
            for e in document["non_finite"]
        ],
    )
    yield from _listed(
        "not read", [f"{style.safe(name)}: {style.safe(why)}" for name, why in document["skipped"]]
    )


def _table(rows: list[list[str]], headers: list[str], align: str, style: Style) -> str:
    sides = {"l": "left", "r": "right"}
    return tabulate(
        rows,
        headers=headers,
        tablefmt=style.table,
        disable_numparse=True,
        colalign=[sides[side] for side in align],
    )


def _whole(document: Mapping[str, Any], style: Style) -> Iterator[str]:
    formats = [
        [style.safe(name), f"{f['weights']:,}", f"{f['elements']:,}", size_text(f["bytes"])]
        for name, f in document["formats"].items()
    ]
    kinds = [
        [
            style.safe(row["kind"]),
            style.safe(row["format"]),
            shape_text(row["shape"]),
            f"{row['count']:,}",
            size_text(row["bytes"]),
        ]
        for row in document["kinds"]
    ]
    if formats:
        yield ""
        yield _table(formats, ["format", "weights", "elements", "size"], "lrrr", style)
    if kinds:
        yield ""
        yield _table(kinds, ["weight", "format", "shape", "count", "size"], "lllrr", style)


def _weight(weight: Mapping[str, Any], style: Style) -> Iterator[str]:
    facts = [
        ["weight", style.safe(weight["name"])],
        ["format", style.safe(f"{weight['format']}, layout {weight['layout']}")],
        ["shape", shape_text(weight["shape"])],
    ]
    for key in ("global_decode_scale", "input_decode_scale", "mean", "sd"):
        if weight[key] is not None:
            facts.append([key.replace("_", " "), f"{weight[key]:.9g}"])
    yield ""
    yield (
        _table(facts, ["", ""], "ll", style)
        if style is _MARKDOWN
        else tabulate(facts, tablefmt="plain", disable_numparse=True)
    )
    stored = [
        [
            style.safe(t["name"]),
            style.safe(t["dtype"]),
            shape_text(t["shape"]),
            style.safe(t["shard"]),
            f"{t['start']:,} to {t['stop']:,}",
        ]
        for t in weight["stored"]
    ]
    yield ""
    yield _table(stored, ["stored tensor", "dtype", "shape", "shard", "bytes"], "lllll", style)
    if weight["values"]:
        rows = [
            ["not finite" if v is None else f"{v:.5g}" for v in row] for row in weight["values"]
        ]
        width = len(rows[0])
        yield ""
        yield style.heading(f"first values, {len(rows)} rows of {width}")
        yield _table(rows, [str(column) for column in range(width)], "r" * width, style)


def _bars(title: str, counts: Mapping[str, int], style: Style) -> Iterator[str]:
    total, tallest = sum(counts.values()), max(counts.values())
    if not total:
        return
    present = [position for position, count in enumerate(counts.values()) if count]
    shown = list(counts.items())[present[0] : present[-1] + 1]
    rows = [
        [label, f"{count:,}", f"{count / total:.2%}", "█" * round(_BAR * count / tallest)]
        for label, count in shown
    ]
    yield ""
    yield _table(rows, [title, "count", "share", ""], "rrrl", style)


def _spreads(document: Mapping[str, Any], style: Style) -> Iterator[str]:
    names = {
        "global_scales": "global decode scale",
        "input_scales": "input decode scale",
        "sds": "standard deviation of a weight",
    }
    rows = [
        [name, f"{s['count']:,}", *(f"{s[key]:.4g}" for key in ("min", "median", "max"))]
        for key, name in names.items()
        if (s := document[key]) is not None
    ]
    if rows and document["weight"] is None:
        yield ""
        yield _table(rows, ["of NVFP4 weights", "count", "min", "median", "max"], "lrrrr", style)


def _listed(title: str, lines: list[str]) -> Iterator[str]:
    if not lines:
        return
    yield ""
    yield f"{title}:"
    yield from (f"- {line}" for line in lines[:_SHOWN])
    if len(lines) > _SHOWN:
        yield f"- … and {len(lines) - _SHOWN:,} more"
