"""A validation as Markdown, for a pull request or a release page."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tabulate import tabulate

from nvfp4check.report.audit_words import CONVENTION_HEADERS, audit_sentences, convention_rows
from nvfp4check.report.card_words import CLAIM_HEADERS, SCORE_HEADERS, claim_rows, score_rows
from nvfp4check.report.coverage import coverage_sentences
from nvfp4check.report.fold import count_by_severity, findings_text, fold, place, size_text
from nvfp4check.report.visible import value_text, visible

#: Characters that Markdown or the HTML inside it would act upon.
_ACTIVE = re.compile(r"([\\`*_{}\[\]()<>#+!|~&@$])")


def markdown(text: object, limit: int | None = None) -> str:
    """Return text that Markdown shows as it is."""
    return _ACTIVE.sub(r"\\\1", visible(text, limit)).replace("\\<", "&lt;").replace("\\&", "&amp;")


def table(rows: list[list[str]], headers: list[str]) -> str:
    """Return a Markdown table of cells that are already safe."""
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def validate_markdown(document: Mapping[str, Any]) -> str:
    """Return the report of one validation as Markdown."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    findings, checkpoint = document["findings"], document["checkpoint"]
    coverage = document["coverage"]
    yield f"# {document['verdict'].upper()}: {markdown(checkpoint['location'])}"
    yield ""
    yield f"{findings_text(count_by_severity(findings)).capitalize()}."
    yield ""
    facts = [
        ["architecture", markdown(checkpoint.get("architecture") or "unknown")],
        ["producer", markdown(checkpoint.get("producer") or "unknown")],
        ["size", size_text(checkpoint["bytes"])],
        *(
            [f"weights in {markdown(name)}", f"{count:,}"]
            for name, count in checkpoint["formats"].items()
        ),
    ]
    yield table(facts, ["checkpoint", ""])
    if findings:
        yield ""
        yield "## Findings"
        yield ""
        yield table([_row(group) for group in fold(findings)], ["severity", "rule", "finding"])
    if document.get("audit"):
        yield from _audit(document["audit"])
    if document.get("card"):
        yield from _card(document["card"])
    yield ""
    yield "## Coverage"
    yield ""
    yield " ".join(coverage_sentences(document))
    yield ""
    if coverage["skipped"]:
        rows = [[markdown(entry["what"]), markdown(entry["why"])] for entry in coverage["skipped"]]
        yield table(rows, ["skipped", "why"])
    else:
        yield "Nothing was skipped."


def _audit(audit: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"## Audit against {markdown(audit['base'])}"
    yield ""
    yield from (f"- {markdown(sentence)}" for sentence in audit_sentences(audit))
    rows = convention_rows(audit)
    if rows:
        yield ""
        yield _safe_table(rows, CONVENTION_HEADERS)


def _card(card: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"## Model card {markdown(card['source'])}"
    for rows, headers in ((claim_rows(card), CLAIM_HEADERS), (score_rows(card), SCORE_HEADERS)):
        if rows:
            yield ""
            yield _safe_table(rows, headers)
    if card["unsaid"]:
        yield ""
        yield "The card does not say:"
        yield ""
        yield from (f"- {markdown(gap)}" for gap in card["unsaid"])


def _safe_table(rows: list[list[str]], headers: tuple[str, ...]) -> str:
    return table([[markdown(cell) for cell in row] for row in rows], [*headers])


def _row(group: Any) -> list[str]:
    first = group.findings[0]
    cell = markdown(first["message"])
    where = place(first)
    if where:
        cell += f"<br>at {markdown(where)}"
    for label in ("observed", "expected"):
        if first.get(label) is not None:
            cell += f"<br>{label}: {markdown(value_text(first[label]))}"
    if len(group.findings) > 1:
        cell += f"<br>… and {len(group.findings) - 1:,} more"
    return [group.severity, f"{group.rule} {markdown(group.name)}", cell]
