"""The tables of an agreement, row by row, which text, Markdown and HTML share."""

from collections.abc import Iterable, Mapping
from typing import Any

from nvfp4check.report.agree_words import Document, Row, number, over
from nvfp4check.report.visible import visible

LOGIT_HEADERS = ("over all positions; KL in nats", "candidate", "95 % interval", "noise floor")
LAYER_HEADERS = (
    "layer",
    "attn_output",
    "mlp_output",
    "hidden",
    "floor",
    "err / bound",
    "came in",
    "attention",
    "mlp",
    "flips",
)
BUCKET_HEADERS = ("reference's confidence", "positions", "mean KL", "top-1")
WORST_HEADERS = (
    "prompt",
    "position",
    "KL",
    "text up to there",
    "reference's next",
    "candidate's next",
)
PROMPT_HEADERS = ("prompt", "positions", "mean KL", "top-1")
FLIP_HEADERS = (
    "layer",
    "prompt",
    "token",
    "dropped",
    "taken",
    "margin",
    "score error",
    "explained",
)

#: Name of a number in the document, what it is called, and how it is written.
_LOGIT_ROWS = (
    ("kl_mean", "KL(reference || candidate), mean", "g"),
    ("kl_median", "KL, median", "g"),
    ("kl_p95", "KL, 95 %", "g"),
    ("kl_p99", "KL, 99 %", "g"),
    ("kl_p999", "KL, 99.9 %", "g"),
    ("kl_max", "KL, largest", "g"),
    ("kl_reverse_mean", "KL(candidate || reference), mean", "g"),
    ("jsd_mean", "Jensen-Shannon divergence, mean", "g"),
    ("top1", "top-1 agreement", "%"),
    ("top5_overlap", "top-5 overlap", "%"),
    ("top10_overlap", "top-10 overlap", "%"),
    ("ppl_reference", "perplexity of the reference", "f"),
    ("ppl_candidate", "perplexity of the candidate", "f"),
    ("ppl_log_ratio", "log of their ratio", "g"),
    ("delta_p_rms", "change of p of the next token, RMS", "g"),
)


def logit_rows(document: Document) -> list[Row]:
    """Return the numbers of the logits."""
    logits = document["logits"]
    rows: list[Row] = []
    for name, label, form in _LOGIT_ROWS:
        interval = logits.get({"kl_mean": "kl_ci95", "top1": "top1_ci95"}.get(name, ""))
        shown = " to ".join(over(bound, 1, form) for bound in interval or ())
        found, *floors = (
            over(run[name], _known(name, run), form) for run in (logits, *logits["noise"])
        )
        rows.append((label, found, shown, ", ".join(floors)))
    return rows


def _known(name: str, logits: Mapping[str, Any]) -> int:
    """Return over how many positions a number is that may be infinite."""
    if name.startswith("kl_"):
        return int(logits["positions"])
    return int(logits.get("followed_known", 0)) if name in ("ppl_reference", "ppl_candidate") else 0


def layer_rows(document: Document) -> list[Row]:
    """Return one row a layer; an error beyond its floor carries a mark."""
    flips = {layer["layer"]: layer for layer in document["routing"]["layers"]}
    by_layer: dict[int, dict[str, Mapping[str, Any]]] = {}
    for point in document["layers"]:
        by_layer.setdefault(point["layer"], {})[point["point"]] = point
    rows: list[Row] = []
    for layer, points in by_layer.items():
        hidden, attention, mlp = (
            points.get(name, {}) for name in ("hidden", "attn_output", "mlp_output")
        )
        routed = flips.get(layer)
        shown = "" if routed is None else _flips(routed)
        rows.append(
            (
                str(layer),
                _error(attention),
                _error(mlp),
                _error(hidden),
                number(hidden.get("floor")),
                number(_over_bound(points.values())),
                number(hidden.get("share"), "%"),
                number(attention.get("share"), "%"),
                number(mlp.get("share"), "%"),
                shown,
            )
        )
    return rows


def _error(point: Mapping[str, Any]) -> str:
    if not point:
        return "-"
    if point["bitwise"]:
        return "equal"
    mark = " *" if point["diverges"] else ""
    return f"{number(point['relative_error'])}{mark}"


def _over_bound(points: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the largest error over its bound, at any point of a layer."""
    ratios = [point.get("bound_ratio") for point in points if point.get("bound_tokens")]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def _flips(routed: Mapping[str, Any]) -> str:
    mark = f" ({routed['unexplained']} *)" if routed["unexplained"] else ""
    return f"{routed['flips']}{mark}"


def bucket_rows(document: Document) -> list[Row]:
    """Return the positions by the reference's confidence."""
    return [
        (
            f"{bucket['low']:.2f} to {bucket['high']:.2f}",
            f"{bucket['positions']:,}",
            over(bucket["kl_mean"], bucket["positions"]),
            number(bucket["top1"], "%"),
        )
        for bucket in document["logits"]["by_confidence"]
    ]


def prompt_rows(document: Document) -> list[Row]:
    """Return a row for each prompt."""
    return [
        (
            visible(prompt["id"], 30),
            f"{prompt['positions']:,}",
            over(prompt["kl_mean"], prompt["positions"]),
            number(prompt["top1"], "%"),
        )
        for prompt in document["logits"]["by_prompt"]
    ]


def worst_rows(document: Document) -> list[Row]:
    """Return the positions with the largest KL."""
    return [
        (
            visible(worst["prompt"], 20),
            str(worst["position"]),
            over(worst["kl"], 1),
            _end(visible(worst["before"] or "")),
            _token(worst["reference"]),
            _token(worst["candidate"]),
        )
        for worst in document["logits"]["worst"]
    ]


def _end(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"\u2026{text[1 - most :]}"


def _token(token: Mapping[str, Any]) -> str:
    return repr(visible(token["text"])) if token["text"] is not None else str(token["token"])


def flip_rows(document: Document, limit: int = 12) -> list[Row]:
    """Return the choices of experts that are least explained."""
    said = {True: "yes", False: "no", None: "-"}
    return [
        (
            str(flip["layer"]),
            visible(flip["prompt"], 20),
            str(flip["token"]),
            " ".join(map(str, flip["dropped"])),
            " ".join(map(str, flip["taken"])),
            number(flip["margin"]) if flip["margin"] is not None else "-",
            number(flip["score_error"]),
            said[flip["explained"]],
        )
        for flip in document["routing"]["worst_flips"][:limit]
    ]
