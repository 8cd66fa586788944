"""A validation for a terminal or a log: the verdict first, then why, then what was covered."""

from collections.abc import Iterator, Mapping
from typing import Any

from tabulate import tabulate

from nvfp4check.report.audit_words import CONVENTION_HEADERS, audit_sentences, convention_rows
from nvfp4check.report.card_words import CLAIM_HEADERS, SCORE_HEADERS, claim_rows, score_rows
from nvfp4check.report.coverage import coverage_sentences
from nvfp4check.report.fold import (
    FindingRecord,
    Fold,
    count_by_severity,
    findings_text,
    fold,
    place,
    plural,
    size_text,
)
from nvfp4check.report.visible import value_text, visible

#: Of how many kinds of tensor a rule's first finding is written out before `… and N more`.
SHOWN_KINDS = 3

#: How many skipped things are written out before `… and N more`.
SHOWN_SKIPPED = 10

#: Characters of a line of what the files say to a card.
EVIDENCE_WIDTH = 64

_COLORS = {"pass": "32", "fail": "31", "incomplete": "33"}
_COLORS |= {"error": "31", "warning": "33", "info": "36", "dim": "2"}


def validate_text(document: Mapping[str, Any], *, color: bool = False) -> str:
    """Return the report of one validation as plain text, with ANSI colours if asked."""
    return "\n".join(_lines(document, color)) + "\n"


def _lines(document: Mapping[str, Any], color: bool) -> Iterator[str]:
    findings = document["findings"]
    verdict = document["verdict"]
    checkpoint = document["checkpoint"]
    yield _paint(
        f"{verdict.upper()}: {findings_text(count_by_severity(findings))} in "
        f"{visible(checkpoint['location'])}",
        verdict,
        color,
    )
    yield from _about(checkpoint)
    for group in fold(findings):
        yield ""
        yield from _fold_lines(group, color)
    if document.get("audit"):
        yield ""
        yield from _audit(document["audit"])
    if document.get("card"):
        yield ""
        yield from _card(document["card"])
    yield ""
    yield from _coverage(document)
    if findings:
        rule = findings[0]["rule"]
        yield ""
        yield f"What a rule means and how to repair it: nvfp4check rules {rule}"


def _about(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    known = (checkpoint.get("architecture"), checkpoint.get("producer"))
    said = [visible(part) for part in known if part]
    yield ", ".join([*said, size_text(checkpoint["bytes"])])
    formats = checkpoint["formats"]
    if formats:
        yield ""
        rows = [[visible(name), f"{count:,}"] for name, count in formats.items()]
        yield tabulate(
            rows,
            headers=["weights stored as", "count"],
            disable_numparse=True,
            colalign=("left", "right"),
        )


def _fold_lines(group: Fold, color: bool) -> Iterator[str]:
    head = f"{group.severity} {group.rule} {group.name}"
    total = len(group.findings)
    yield _paint(head, group.severity, color) + (f" ({total:,} findings)" if total > 1 else "")
    kinds = list(group.kinds.items())
    for kind, findings in kinds[:SHOWN_KINDS]:
        yield from _finding_lines(findings[0])
        if len(findings) > 1:
            of = f" of {visible(kind, 100)}" if kind else ""
            yield f"    … and {len(findings) - 1:,} more{of}"
    rest = kinds[SHOWN_KINDS:]
    if rest:
        left = sum(len(findings) for _, findings in rest)
        yield f"  … and {left:,} more of {plural(len(rest), 'other kind')}"


def _finding_lines(finding: FindingRecord) -> Iterator[str]:
    yield f"  {visible(finding['message'])}"
    where = place(finding)
    if where:
        yield f"    at: {where}"
    for label in ("observed", "expected"):
        if finding.get(label) is not None:
            yield f"    {label}: {value_text(finding[label])}"


def _audit(audit: Mapping[str, Any]) -> Iterator[str]:
    yield f"Audit against {visible(audit['base'])}"
    for sentence in audit_sentences(audit):
        yield f"  {visible(sentence)}"
    rows = [[visible(cell) for cell in row] for row in convention_rows(audit)]
    if rows:
        yield ""
        yield tabulate(
            rows,
            headers=CONVENTION_HEADERS,
            disable_numparse=True,
            colalign=("left", "right", "right", "right"),
        )


def _card(card: Mapping[str, Any]) -> Iterator[str]:
    yield f"Model card {visible(card['source'])}"
    claims = [[visible(cell) for cell in row] for row in claim_rows(card)]
    if claims:
        yield tabulate(
            claims,
            headers=CLAIM_HEADERS,
            disable_numparse=True,
            maxcolwidths=[None, None, EVIDENCE_WIDTH],
        )
    scores = [[visible(cell) for cell in row] for row in score_rows(card)]
    if scores:
        yield ""
        yield tabulate(
            scores,
            headers=SCORE_HEADERS,
            disable_numparse=True,
            colalign=("left", "right", "right", "right", "right", "left"),
        )
    if card["unsaid"]:
        yield ""
        yield "The card does not say:"
        for gap in card["unsaid"]:
            yield f"  {visible(gap)}"


def _coverage(document: Mapping[str, Any]) -> Iterator[str]:
    yield from coverage_sentences(document)
    skipped = document["coverage"]["skipped"]
    if not skipped:
        yield "Nothing was skipped."
        return
    yield f"Skipped {plural(len(skipped), 'thing')}:"
    for entry in skipped[:SHOWN_SKIPPED]:
        yield f"  {visible(entry['what'])}: {visible(entry['why'])}"
    if len(skipped) > SHOWN_SKIPPED:
        yield f"  … and {len(skipped) - SHOWN_SKIPPED:,} more"


def _paint(text: str, tone: str, color: bool) -> str:
    return f"\x1b[{_COLORS[tone]}m{text}\x1b[0m" if color else text
