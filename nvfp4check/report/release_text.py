"""A release gate in a table: each step, how it ended, and the command that runs it alone."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from nvfp4check.report.page import render_page
from nvfp4check.report.visible import visible

HEADERS = ("step", "verdict", "exit code", "seconds", "command")


def release_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each step."""
    return [
        (
            visible(step["name"]),
            visible(step["verdict"] + (f": {step['why']}" if step["why"] else "")),
            "-" if step["code"] is None else str(step["code"]),
            f"{step['seconds']:.1f}",
            visible(step["command"]),
        )
        for step in document["steps"]
    ]


def release_heading(document: Mapping[str, Any]) -> str:
    """Return the verdict in a sentence."""
    checkpoint, base = visible(document["checkpoint"]), visible(document["base"])
    return f"{document['verdict'].upper()}: {checkpoint}, made from {base}"


def release_text(document: Mapping[str, Any], table_format: str = "simple") -> str:
    """Return the document as text, or with another tabulate format as Markdown."""
    shown = slice(None, 4) if table_format == "simple" else slice(None)
    rows = [row[shown] for row in release_rows(document)]
    table = tabulate(rows, headers=HEADERS[shown], tablefmt=table_format, disable_numparse=True)
    parts = [release_heading(document), table]
    if (note := unjudged(document)) is not None:
        parts.append(note)
    if "page" in document:
        parts.append(f"All results on one page: {visible(document['page'])}")
    return "\n\n".join(parts) + "\n"


def unjudged(document: Mapping[str, Any]) -> str | None:
    """Return what to do about a comparison that had no limits to be judged by."""
    commands = [step["command"] for step in document["steps"] if step["name"] == "agree"]
    if not any("--judge none" in command for command in commands):
        return None
    return "The two runs were compared and not judged: give --max-kl or --min-top1."


def release_html(document: Mapping[str, Any]) -> str:
    """Return the document as a page."""
    return render_page(
        "release.html.j2",
        verdict=document["verdict"],
        tone={"pass": "pass", "fail": "fail"}.get(document["verdict"], "incomplete"),
        heading=release_heading(document).partition(": ")[2],
        headers=HEADERS,
        note=unjudged(document),
        rows=release_rows(document),
    )
