"""Every float32 value through the reference's E2M1 and E4M3, against casts that others wrote.

Contract:
    e2m1           `nvfp4ref.e2m1.encode` against ml_dtypes.float4_e2m1fn; NaN left out, which the
                   reference refuses
    e4m3 nan       `nvfp4ref.e4m3.encode` with Overflow.NAN against ml_dtypes.float8_e4m3fn
    e4m3 saturate  with Overflow.SATURATE against the same of the value clamped to +-448
    e4m3 torch     under the policy of the torch that runs (it saturates from 2.13 on, and gave NaN
                   before) against its float8_e4m3fn
    equal means the same byte, the signs of zero and NaN included

Exit code 0: all equal; 1: some differ; 2: could not be run.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tabulate import tabulate

import nvfp4check
from nvfp4check.cli.options import require_writable, write
from nvfp4check.findings import CheckError
from nvfp4ref import e2m1, e4m3
from nvfp4ref.formats import E4M3

ALL_VALUES = 1 << 32

#: Values of one task, and of one step in it: a step's arrays stay in the cache.
_TASK_VALUES = 1 << 24
_STEP_VALUES = 1 << 18

_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Difference:
    """One float32 value that the reference and another cast encode differently."""

    bits: int
    reference: int
    other: int


@dataclass(slots=True)
class Comparison:
    """What one format, policy and oracle came to."""

    name: str
    oracle: str
    values: int = 0
    differences: int = 0
    first: Difference | None = None

    def add(self, bits: npt.NDArray[np.uint32], reference: _Bytes, other: _Bytes) -> None:
        """Count one step."""
        self.values += bits.size
        differing = np.flatnonzero(reference != other)
        self.differences += differing.size
        if differing.size and self.first is None:
            at = differing[0]
            self.first = Difference(int(bits[at]), int(reference[at]), int(other[at]))

    def merge(self, later: "Comparison") -> None:
        """Count another range, which comes later in the order of bits."""
        self.values += later.values
        self.differences += later.differences
        self.first = self.first or later.first


@dataclass(slots=True)
class Outcome:
    """All comparisons of a run."""

    comparisons: dict[str, Comparison] = field(default_factory=dict)

    def merge(self, later: "Outcome") -> None:
        """Count another range, which comes later in the order of bits."""
        for name, comparison in later.comparisons.items():
            if name in self.comparisons:
                self.comparisons[name].merge(comparison)
            else:
                self.comparisons[name] = comparison

    @property
    def differences(self) -> int:
        """Values that differ, over all comparisons."""
        return sum(comparison.differences for comparison in self.comparisons.values())


def check(start: int, stop: int, stride: int = 1) -> Outcome:
    """Compare the float32 values whose bits are `range(start, stop, stride)`.

    Raises:
        CheckError: ml_dtypes is not installed.
    """
    try:
        import ml_dtypes
    except ImportError as error:
        raise CheckError(
            "the exhaustive run compares with ml_dtypes, which is not installed: "
            "pip install 'nvfp4check[oracles]'"
        ) from error
    torch.set_num_threads(1)
    policy = torch_overflow()
    comparisons = [
        Comparison("e2m1", f"ml_dtypes {metadata.version('ml_dtypes')} float4_e2m1fn"),
        Comparison("e4m3 nan", f"ml_dtypes {metadata.version('ml_dtypes')} float8_e4m3fn"),
        Comparison("e4m3 saturate", f"ml_dtypes {metadata.version('ml_dtypes')} float8_e4m3fn"),
        Comparison(f"e4m3 torch ({policy})", f"torch {torch.__version__} float8_e4m3fn"),
    ]
    to_e2m1, to_nan, to_saturate, to_torch = comparisons
    for bits in _steps(start, stop, stride):
        values = bits.view(np.float32)
        x = torch.from_numpy(values)
        numbers = ~np.isnan(values)
        if numbers.any():
            codes = e2m1.encode(x[torch.from_numpy(numbers)]).numpy()
            to_e2m1.add(bits[numbers], codes, cast(values[numbers], ml_dtypes.float4_e2m1fn))
        by_policy = {overflow: e4m3.encode(x, overflow).numpy() for overflow in e4m3.Overflow}
        others = cast(values, ml_dtypes.float8_e4m3fn)
        to_nan.add(bits, by_policy[e4m3.Overflow.NAN], others)
        others = cast(values.clip(-E4M3.max, E4M3.max), ml_dtypes.float8_e4m3fn)
        to_saturate.add(bits, by_policy[e4m3.Overflow.SATURATE], others)
        others = x.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        to_torch.add(bits, by_policy[policy], others)
    return Outcome({comparison.name: comparison for comparison in comparisons})


def cast(values: npt.NDArray[np.float32], dtype: npt.DTypeLike) -> _Bytes:
    """Return the bytes of values that numpy casts, with no warning where one becomes NaN."""
    with np.errstate(invalid="ignore"):
        return values.astype(dtype).view(np.uint8)


def torch_overflow() -> e4m3.Overflow:
    """Return what the torch that runs makes of values beyond 448."""
    beyond = torch.tensor(2 * E4M3.max).to(torch.float8_e4m3fn)
    return e4m3.Overflow.NAN if beyond.float().isnan() else e4m3.Overflow.SATURATE


def _steps(start: int, stop: int, stride: int) -> Iterator[npt.NDArray[np.uint32]]:
    for first in range(start, stop, stride * _STEP_VALUES):
        last = min(stop, first + stride * _STEP_VALUES)
        yield np.arange(first, last, stride, dtype=np.uint64).astype(np.uint32)


def run(start: int, stop: int, stride: int, jobs: int) -> Outcome:
    """Compare a range in processes, with a progress bar on a terminal."""
    span = _TASK_VALUES * stride
    ranges = [(first, min(stop, first + span), stride) for first in range(start, stop, span)]
    outcome = Outcome()
    with _progress() as progress:
        task = progress.add_task("float32 values", total=len(ranges))
        if jobs == 1:
            for bounds in ranges:
                outcome.merge(check(*bounds))
                progress.advance(task)
        else:
            # fork would copy torch's thread pools in an unknown state
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(jobs, mp_context=context) as pool:
                for part in pool.map(check, *zip(*ranges, strict=True)):
                    outcome.merge(part)
                    progress.advance(task)
    return outcome


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def to_json(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """Return the outcome as a JSON document."""
    return {
        "schema": "nvfp4check/bench-exhaustive/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "verdict": "fail" if outcome.differences else "pass",
        "comparisons": [
            {
                "name": comparison.name,
                "oracle": comparison.oracle,
                "values": comparison.values,
                "differences": comparison.differences,
                "first": comparison.first
                and {
                    "bits": f"{comparison.first.bits:#010x}",
                    "reference": f"{comparison.first.reference:#04x}",
                    "other": f"{comparison.first.other:#04x}",
                },
            }
            for comparison in outcome.comparisons.values()
        ],
        "seconds": round(seconds, 3),
    }


def to_text(outcome: Outcome, seconds: float) -> str:
    """Return the outcome as a table."""
    rows = [
        (c.name, c.oracle, f"{c.values:,}", f"{c.differences:,}", _first(c.first))
        for c in outcome.comparisons.values()
    ]
    table = tabulate(
        rows,
        headers=["cast", "against", "values", "differ", "first"],
        disable_numparse=True,
        colalign=("left", "left", "right", "right", "left"),
    )
    return f"{table}\n{seconds:.1f} s"


def _first(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return (
        f"float32 {difference.bits:#010x}: reference {difference.reference:#04x}, "
        f"other {difference.other:#04x}"
    )


def _integer(text: str) -> int:
    """Read decimal, 0x or 0b."""
    return int(text, 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nvfp4check.bench exhaustive",
        description="Every float32 value through E2M1 and E4M3, against independent casts.",
        epilog="example: python -m nvfp4check.bench exhaustive --start 0x43000000 --stride 257",
    )

    def number(option: str, default: int, text: str) -> None:
        parser.add_argument(option, type=_integer, default=default, metavar="N", help=text)

    number("--start", 0, "first bit pattern (0)")
    number("--stop", ALL_VALUES, "one past the last (2**32)")
    number("--stride", 1, "take every Nth value (1)")
    number("--jobs", os.cpu_count() or 1, "processes (one a core)")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there, atomically")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the comparison and return the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not 0 <= options.start < options.stop <= ALL_VALUES:
        parser.error(f"need 0 <= start < stop <= 2**32, found {options.start} and {options.stop}")
    if options.stride < 1 or options.jobs < 1:
        parser.error("stride and jobs are at least 1")
    began = time.perf_counter()
    try:
        require_writable(options.output)
        outcome = run(options.start, options.stop, options.stride, options.jobs)
        seconds = time.perf_counter() - began
        if options.format == "json":
            text = json.dumps(to_json(outcome, seconds), indent=2)
        else:
            text = to_text(outcome, seconds)
        write(f"{text}\n", options.output)
    except CheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if outcome.differences else 0
