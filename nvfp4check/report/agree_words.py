"""An agreement in sentences and rows, which text, Markdown, JUnit and HTML share."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nvfp4check.report.visible import visible

Document = Mapping[str, Any]
Row = tuple[str, ...]

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


def number(value: float | None, form: str = "g") -> str:
    """Return a number as it is shown, and a dash for none."""
    if value is None:
        return "-"
    if form == "%":
        return f"{value:.2%}"
    return f"{value:.4f}" if form == "f" and value < 1e4 else f"{value:.3g}"


def heading(document: Document) -> str:
    """Return the verdict and what it is about."""
    return f"{document['verdict'].upper()}: {title(document)}"


def title(document: Document) -> str:
    """Return what was held against what."""
    candidate, reference = document["candidate"]["run"], document["reference"]["run"]
    return f"{visible(candidate)} against {visible(reference)}"


def run_rows(document: Document) -> list[Row]:
    """Return what each run is."""
    runs = [("reference", document["reference"]), ("candidate", document["candidate"])]
    runs += [("noise", run) for run in document["noise"]]
    return [(name, visible(run["run"]), _run_facts(run)) for name, run in runs]


def _run_facts(run: Mapping[str, Any]) -> str:
    checkpoint = run["checkpoint"]
    where = checkpoint.get("location") or checkpoint.get("served_as") or "unknown checkpoint"
    facts = [where, run["mode"], run["dtype"], run["perturb"] and f"noise {run['perturb']}"]
    return visible(", ".join(str(fact) for fact in facts if fact))


def criteria_sentences(document: Document) -> Iterator[str]:
    """Say what was judged, and how."""
    for criterion in document["criteria"]:
        yield criterion_sentence(criterion, document["alpha"])
    if not document["criteria"]:
        yield (
            "Nothing was judged: give limits (--max-kl, --min-top1) or a noise run (--noise); "
            "the numbers below stand for themselves."
        )


def criterion_sentence(criterion: Mapping[str, Any], alpha: float) -> str:
    """Say how one thing was decided, and by what."""
    text = f"{criterion['decision'].upper()}: {criterion['what']}"
    if criterion["limit"] is None:
        return text
    if criterion["what"].endswith("without NaN or infinity"):
        return f"{text}: {number(criterion['found'])} hold some"
    share = criterion["what"].startswith("top-1")
    form = "%" if share else "g"
    text += f" {number(criterion['found'], form)}, limit {number(criterion['limit'], form)}"
    bounds = criterion.get("bounds")
    if not bounds:
        return f"{text}; too few positions to be sure of anything"
    low, high = (number(bound, form) for bound in bounds)
    sure = f"with {100 * (1 - alpha):.4g} % confidence"
    if criterion["decision"] == "undecided" and not share and bounds[1] <= criterion["limit"]:
        return (
            f"{text}; {sure} at most {high}, but KL is known from below only, for the best tokens "
            "alone are known: that a limit is kept takes full logits"
        )
    if criterion["decision"] == "undecided":
        return f"{text}; {sure} each way between {low} and {high}, which more prompts would narrow"
    passes = criterion["decision"] == "pass"
    return f"{text}; {sure} at most {high}" if passes != share else f"{text}; {sure} at least {low}"


def divergence_sentence(document: Document) -> str | None:
    """Say where the runs part, None where no layers were compared."""
    if not document["layers"]:
        return None
    found = document["first_divergence"]
    if found is None:
        held = "equal bit for bit"
        if any(point["held_against"] == "bound" for point in document["layers"]):
            held = "within its bound"
        if any(point["held_against"] == "noise floor" for point in document["layers"]):
            held = "within the noise floor" if held[0] == "e" else f"{held} or the noise floor"
        return f"Layers: every point is {held}."
    text = f" ({visible(found['text'])!r})" if found.get("text") else ""
    against = found["held_against"]
    held = f"held against the {against}"
    if against == "nothing":
        held = "any difference counts, as no noise run (--noise) says what rounding does"
    return (
        f"First divergence: layer {found['layer']}, {found['point']}, prompt "
        f"{visible(found['prompt'])}, token {found['token']}{text}; {held}."
    )


def problem_sentences(document: Document) -> Iterator[str]:
    """Say what is wrong with the runs themselves; repeats over layers are folded."""
    folded: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for problem in document["problems"]:
        key = (problem["kind"], problem["run"], problem["point"], problem["prompt"])
        folded.setdefault(key, []).append(problem)
    for problems in folded.values():
        first = problems[0]
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        mark = "problem" if first["fatal"] else "note"
        yield f"{mark}, {first['run']}: {visible(first['message'])}{more}"


def blind_sentences(document: Document) -> Iterator[str]:
    """Say what these prompts cannot see."""
    for blind in document["blind"]:
        yield f"{visible(blind['what'])}: {visible(blind['why'])}"


def logit_rows(document: Document) -> list[Row]:
    """Return the numbers of the logits."""
    logits = document["logits"]
    noise = logits["noise"]
    rows: list[Row] = []
    for name, label, form in _LOGIT_ROWS:
        interval = logits.get({"kl_mean": "kl_ci95", "top1": "top1_ci95"}.get(name, ""))
        shown = f"{number(interval[0], form)} to {number(interval[1], form)}" if interval else ""
        floors = ", ".join(number(run[name], form) for run in noise)
        rows.append((label, number(logits[name], form), shown, floors))
    return rows


def logit_notes(document: Document) -> Iterator[str]:
    """Say what the numbers of the logits rest on."""
    logits = document["logits"]
    prompts = len(logits["by_prompt"])
    yield (
        f"{logits['positions']:,} positions of {prompts} prompts, in {logits['segments']:,} "
        f"segments; a change of the mean KL by {number(logits['kl_smallest_effect'])}, or of top-1 "
        f"by {number(logits['top1_smallest_effect'], '%')}, would be seen with "
        f"{document['power']:.0%} probability at alpha {document['alpha']:g}."
    )
    if prompts == 1:
        yield "One prompt: the intervals speak of that text, and not of how others would do."
    if logits["positions"] >= 3:
        yield (
            f"What happens at fewer than 1 in {logits['positions'] // 3:,} positions may be absent "
            "from this sample, and from all of these numbers."
        )
    if logits["contaminated"]:
        yield f"{logits['contaminated']:,} positions hold NaN or infinity and are left out."
    if logits["kl_infinite"]:
        yield (
            f"{logits['kl_infinite']:,} positions have infinite KL: the candidate rules out a "
            "token that the reference does not."
        )
    best = logits["best_only"]
    if best and not best["exact"]:
        yield (
            "Only the best tokens are known: KL and JSD are lower bounds. On the mean, "
            f"{number(best['tail_reference'], '%')} of the reference's probability lies outside "
            f"them; KL is {number(best['kl_if_bounded'])} if no unlisted token is worse than the "
            "worst listed one, and has no upper bound otherwise."
        )


def split_sentence(document: Document) -> str | None:
    """Say how KL splits into arithmetic and other experts."""
    split = document["routing"]["kl_split"]
    if not split:
        return None
    flips = split["flips"]
    interval = flips["ci95"]
    shown = f" ({number(interval[0])} to {number(interval[1])})" if interval else ""
    return (
        f"KL {number(split['total']['mean'])} = {number(split['arithmetic']['mean'])} with the "
        f"reference's experts + {number(flips['mean'])}{shown} from other experts."
    )


def versus_sentence(document: Document) -> str | None:
    """Say which of two candidates is nearer to the reference."""
    versus = document["versus"]
    if not versus:
        return None
    other = visible(versus["run"])
    difference = versus["difference"]
    interval = difference["ci95"]
    shown = f"{number(interval[0])} to {number(interval[1])}" if interval else "no interval"
    measured = (
        f"KL of {other} less that of the candidate is {number(difference['mean'])} ({shown}), "
        "paired by position"
    )
    if versus["nearer"] is None:
        return f"No ranking: {measured}; the difference lies inside the noise."
    nearer = "the candidate" if versus["nearer"] == "candidate" else other
    return f"Nearer to the reference: {nearer}; {measured}."


def bounds_sentence(document: Document) -> str | None:
    """Say what was held against derived bounds; None where nothing was."""
    bounds = document.get("bounds")
    if not bounds or not (bounds["held"] or bounds["free"]):
        return None
    text = (
        f"Derived bounds ({bounds['dtype']}): {bounds['held']:,} tokens at points with golden "
        f"inputs held, {bounds['exceeding']:,} beyond; a correct candidate exceeds any of them "
        f"with probability {number(bounds['risk'])} at most, roundings taken as random"
    )
    if bounds["free"]:
        text += f". {bounds['free']:,} have no bound, as they chose other experts and legally may"
    if bounds["illegal_flips"]:
        text += f". {bounds['illegal_flips']:,} chose other experts though nothing allows it"
    return f"{text}."


def routing_sentence(document: Document) -> str | None:
    """Say how many tokens went to other experts."""
    routing = document["routing"]
    if not routing["layers"]:
        return None
    unjudged = sum(layer["unjudged"] for layer in routing["layers"])
    text = (
        f"Routing: {routing['flips']:,} of {routing['tokens']:,} choices of experts differ, "
        f"{routing['unexplained']:,} of them by more than the error of the scores explains"
    )
    return f"{text} ({unjudged:,} without scores to judge by)." if unjudged else f"{text}."


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
            number(bucket["kl_mean"]),
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
            number(prompt["kl_mean"]),
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
            number(worst["kl"]),
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
