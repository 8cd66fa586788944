"""The audit and the card in every human format, with hostile words in them."""

from typing import Any

import pytest

from nvfp4check.report.audit_words import audit_sentences
from nvfp4check.report.formats import Format
from nvfp4check.report.render import render


@pytest.fixture
def document(failed: dict[str, Any], hostile: str) -> dict[str, Any]:
    fits = [
        {"convention": "modelopt-0.39", "scale_bytes": 0, "codes": 0, "weights": 3},
        {"convention": "modelopt", "scale_bytes": 0, "codes": 0, "weights": 3},
        {"convention": "torchao", "scale_bytes": 1, "codes": 4864, "weights": 1},
    ]
    audit = {
        "base": f"/models/{hostile}",
        "quantized": {
            "weights": 3,
            "blocks": 100,
            "elements": 1_000_000,
            "nearest": 999_999,
            "nearest_share": 0.999999,
            "exact_ties": 1,
            "near_ties": 2,
            "other_side_of_a_tie": 1,
            "off": 0,
            "beyond": 0,
            "searched_blocks": 40,
            "four_over_six_blocks": 39,
            "made_from": [
                {"format": "fp8-block", "way": "direct", "dtype": "bfloat16", "weights": 3}
            ],
        },
        "conventions": fits,
        "copied": {"bytes": 5, "dequantised": 7},
        "foreign": [{"weight": hostile, "holds": None, "how": "it is none"}],
        "patterns": [f"{hostile}: experts in other places: 5 holds 6"],
        "hindered": 0,
        "not_in_base": {"count": 0, "first": []},
        "only_in_base": {"count": 2, "first": [hostile]},
    }
    claims = [
        {"topic": "tags", "statement": "s", "answer": "confirmed", "evidence": "fine"},
        {"topic": "size", "statement": "s", "answer": "contradicted", "evidence": hostile},
    ]
    score = {
        "benchmark": "MMLU-Pro",
        "original": 85.0,
        "quantized": 83.0,
        "difference": -2.0,
        "questions": 12032,
        "verdict": "beyond chance",
    }
    card = {
        "source": "README.md",
        "claims": claims,
        "evaluation": [score, score | {"benchmark": "Arena", "questions": None}],
        "unsaid": [f"nothing of {hostile}"],
        "problems": [],
    }
    return failed | {"audit": audit, "card": card}


@pytest.mark.parametrize("format", [Format.TEXT, Format.MARKDOWN, Format.HTML])
def test_audit_and_card_stand_in_every_report_and_nothing_in_them_acts(
    document: dict[str, Any], format: Format
) -> None:
    shown = render(document, format)

    for words in ("Audit against", "Model card", "12,032", "beyond chance", "torchao"):
        assert words in shown.replace("\\", "")
    for active in ("\x1b", "\u202e", *([] if format is Format.TEXT else ["<script>alert"])):
        assert active not in shown
    assert shown.index("contradicted") < shown.index("confirmed")


@pytest.mark.parametrize("format", list(Format))
def test_a_document_without_them_has_no_such_section(
    failed: dict[str, Any], format: Format
) -> None:
    shown = render(failed, format)

    assert "Audit against" not in shown
    assert "Model card" not in shown


def test_a_share_short_of_all_is_not_called_all(document: dict[str, Any]) -> None:
    said = " ".join(audit_sentences(document["audit"]))

    assert "99.999 %" in said
    assert "100.000 %" not in said


def test_conventions_that_fit_alike_are_named_together(document: dict[str, Any]) -> None:
    said = " ".join(audit_sentences(document["audit"]))

    alike = "modelopt-0.39 makes every scale byte and every code of them, and so does modelopt"
    assert alike in said


def test_searched_scales_are_called_legal(document: dict[str, Any]) -> None:
    said = " ".join(audit_sentences(document["audit"]))

    assert "40 of 100 blocks" in said
    assert "legal, found by search (4-over-6)" in said
