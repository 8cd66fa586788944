"""What a review of a model card found, in rows that text, Markdown and HTML share."""

from collections.abc import Mapping
from typing import Any

_ORDER = ("contradicted", "qualified", "unanswered", "confirmed")

CLAIM_HEADERS = ("answer", "topic", "the files say")
SCORE_HEADERS = ("benchmark", "original", "NVFP4", "change", "questions", "difference is")


def claim_rows(card: Mapping[str, Any]) -> list[list[str]]:
    """Return the card's statements, the contradicted ones first."""
    claims = sorted(card["claims"], key=lambda claim: _ORDER.index(claim["answer"]))
    return [[claim["answer"], claim["topic"], claim["evidence"]] for claim in claims]


def score_rows(card: Mapping[str, Any]) -> list[list[str]]:
    """Return the card's benchmarks with what chance allows."""
    return [
        [
            score["benchmark"],
            f"{score['original']:g}",
            f"{score['quantized']:g}",
            f"{score['difference']:+.4g}",
            "unknown" if score["questions"] is None else f"{score['questions']:,}",
            score["verdict"],
        ]
        for score in card["evaluation"]
    ]
