"""What a golden and the run at hand differ in, as a table."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from nvfp4check.report.visible import visible

HEADERS = ("file", "tensor", "difference")


def golden_text(document: Mapping[str, Any], table_format: str = "simple") -> str:
    """Return the document as text, or with another tabulate format as markdown."""
    heading = golden_heading(document)
    rows = golden_rows(document)
    if not rows:
        return f"{heading}\n"
    table = tabulate(rows, headers=HEADERS, tablefmt=table_format, disable_numparse=True)
    return f"{heading}\n\n{table}\n"


def golden_heading(document: Mapping[str, Any]) -> str:
    """Return the verdict in a sentence."""
    golden, count = visible(document["golden"]), len(document["differences"])
    compared = f"{document['compared']:,} compared"
    if not count:
        return f"{golden}: holds ({compared})"
    verb = "recorded or changed" if document["action"] == "record" else "different"
    return f"{golden}: {count:,} {verb} ({compared})"


def golden_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each difference."""
    return [
        (visible(d["file"]), visible(d["tensor"] or ""), visible(d["message"]))
        for d in document["differences"]
    ]
