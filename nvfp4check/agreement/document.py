"""The JSON document of an agreement; what is not a number in JSON (NaN, infinity) becomes null."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import nvfp4check
from nvfp4check.activations import Run
from nvfp4check.agreement.agree import AgreeResult, KlSplit, Versus
from nvfp4check.agreement.divergence import HeldPoint
from nvfp4check.agreement.layers import Place
from nvfp4check.agreement.outliers import Outlier
from nvfp4check.agreement.routing import LayerRouting
from nvfp4check.agreement.statistics import Estimate
from nvfp4check.agreement.summary import Bucket, Summary
from nvfp4check.agreement.uncached import CacheShare
from nvfp4check.agreement.words import Words

SCHEMA = "nvfp4check/agree/1"

#: Flips that are listed, the least explained first.
FLIPS_LISTED = 50

#: Columns of the map of flips.
MAP_COLUMNS = 48


def agree_document(result: AgreeResult, words: Words | None = None) -> dict[str, Any]:
    """Return the document; `words` gives the text of tokens."""
    words = words or Words(None)
    divergence = result.divergence
    return {
        "schema": SCHEMA,
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "verdict": result.verdict.value,
        "criteria": [
            {
                "what": criterion.what,
                "decision": criterion.decision.value,
                "found": number(criterion.found),
                "limit": criterion.limit,
                "bounds": criterion.bounds and [number(bound) for bound in criterion.bounds],
                "smallest_effect": number(criterion.effect),
                "unseen_share": number(criterion.unseen_share),
                "rare_kl": number(criterion.rare_kl),
                "allowance": number(criterion.allowance),
                "prompts_needed": criterion.prompts_needed,
            }
            for criterion in result.criteria
        ],
        "alpha": result.options.alpha,
        "power": result.options.power,
        "reference": _run(result.reference),
        "candidate": _run(result.candidate),
        "noise": [_run(run) for run in result.options.noise],
        "bounds": result.bounds.dtype
        and {
            "dtype": result.bounds.dtype,
            "held": sum(held.tokens for held in result.bounds.points.values()),
            "free": sum(held.free for held in result.bounds.points.values()),
            "exceeding": sum(held.exceeding for held in result.bounds.points.values()),
            "illegal_flips": len(result.bounds.illegal),
            "risk": result.bounds.risk,
            "cache": _cache(result.bounds.cache),
        },
        "prompts": [
            {"id": info.id, "tokens": info.tokens, "text": info.text}
            for info in result.reference.info.prompts
            if info.id in result.prompts
        ],
        "first_divergence": divergence
        and {
            "layer": divergence.layer,
            "point": divergence.point,
            "prompt": divergence.place.prompt,
            "token": divergence.place.token,
            "text": words.at(result.reference, divergence.place.prompt, divergence.place.token),
            "held_against": divergence.held_against,
        },
        "problems": [asdict(problem) for problem in result.problems],
        "blind": [asdict(blind) for blind in result.blind],
        "layers": [_point(point) for point in result.layers],
        "routing": _routing(result.routing, result.split, result),
        "logits": result.logits and _logits(result.logits, result, words),
        "versus": result.versus and _versus(result.versus),
    }


def number(value: float | None) -> float | None:
    """Return a number as JSON can hold it."""
    return None if value is None or not math.isfinite(value) else value


def _run(run: Run) -> dict[str, Any]:
    info = run.info
    return {
        "run": str(run.path),
        "checkpoint": info.checkpoint,
        "mode": info.mode,
        "kv_cache": info.kv_cache,
        "dtype": info.dtype,
        "perturb": info.perturb,
        "given_inputs": info.inputs is not None,
        "seed": info.seed,
        "versions": info.versions,
    }


def _place(place: Place | None) -> dict[str, Any] | None:
    return None if place is None else {"prompt": place.prompt, "token": place.token}


def _cache(cache: CacheShare | None) -> dict[str, Any] | None:
    if cache is None or cache.interval is None:
        return None
    low, high = cache.interval
    return {"share": cache.share, "low": low, "high": high}


def _outlier(alone: Outlier | None) -> dict[str, Any] | None:
    if alone is None:
        return None
    return {
        **asdict(alone.place),
        "tokens": alone.tokens,
        "error": number(alone.error),
        "noise": number(alone.noise),
    }


def _point(point: HeldPoint) -> dict[str, Any]:
    agreement = point.agreement
    worst = _place(agreement.worst)
    bound = point.bound
    return {
        "layer": agreement.layer,
        "point": agreement.point,
        "relative_error": number(agreement.relative_error),
        "sqnr_db": number(agreement.sqnr_db),
        "bitwise": agreement.bitwise,
        "input_bitwise": point.input_bitwise,
        "bound": number(bound.relative) if bound else None,
        "bound_ratio": number(bound.ratio) if bound else None,
        "bound_worst": _place(bound.worst) if bound else None,
        "bound_tokens": bound.tokens if bound else 0,
        "bound_free": bound.free if bound else 0,
        "bound_exceeding": bound.exceeding if bound else 0,
        "tokens": agreement.tokens,
        "worst": worst and {**worst, "relative_error": number(agreement.worst_error)},
        "share": number(agreement.share),
        "held_against": point.held_against,
        "floor": number(point.floor),
        "log_ratio": number(point.log_ratio),
        "log_ratio_low": number(point.log_ratio_low),
        "excess": number(point.excess),
        "excess_low": number(point.excess_low),
        "outlier": _outlier(point.outlier),
        "diverges": point.diverges,
        "nonfinite_reference": agreement.nonfinite_reference,
        "nonfinite_candidate": agreement.nonfinite_candidate,
    }


def _routing(
    routing: Sequence[LayerRouting], split: KlSplit | None, result: AgreeResult
) -> dict[str, Any]:
    flips = [flip for layer in routing for flip in layer.flips]
    unexplained = [flip for flip in flips if flip.legal is False]
    order = sorted(flips, key=lambda f: -_excess(f.margin, f.score_error))
    longest = max((info.tokens for info in result.reference.info.prompts), default=1)
    width = max(1, math.ceil(longest / MAP_COLUMNS))
    return {
        "tokens": sum(layer.tokens for layer in routing),
        "flips": len(flips),
        "unexplained": len(unexplained),
        "layers": [
            {
                "layer": layer.layer,
                "tokens": layer.tokens,
                "flips": len(layer.flips),
                "unexplained": sum(flip.legal is False for flip in layer.flips),
                "unjudged": sum(flip.legal is None for flip in layer.flips),
                "score_error": number(layer.score_error),
                "experts": len(layer.load_reference),
                "exercised": layer.exercised,
                "idle": [e for e, count in enumerate(layer.load_reference) if not count],
                "load_reference": layer.load_reference,
                "load_candidate": layer.load_candidate,
                "by_position": _by_position(layer, width, longest),
            }
            for layer in routing
        ],
        "position_width": width,
        "worst_flips": [
            {
                "layer": flip.layer,
                "prompt": flip.place.prompt,
                "token": flip.place.token,
                "dropped": flip.dropped,
                "taken": flip.taken,
                "margin": number(flip.margin),
                "score_error": number(flip.score_error),
                "explained": flip.legal,
            }
            for flip in order[:FLIPS_LISTED]
        ],
        "kl_split": split
        and {
            "total": _estimate(split.total),
            "arithmetic": _estimate(split.arithmetic),
            "flips": _estimate(split.flips),
        },
    }


def _excess(margin: float | None, error: float | None) -> float:
    return -math.inf if margin is None or error is None else margin - error


def _by_position(layer: LayerRouting, width: int, longest: int) -> list[int]:
    counts = [0] * math.ceil(longest / width)
    for flip in layer.flips:
        counts[flip.place.token // width] += 1
    return counts


def _estimate(found: Estimate) -> dict[str, Any]:
    interval = found.interval()
    return {
        "mean": number(found.mean),
        "ci95": interval and [number(interval[0]), number(interval[1])],
        "segments": found.segments,
    }


def logits_numbers(summary: Summary) -> dict[str, Any]:
    """Return the numbers of a comparison of logits."""
    kl = summary.values("kl")
    median, p95, p99, p999 = summary.kl_quantiles((0.5, 0.95, 0.99, 0.999))
    perplexities = summary.perplexities
    both = all(0 < value < math.inf for value in perplexities)
    ratio = math.log(perplexities[1] / perplexities[0]) if both else math.nan
    return {
        "positions": summary.positions,
        "contaminated": summary.contaminated,
        "kl_mean": number(summary.kl.mean),
        "kl_ci95": _estimate(summary.kl)["ci95"],
        "kl_median": number(median),
        "kl_p95": number(p95),
        "kl_p99": number(p99),
        "kl_p999": number(p999),
        "kl_max": number(float(kl.max())) if len(kl) else None,
        "kl_infinite": int(kl.isposinf().sum()),
        "kl_reverse_mean": number(summary.mean("kl_reverse")),
        "jsd_mean": number(summary.mean("jsd")),
        "top1": number(summary.mean("top1")),
        "top1_ci95": _estimate(summary.top1)["ci95"],
        "top5_overlap": number(summary.mean("top5_overlap")),
        "top10_overlap": number(summary.mean("top10_overlap")),
        "ppl_reference": number(perplexities[0]),
        "ppl_candidate": number(perplexities[1]),
        "ppl_log_ratio": number(ratio),
        "delta_p_rms": number(summary.delta_p_rms),
        "followed": summary.followed,
        "followed_known": summary.followed_known,
    }


def _logits(summary: Summary, result: AgreeResult, words: Words) -> dict[str, Any]:
    options = result.options
    positions = result.positions
    tail = positions.tail if positions is not None else None
    return {
        **logits_numbers(summary),
        "segments": summary.kl.segments,
        "kl_smallest_effect": number(summary.kl.smallest_effect(options.alpha, options.power)),
        "top1_smallest_effect": number(summary.top1.smallest_effect(options.alpha, options.power)),
        "vocabulary": positions.vocabulary if positions is not None else None,
        "best_only": tail
        and {
            "tail_reference": number(tail.reference),
            "tail_candidate": number(tail.candidate),
            "kl_if_bounded": number(tail.kl_if_bounded),
            "exact": tail.exact,
        },
        "noise": [logits_numbers(noise) for noise in result.noise_logits],
        "held_against_noise": result.logits_held and _held_logits(result.logits_held),
        "by_confidence": [_bucket(bucket) for bucket in summary.by_confidence()],
        "by_position": [_bucket(bucket) for bucket in summary.by_position()],
        "kl_histogram": [list(row) for row in summary.kl_histogram()],
        "by_prompt": [
            {
                "id": prompt,
                "positions": int((~metrics.contaminated).sum()),
                "kl_mean": number(float(metrics.kl.nanmean())),
                "top1": number(float(metrics.top1.nanmean())),
            }
            for prompt, metrics in summary.by_prompt.items()
        ],
        "worst": [
            {
                "prompt": worst.prompt,
                "position": worst.position,
                "kl": number(worst.kl),
                "confidence": number(worst.confidence),
                "before": words.before(result.reference, worst.prompt, worst.position),
                "reference": words.token(worst.top_reference),
                "candidate": words.token(worst.top_candidate),
            }
            for worst in summary.worst()
        ],
    }


def _held_logits(held: HeldPoint) -> dict[str, Any]:
    """Return how logits lie to those of the noise, as square roots of KL."""
    return {
        "error": number(held.agreement.relative_error),
        "floor": number(held.floor),
        "log_ratio": number(held.log_ratio),
        "log_ratio_low": number(held.log_ratio_low),
        "excess": number(held.excess),
        "excess_low": number(held.excess_low),
        "outlier": _outlier(held.outlier),
        "diverges": held.diverges,
        "first": _place(held.place),
    }


def _bucket(bucket: Bucket) -> dict[str, Any]:
    return {
        "low": bucket.low,
        "high": bucket.high,
        "positions": bucket.positions,
        "kl_mean": number(bucket.kl_mean),
        "top1": number(bucket.top1),
    }


def _versus(versus: Versus) -> dict[str, Any]:
    return {
        "run": str(versus.run.path),
        "kl": _estimate(versus.kl),
        "difference": _estimate(versus.difference),
        "nearer": versus.nearer,
    }
