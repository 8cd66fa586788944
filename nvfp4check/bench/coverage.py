"""`python -m nvfp4check.bench coverage`: how often what `agree` says of a mean is wrong.

Samples of positions are drawn whose true mean is known, 0.02 nats of KL: heavy tails, prompts that
differ (`r` correlates the normal values behind two positions of a prompt), positions that depend on
their neighbours, disasters of 10 nats at one position in a thousand; few prompts and many, short,
long and of unequal length. Counted are, of all samples,

    above, below    the true mean lies above the one-sided 95 % upper bound, below the lower one
    inside          it lies inside the two-sided 95 % interval
    wrong PASS      at a limit equal to the true mean
    wrong FAIL      likewise
    PASS at 2.5 x   at a limit of 2.5 times the true mean; of top-1, of as many misses
    rare            PASS at these two limits with --rare-kl, at the KL of a guess
    width           the upper bound over the sample's mean, of top-1 that of misses, the median

A wrong verdict in more than 5 % of the samples breaks the promise. A single prompt knows nothing of
how prompts differ, and is left out where they do.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nvfp4check.agreement import statistics
from nvfp4check.agreement.statistics import (
    Decision,
    Kind,
    decide_at_least,
    decide_at_most,
    estimate,
)

ALPHA = 0.05
KL = 0.02
#: KL of a guess, over DeepSeek-V3's vocabulary.
GUESS = math.log(129_280)
#: What is counted.
HEADS = {
    "above": "above",
    "below": "below",
    "inside": "inside",
    "wrong_pass": "wrong PASS",
    "wrong_fail": "wrong FAIL",
    "right_pass": "PASS at 2.5 x",
    "wary_wrong": "rare: wrong",
    "wary_right": "rare: at 2.5 x",
}
#: The limit that a candidate should pass, over its true mean.
GENEROUS = 2.5

Random = np.random.Generator
#: Makes values of mean 1 of values with a standard normal distribution.
Shape = Callable[[torch.Tensor], torch.Tensor]


def normal(random: Random, length: int, share: float = 0.0) -> torch.Tensor:
    """Return standard normal values, any two of which correlate by `share`."""
    own = math.sqrt(1 - share) * random.standard_normal(length)
    return torch.from_numpy(own + math.sqrt(share) * random.standard_normal())


def neighbours(random: Random, length: int, share: float = 0.7) -> torch.Tensor:
    """Return standard normal values, of which neighbours correlate by `share`."""
    values = random.standard_normal(length)
    for place in range(1, length):
        values[place] = share * values[place - 1] + math.sqrt(1 - share**2) * values[place]
    return torch.from_numpy(values)


def log_normal(spread: float) -> Shape:
    """Return what makes log-normal values."""
    return lambda values: (spread * values - spread**2 / 2).exp()


def pareto(tail: float) -> Shape:
    """Return what makes Pareto values: the share above x falls as x ** -tail."""
    return lambda values: (-torch.special.log_ndtr(-values) / tail).exp() * (tail - 1) / tail


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where positions come from."""

    name: str
    draw: Callable[[Random, int], torch.Tensor]
    true: float = KL
    kind: Kind = Kind.POSITIVE
    prompts_differ: bool = False


def _continuous(name: str, shape: Shape, share: float = 0.0) -> Source:
    return Source(
        name=name if share == 0 else f"{name}, r {share:g}",
        draw=lambda random, length: KL * shape(normal(random, length, share)),
        prompts_differ=share > 0,
    )


def _gamma(random: Random, length: int) -> torch.Tensor:
    return torch.from_numpy(KL * random.gamma(0.2, 5.0, length))


def _disasters(random: Random, length: int) -> torch.Tensor:
    rare, size = 1e-3, 10.0
    usual = log_normal(1.0)(normal(random, length)) * (KL - rare * size) / (1 - rare)
    return torch.where(torch.from_numpy(random.random(length) < rare), size, usual)


def _top1(share: float) -> Source:
    threshold = normal_quantile(0.97)
    return Source(
        name="top-1 of 97 %" if share == 0 else f"top-1 of 97 %, r {share:g}",
        draw=lambda random, length: (normal(random, length, share) < threshold).double(),
        true=0.97,
        kind=Kind.SHARE,
        prompts_differ=share > 0,
    )


