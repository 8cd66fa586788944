"""An agreement in sentences, which text, Markdown, JUnit and HTML share."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from nvfp4check.report.visible import visible

Document = Mapping[str, Any]
Row = tuple[str, ...]


def number(value: float | None, form: str = "g") -> str:
    """Return a number as it is shown, and a dash for none."""
    if value is None:
        return "-"
    if form == "%":
        return f"{value:.2%}"
    return f"{value:.4f}" if form == "f" and value < 1e4 else f"{value:.3g}"


def over(value: float | None, positions: int, form: str = "g") -> str:
    """Return a number over so many positions: over any, what JSON cannot hold is infinite."""
    return "infinite" if value is None and positions else number(value, form)


def counted(count: int, what: str) -> str:
    """Return a number of things."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


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
    absent = sum(problem["kind"] == "missing" for problem in document["problems"])
    if absent and document["verdict"] == "pass":
        yield (
            f"Not all was compared: {counted(absent, 'thing')} that a run lacks, noted below. The "
            "exit code is 2 for that, unless --allow-skips is given."
        )
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
        holds = "holds" if criterion["found"] == 1 else "hold"
        return f"{text}: {number(criterion['found'])} {holds} some"
    share = criterion["what"].startswith("top-1")
    form = "%" if share else "g"
    bounds = criterion.get("bounds")
    found, limit = over(criterion["found"], bool(bounds), form), number(criterion["limit"], form)
    text += f" {found}, limit {limit}"
    if not bounds:
        return f"{text}; too few positions to be sure of anything"
    low, high = (over(bound, 1, form) for bound in bounds)
    sure = f"with {100 * (1 - alpha):.4g} % confidence"
    if criterion["decision"] == "undecided":
        if share or bounds[1] is None or bounds[1] > criterion["limit"]:
            return f"{text}; {sure} {_undecided(criterion, low, high)}"
        return (
            f"{text}; {sure} at most {high}, but KL is known from below only, for the best tokens "
            "alone are known: that a limit is kept takes full logits"
        )
    passes = criterion["decision"] == "pass"
    text = f"{text}; {sure} at most {high}" if passes != share else f"{text}; {sure} at least {low}"
    return f"{text}, {_unseen(criterion)}" if criterion.get("unseen_share") and passes else text


def _unseen(criterion: Mapping[str, Any]) -> str:
    """Say what a limit that is kept does not speak of, or allows for."""
    rare, one_in = criterion["rare_kl"], math.floor(1 / criterion["unseen_share"])
    if not rare:
        return f"of positions like these; of a kind rarer than 1 in {one_in:,} there may be none"
    return f"with {number(rare)} nats at positions of a kind too rare to be among these"


def _undecided(criterion: Mapping[str, Any], low: str, high: str) -> str:
    """Say between which bounds a mean lies, and what would narrow them."""
    text = f"each way between {low} and {high}"
    if criterion.get("allowance"):
        text += (
            f", {number(criterion['allowance'])} of it for what is too rare to be in this sample, "
            f"at {number(criterion['rare_kl'])} nats a position (--rare-kl)"
        )
    needed = criterion.get("prompts_needed")
    if not needed:
        return f"{text}, which more prompts would narrow"
    return f"{text}; some {needed:,} prompts like these would decide"


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


def logit_notes(document: Document) -> Iterator[str]:
    """Say what the numbers of the logits rest on."""
    logits = document["logits"]
    prompts = len(logits["by_prompt"])
    effects = [
        f"of {what} by {number(logits[name], form)}"
        for what, name, form in (
            ("the mean KL", "kl_smallest_effect", "g"),
            ("top-1", "top1_smallest_effect", "%"),
        )
        if logits[name] is not None
    ]
    seen = (
        f"; a change {', or '.join(effects)}, would be seen with {document['power']:.0%} "
        f"probability at alpha {document['alpha']:g}"
    )
    yield (
        f"{counted(logits['positions'], 'position')} of {counted(prompts, 'prompt')}, in "
        f"{counted(logits['segments'], 'segment')}{seen if effects else ''}."
    )
    judged = {criterion["what"] for criterion in document["criteria"]}
    if "layers within their derived bounds" in judged and not any("logits" in j for j in judged):
        yield (
            "The verdict rests on layers alone: the norm and the head behind them have no bound; "
            "--noise, --max-kl and --min-top1 judge logits."
        )
    held = document["logits"].get("held_against_noise") or {}
    if held.get("diverges") and document["layers"] and document["first_divergence"] is None:
        yield (
            "Logits lie beyond those of the noise, and every layer is within: it is the norm, the "
            "head, or what became of the logits afterwards."
        )
    if prompts == 1:
        yield "One prompt: the intervals speak of that text, and not of how others would do."
    if logits["positions"] >= 3:
        yield (
            f"What happens at fewer than 1 in {logits['positions'] // 3:,} positions may be absent "
            "from this sample, and from all of these numbers."
        )
    if logits["contaminated"]:
        broken = counted(logits["contaminated"], "position")
        yield f"Left out, as holding NaN or infinity: {broken}."
    if logits["kl_infinite"]:
        yield (
            f"KL is infinite at {counted(logits['kl_infinite'], 'position')}: the candidate rules "
            "out a token that the reference does not."
        )
    best = logits["best_only"]
    if best and not best["exact"]:
        yield (
            "Only the best tokens are known: KL and JSD are lower bounds. On the mean, "
            f"{number(best['tail_reference'], '%')} of the reference's probability lies outside "
            f"them; KL is {number(best['kl_if_bounded'])} if no unlisted token is worse than the "
            "worst listed one, and has no upper bound otherwise."
        )
    known, followed = logits.get("followed_known"), logits.get("followed")
    if followed and not known:
        yield (
            "Perplexities and the change of p are not known: of no position do both sides list the "
            "token that follows."
        )
    elif followed and known < followed:
        yield (
            f"Perplexities, their ratio and the change of p are over {known:,} of {followed:,} "
            "positions that a token follows: where a side does not list that token the position "
            "is left out, so that what is unlikely is missing from them."
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


def cache_sentence(document: Document) -> str | None:
    """Say whether the candidate's cache holds codes; None where nothing is known of it."""
    cache = (document.get("bounds") or {}).get("cache")
    if not cache or cache["low"] > 0.5:  # a problem says so
        return None
    if cache["high"] < 0.5:
        share = f"{cache['share']:.2f} ({cache['low']:.2f} to {cache['high']:.2f})"
        return f"KV cache: FP8 as in the reference; {share} of the error that keeping values makes."
    return "KV cache: so few tokens do not tell whether it is FP8 as in the reference."


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
