"""A validation as one HTML page: the verdict, the findings, the map of the model, what was read."""

from collections.abc import Mapping, Sequence
from typing import Any

from nvfp4check.report.audit_words import CONVENTION_HEADERS, audit_sentences, convention_rows
from nvfp4check.report.card_words import CLAIM_HEADERS, SCORE_HEADERS, claim_rows, score_rows
from nvfp4check.report.coverage import coverage_sentences
from nvfp4check.report.fold import count_by_severity, findings_text, fold
from nvfp4check.report.histograms import Plot
from nvfp4check.report.model_map import model_map
from nvfp4check.report.page import render_page

#: How many findings of one fold are in sight before the reader asks for more.
SHOWN_AT_ONCE = 3

#: How many findings of one fold the page holds. The JSON document holds them all.
SHOWN_PER_FOLD = 100


def validate_html(
    document: Mapping[str, Any],
    *,
    rules: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, str] | None = None,
    histograms: Sequence[Plot] = (),
) -> str:
    """Return the page of one validation.

    `rules` are the explained rules by id; `weights` gives the format of each logical weight, for
    the map; `histograms` show what the weights hold.
    """
    findings = document["findings"]
    audit, card = document.get("audit"), document.get("card")
    return render_page(
        "validate.html.j2",
        document=document,
        summary=findings_text(count_by_severity(findings)),
        said=list(coverage_sentences(document)),
        folds=fold(findings),
        at_once=SHOWN_AT_ONCE,
        shown=SHOWN_PER_FOLD,
        rules=rules,
        map=model_map(weights or {}, findings),
        histograms=histograms,
        audit=audit,
        audit_said=list(audit_sentences(audit)) if audit else [],
        conventions=(CONVENTION_HEADERS, convention_rows(audit) if audit else []),
        card=card,
        claims=(CLAIM_HEADERS, claim_rows(card) if card else []),
        scores=(SCORE_HEADERS, score_rows(card) if card else []),
    )