def normal_quantile(share: float) -> float:
    """Return the value below which this share of a standard normal distribution lies."""
    return float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))


SOURCES = (
    _continuous("log-normal 1", log_normal(1.0)),
    _continuous("log-normal 1", log_normal(1.0), 0.1),
    _continuous("log-normal 1", log_normal(1.0), 0.3),
    _continuous("log-normal 1", log_normal(1.0), 0.7),
    _continuous("log-normal 2.5", log_normal(2.5)),
    _continuous("log-normal 2.5", log_normal(2.5), 0.3),
    _continuous("log-normal 2.5", log_normal(2.5), 0.7),
    Source(name="gamma 0.2", draw=_gamma),
    _continuous("Pareto 3", pareto(3.0)),
    _continuous("Pareto 2", pareto(2.0)),
    _continuous("Pareto 2", pareto(2.0), 0.7),
    Source(
        name="neighbours correlate",
        draw=lambda random, length: KL * log_normal(1.5)(neighbours(random, length)),
    ),
    Source(name="disasters, 1 in 1,000", draw=_disasters),
    _top1(0.0),
    _top1(0.1),
)
SHAPES = {
    "1 x 2000": (2000,),
    "3 x 20": (20,) * 3,
    "3 x 10, 400": (10, 10, 10, 400),
    "4 x 500": (500,) * 4,
    "5 x 100": (100,) * 5,
    "20 x 100": (100,) * 20,
    "100 x 20": (20,) * 100,
    "200 x 100": (100,) * 200,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Shares of all samples, and a median."""

    above: float
    below: float
    inside: float
    wrong_pass: float
    wrong_fail: float
    right_pass: float
    wary_wrong: float
    wary_right: float
    width: float


def covered(source: Source, shape: str, trials: int, seed: int = 0) -> Coverage:
    """Draw so many samples, and count."""
    random = np.random.default_rng(seed)
    share = source.kind is Kind.SHARE
    generous = 1 - GENEROUS * (1 - source.true) if share else GENEROUS * source.true
    counts = dict.fromkeys(HEADS, 0)
    widths = []
    for trial in range(trials):
        prompts = [source.draw(random, length) for length in SHAPES[shape]]
        found = estimate(prompts, trial, source.kind, by_prompt=True)
        low, high = found.interval(1 - ALPHA) or (math.nan, math.nan)
        lower, upper = found.lower_bound(ALPHA), found.upper_bound(ALPHA)
        decided, wary = (
            [
                (
                    decide_at_least(found, limit, ALPHA)
                    if share
                    else decide_at_most(found, limit, ALPHA, rare)
                )
                for limit in (source.true, generous)
            ]
            for rare in (0.0, GUESS)
        )
        counts["above"] += upper < source.true
        counts["below"] += lower > source.true
        counts["inside"] += low <= source.true <= high
        counts["wrong_pass"] += decided[0] is Decision.PASS
        counts["wrong_fail"] += decided[0] is Decision.FAIL
        counts["right_pass"] += decided[1] is Decision.PASS
        counts["wary_wrong"] += wary[0] is Decision.PASS
        counts["wary_right"] += wary[1] is Decision.PASS
        widths.append((1 - lower) / max(1 - found.mean, 1e-300) if share else upper / found.mean)
    shares = {name: count / trials for name, count in counts.items()}
    return Coverage(**shares, width=float(np.median(widths)))


def main(argv: Sequence[str]) -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(prog="python -m nvfp4check.bench coverage")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--resamples", type=int, default=400, help="agree itself takes 4,000")
    parser.add_argument("--only", default="", help="sources whose name holds this")
    options = parser.parse_args(argv)
    statistics.RESAMPLES = options.resamples
    torch.set_num_threads(1)
    heads = (*HEADS.values(), "width")
    print(f"{'positions':<24}{'prompts':<13}" + "".join(f"{head:>15}" for head in heads))
    for source in SOURCES:
        for shape in SHAPES:
            if options.only not in source.name or (shape[0:2] == "1 " and source.prompts_differ):
                continue
            found = covered(source, shape, options.trials)
            shares = [getattr(found, name) for name in HEADS]
            print(
                f"{source.name:<24}{shape:<13}"
                + "".join(f"{share:>15.1%}" for share in shares)
                + f"{found.width:>15.2f}",
                flush=True,
            )
    return 0
