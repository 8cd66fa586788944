"""`python -m nvfp4check.bench coverage`: how often the intervals of `agree` miss the true mean.

Samples of positions are drawn from distributions whose mean is known: heavy tails, prompts that
differ, positions that depend on their neighbours, disasters at one position in a hundred; few
prompts and many, short, long and of unequal length. Counted are the true means that lie above the
one-sided 95 % upper bound (of KL, each is a wrong PASS at a limit just below it) and below the
lower bound (a wrong FAIL), both 5 % or less if the bounds keep their promise, and those inside the
two-sided 95 % interval. A single prompt knows nothing of how prompts differ, and a sample without a
disaster nothing of disasters: there the bounds speak of what is like the sample.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nvfp4check.agreement import statistics
from nvfp4check.agreement.statistics import Kind, estimate

ALPHA = 0.05


def _independent(generator: torch.Generator, length: int) -> torch.Tensor:
    return torch.randn(length, generator=generator, dtype=torch.float64)


def _correlated(generator: torch.Generator, length: int, share: float = 0.8) -> torch.Tensor:
    """Return a sequence whose neighbours correlate by `share`."""
    values = _independent(generator, length)
    for place in range(1, length):
        values[place] = share * values[place - 1] + math.sqrt(1 - share**2) * values[place]
    return values


def _log_normal(log: torch.Tensor, spread: float, prompt: float) -> torch.Tensor:
    """Return values of mean 1, their logarithm of this spread, the prompt's part `prompt` added."""
    return (spread * log - spread**2 / 2 + prompt).exp()


def _light(generator: torch.Generator, length: int) -> torch.Tensor:
    return _log_normal(_independent(generator, length), 1.0, 0.0)


def _heavy(generator: torch.Generator, length: int) -> torch.Tensor:
    return _log_normal(_independent(generator, length), 2.0, 0.0)


def _own(generator: torch.Generator, spread: float) -> float:
    """Return the part of the logarithm that all positions of a prompt share."""
    return spread * float(_independent(generator, 1)) - spread**2 / 2


def _prompts_differ(generator: torch.Generator, length: int) -> torch.Tensor:
    return _log_normal(_independent(generator, length), 1.5, _own(generator, 0.5))


def _neighbours(generator: torch.Generator, length: int) -> torch.Tensor:
    return _log_normal(_correlated(generator, length), 1.5, _own(generator, 0.5))


def _disasters(generator: torch.Generator, length: int) -> torch.Tensor:
    rare = torch.rand(length, generator=generator, dtype=torch.float64) < 0.01
    return torch.where(rare, 3.0, 0.01) / (0.01 * 3.0 + 0.99 * 0.01)


def _share(generator: torch.Generator, length: int) -> torch.Tensor:
    """Return zeros and ones, the share of which differs from prompt to prompt: 97 % on average."""
    level = 0.98 if float(torch.rand(1, generator=generator)) < 0.8 else 0.93
    return (torch.rand(length, generator=generator) < level).double()


SOURCES: dict[str, tuple[Callable[[torch.Generator, int], torch.Tensor], Kind, float]] = {
    "log-normal, 1": (_light, Kind.POSITIVE, 1.0),
    "log-normal, 2": (_heavy, Kind.POSITIVE, 1.0),
    "prompts differ": (_prompts_differ, Kind.POSITIVE, 1.0),
    "neighbours correlate": (_neighbours, Kind.POSITIVE, 1.0),
    "1 % disasters": (_disasters, Kind.POSITIVE, 1.0),
    "top-1 of 97 %": (_share, Kind.SHARE, 0.97),
}
SHAPES = {
    "1 x 2000": (2000,),
    "2 x 500": (500,) * 2,
    "4 x 8": (8,) * 4,
    "4 x 60": (60,) * 4,
    "4 x 500": (500,) * 4,
    "3 x 10, 400": (10, 10, 10, 400),
    "20 x 60": (60,) * 20,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Where the true mean lay, as shares of all trials."""

    above: float
    below: float
    inside: float


def covered(source: str, shape: str, trials: int, seed: int = 0) -> Coverage:
    """Draw so many samples, and count."""
    draw, kind, true = SOURCES[source]
    generator = torch.Generator().manual_seed(seed)
    above = below = inside = 0
    for trial in range(trials):
        prompts = [draw(generator, length) for length in SHAPES[shape]]
        found = estimate(prompts, trial, kind, by_prompt=True)
        interval = found.interval(1 - ALPHA)
        above += found.upper_bound(ALPHA) < true
        below += found.lower_bound(ALPHA) > true
        inside += interval is not None and interval[0] <= true <= interval[1]
    return Coverage(
        above=above / trials,
        below=below / trials,
        inside=inside / trials,
    )


def main(argv: Sequence[str]) -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(prog="python -m nvfp4check.bench coverage")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--resamples", type=int, default=400, help="agree itself takes 4,000")
    options = parser.parse_args(argv)
    statistics.RESAMPLES = options.resamples
    torch.set_num_threads(1)
    print(f"{'positions':<22}{'prompts':<14}{'above':>12}{'below':>12}{'inside 95 %':>13}")
    for source in SOURCES:
        for shape in SHAPES:
            found = covered(source, shape, options.trials)
            print(
                f"{source:<22}{shape:<14}{found.above:>12.1%}{found.below:>12.1%}"
                f"{found.inside:>13.1%}",
                flush=True,
            )
    return 0
