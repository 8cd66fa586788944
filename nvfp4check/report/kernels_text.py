"""Kernels and their properties as text and as Markdown."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from tabulate import tabulate


def kernels_text(document: Mapping[str, Any], table_format: str = "simple") -> str:
    """Return each run as a table of its properties, and what broke the failed ones."""
    runs = document.get("runs") or [document]
    return "\n\n".join("\n".join(_run(run, table_format)) for run in runs) + "\n"


def _run(run: Mapping[str, Any], table_format: str) -> Iterator[str]:
    convention = f", convention {run['convention']}" if run["convention"] else ""
    yield (
        f"{run['op']} of {run['impl']} on {run['device']}{convention}, seed {run['seed']}: "
        f"{run['verdict']}"
    )
    yield ""
    rows = [
        [law["name"], law["verdict"], law["cases"], law["unsupported"] or ""]
        for law in run["properties"]
    ]
    yield tabulate(
        rows, headers=["property", "verdict", "cases", "unsupported"], tablefmt=table_format
    )
    for law in run["properties"]:
        if law["verdict"] == "pass":
            continue
        yield ""
        yield f"{law['verdict']}: {law['name']}"
        yield f"  the law: {law['law']}"
        yield textwrap.indent(law["message"], "  ")
        if law["diagnosis"]:
            yield f"  diagnosis: {law['diagnosis']}"


def kernels_markdown(document: Mapping[str, Any]) -> str:
    """Return each run as Markdown; what broke a property stands in a code block."""
    runs = document.get("runs") or [document]
    return "\n".join(line for run in runs for line in _run_markdown(run)) + "\n"


def _run_markdown(run: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {run['op']} of {run['impl']}: {run['verdict']}"
    yield ""
    rows = [[law["name"], law["verdict"], law["cases"], law["law"]] for law in run["properties"]]
    yield tabulate(rows, headers=["property", "verdict", "cases", "law"], tablefmt="github")
    for law in run["properties"]:
        if law["verdict"] != "pass":
            yield ""
            yield f"### {law['name']}"
            yield ""
            if law["diagnosis"]:
                yield f"Diagnosis: {law['diagnosis']}"
                yield ""
            yield textwrap.indent(law["message"], "    ")
    yield ""


def kernels_list_text(document: Mapping[str, Any], table_format: str = "simple") -> str:
    """Return the operations with their signatures, and a table of implementations of each."""
    lines: list[str] = []
    for operation in document["operations"]:
        lines += [operation["signature"], f"  {operation['purpose']}"]
        rows = [
            [one["name"], one["convention"] or "", one["device"], one["why"] or "available"]
            for one in operation["implementations"]
        ]
        table = tabulate(rows, tablefmt="plain" if table_format == "simple" else table_format)
        lines += [textwrap.indent(table, "    "), ""]
    lines += [f"{one['name']}: {one['why']}" for one in document["unusable"]]
    return "\n".join(lines).rstrip() + "\n"
