"""The catalogue of faults, and what planting one changed, as text and as Markdown."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from tabulate import tabulate

from nvfp4check.report.validate_markdown import markdown, table
from nvfp4check.report.visible import visible

#: Characters that the columns before the last take.
_COLUMNS_BEFORE = 48
_CARRIERS = {
    frozenset(("checkpoint",)): "a stored checkpoint",
    frozenset(("kernel",)): "a kernel",
    frozenset(("checkpoint", "kernel")): "a stored checkpoint or a kernel",
}
_HEADERS = ["id", "name", "found by", "what is wrong"]


def faults_text(document: Mapping[str, Any], *, width: int = 100) -> str:
    """Return the catalogue as a table, or what was planted."""
    if "planted" in document:
        return "\n".join(_planted(document, width)) + "\n"
    faults = document["faults"]
    if document.get("explained"):
        return "\n\n".join("\n".join(_explain(fault, width)) for fault in faults) + "\n"
    rows = [_row(fault) for fault in faults]
    kinds = frozenset(fault["kind"] for fault in faults)
    listing = tabulate(
        rows, headers=_HEADERS, maxcolwidths=[None, None, 16, max(20, width - _COLUMNS_BEFORE)]
    )
    return (
        f"{listing}\n\n{len(faults)} faults that {_CARRIERS[kinds]} can carry.\n"
        f"One explained: nvfp4check faults list {faults[0]['id']}\n"
    )


def faults_markdown(document: Mapping[str, Any]) -> str:
    """Return the catalogue as a Markdown table, or what was planted as a list."""
    if "planted" in document:
        return "\n".join(_planted_markdown(document)) + "\n"
    rows = [[markdown(cell) for cell in _row(fault)] for fault in document["faults"]]
    return table(rows, _HEADERS) + "\n"


def _row(fault: Mapping[str, Any]) -> list[str]:
    return [fault["id"], fault["name"], finders(fault), fault["does"]]


def finders(fault: Mapping[str, Any]) -> str:
    """Say which rules find a fault, and whether they need the base; or which operations show it."""
    if fault["kind"] == "kernel":
        return f"kernels power: {', '.join(fault['operations'])}"
    if fault["found_by"]:
        return ", ".join(fault["found_by"])
    if fault["found_with_base"]:
        return f"{' or '.join(fault['found_with_base'])} with --base"
    return "no rule"


def _explain(fault: Mapping[str, Any], width: int) -> Iterator[str]:
    yield f"{fault['id']} {fault['name']}"
    yield ""
    lines = [fault["does"], *([f"{fault['remark']}."] if fault["remark"] else [])]
    for line in lines:
        yield textwrap.fill(line, width, initial_indent="  ", subsequent_indent="  ")
    yield ""
    if fault["kind"] == "kernel":
        yield f"  Found by {finders(fault)}"
    else:
        with_base = " or ".join(fault["found_with_base"]) or "no further rule"
        yield f"  Found by validate:        {', '.join(fault['found_by']) or 'no rule'}"
        yield f"  Found by validate --base: {with_base}"
    if fault["threads"]:
        yield ""
        yield "  Seen in public:"
        yield from (f"    {url}" for url in fault["threads"])


def _planted(document: Mapping[str, Any], width: int) -> Iterator[str]:
    planted, (fault,) = document["planted"], document["faults"]
    yield f"Planted {fault['id']} {fault['name']} in {visible(planted['target'])}"
    yield textwrap.fill(fault["does"], width, initial_indent="  ", subsequent_indent="  ")
    yield ""
    changes = planted["changes"]
    rows = [[visible(c["tensor"] or c["file"]), c["what"], _bytes(c)] for c in changes[:20]]
    yield tabulate(rows, headers=["changed", "how", "bytes"], maxcolwidths=[None, 50, None])
    if len(changes) > len(rows):
        yield f"… and {len(changes) - len(rows):,} more"
    yield ""
    yield (
        f"Files written: {', '.join(map(visible, planted['files_changed'])) or 'none'}; "
        f"{planted['files_linked']} others are links to {visible(planted['source'])}, which is "
        "untouched."
    )
    yield f"Found by: {finders(fault)}."


def _planted_markdown(document: Mapping[str, Any]) -> Iterator[str]:
    planted, (fault,) = document["planted"], document["faults"]
    yield f"**{fault['id']} {fault['name']}** planted in `{visible(planted['target'])}`"
    yield ""
    yield fault["does"]
    yield ""
    rows = [
        [markdown(visible(c["tensor"] or c["file"])), markdown(c["what"]), markdown(_bytes(c))]
        for c in planted["changes"]
    ]
    yield table(rows, ["changed", "how", "bytes"])
    yield ""
    yield f"Found by: {finders(fault)}."


def _bytes(change: Mapping[str, Any]) -> str:
    if change["first"] is None:
        return "" if change["count"] is None else f"{change['count']:,}"
    return f"{change['count']:,} in {change['first']:,}..{change['last']:,}"
