"""Several results in one page, or listed in a table: each with its file, hash and verdict."""

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import TemplateError
from markupsafe import Markup
from tabulate import tabulate

from nvfp4check.findings import CheckError
from nvfp4check.report.page import render_page
from nvfp4check.report.visible import visible

HEADERS = ("result", "verdict", "of", "file", "sha256")

#: Makes a page of one document, or None where its kind has none.
PageOf = Callable[[Mapping[str, Any]], str | None]
#: Makes text of one document, or None likewise.
TextOf = Callable[[Mapping[str, Any]], str | None]

_TONES = {"pass": "pass", "fail": "fail", "undecided": "incomplete", "incomplete": "incomplete"}


def input_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each input."""
    return [
        (
            visible(entry["kind"]),
            visible(entry["verdict"] or "-"),
            visible(_about(entry["document"])),
            visible(entry["file"]),
            entry["sha256"],
        )
        for entry in document["inputs"]
    ]


def _about(document: Mapping[str, Any]) -> str:
    """Return what a result is about, as far as it says."""
    if isinstance(document.get("candidate"), dict):
        return str(document["candidate"].get("run", ""))
    if "a" in document and "b" in document:
        return f"{_place(document['a'])} and {_place(document['b'])}"
    for name in ("checkpoint", "location", "run", "golden", "op"):
        if name in document:
            return _place(document[name])
    return ""


def _place(value: Any) -> str:
    return str(value.get("location", "")) if isinstance(value, dict) else str(value)


def joined_text(document: Mapping[str, Any], table_format: str = "simple") -> str:
    """Return the list of inputs as text, or with another tabulate format as Markdown."""
    table = tabulate(
        input_rows(document), headers=HEADERS, tablefmt=table_format, disable_numparse=True
    )
    return f"{table}\n"


def joined_html(document: Mapping[str, Any], page_of: PageOf, text_of: TextOf) -> str:
    """Return the page: the list of inputs, and below it what each result's own page shows."""
    sections = []
    for number, entry in enumerate(document["inputs"], start=1):
        page, text = _shown(entry, page_of, text_of)
        sections.append(
            {
                "anchor": f"result-{number}",
                "kind": entry["kind"],
                "verdict": entry["verdict"],
                "tone": _TONES.get(entry["verdict"], "other"),
                "file": entry["file"],
                "sha256": entry["sha256"],
                "body": Markup(body_of(page)) if page is not None else None,
                "text": text,
            }
        )
    return render_page(
        "joined.html.j2", headers=HEADERS, rows=input_rows(document), sections=sections
    )


def _shown(
    entry: Mapping[str, Any], page_of: PageOf, text_of: TextOf
) -> tuple[str | None, str | None]:
    """Return the page of a result, or its text where its kind has no page.

    Raises:
        CheckError: The file has the schema of a result and not its fields.
    """
    document = entry["document"]
    try:
        page = page_of(document)
        return page, text_of(document) if page is None else None
    except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as error:
        lacks = f"{error} is missing" if isinstance(error, KeyError) else repr(error)
        raise CheckError(
            f"{entry['file']}: is no whole {entry['kind']} result ({lacks}); write it again with "
            "--format json"
        ) from error


def body_of(page: str) -> str:
    """Return what stands between the head and the footer of a page of ours.

    Nothing from a checkpoint is ever markup in it, so the first `<body>` and the last `<footer` are
    the page's own.
    """
    return page.partition("<body>")[2].rpartition("<footer")[0]
