"""Fuzzing of everything that reads a checkpoint: any input gives a verdict or a message.

Each case is written to a directory and opened; headers, index, configurations and card are read and
the expected tensors listed. One in four, and every one whose bytes, names or files were damaged,
also goes through all rules of `validate` and two renderers. The targets of `fuzz_lines` go through
whole command lines. A case may end with a result or a `CheckError`. Anything else is a crash:
another exception, more than some seconds, more than some memory, text that a terminal would act
upon, JSON that is not JSON.
"""

import argparse
import contextlib
import json
import multiprocessing
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nvfp4check import __version__
from nvfp4check.bench.fuzz_cases import BYTE_TARGETS, CARD, TARGETS, Files
from nvfp4check.bench.fuzz_lines import FORMATS, LINE_TARGETS, UncaughtError, run_line, sound_home
from nvfp4check.checkpoint.card.parse import parse_card
from nvfp4check.checkpoint.card.review import review
from nvfp4check.checkpoint.expected import expected_tensors
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.checkpoint.validation import ValidationOptions, validate
from nvfp4check.findings import CheckError
from nvfp4check.report.formats import Format
from nvfp4check.report.render import Extras, render

SCHEMA = "nvfp4check/bench-fuzz/1"
_BATCH = 200
#: Of the cases that damage no bytes, one in so many goes through the rules.
_WHOLE_ONE_IN = 4
_DEFAULT_SECONDS, _DEFAULT_MEBIBYTES = 5.0, 512
#: Crashes of one place that are kept whole; the rest are counted.
_KEPT = 3


class HangError(Exception):
    """A case took longer than it may."""


class OutputError(Exception):
    """A result was written that a reader must not get."""


@dataclass(frozen=True, slots=True)
class Crash:
    """A case that ended as none may, with the files that do it."""

    target: str
    error: str
    where: str
    files: dict[str, str]


def write_files(directory: Path, files: Files) -> None:
    """Write a case; names that the file system refuses are left out."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with contextlib.suppress(OSError, ValueError):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)


def read(directory: Path) -> str:
    """Open a checkpoint and read all that is no tensor; return "read", or "refused"."""
    try:
        checkpoint = open_checkpoint(directory)
        config = checkpoint.config
        if config is not None:
            expected_tensors(config, checkpoint.quantization)
        for weight in checkpoint.weights.values():
            checkpoint.quantization.algo_of(weight.module)
        card = directory / CARD
        if card.is_file():
            text = card.read_text(encoding="utf-8", errors="replace")
            review(parse_card(text, CARD), checkpoint)
    except CheckError as error:
        _check_text(str(error), "message")
        return "refused"
    return "read"


def exercise(directory: Path, level: RuleLevel, formats: Sequence[Format]) -> str:
    """Put a checkpoint through the rules and renderers; return its verdict, or "refused".

    Raises:
        OutputError: A result is written that a reader must not get.
    """
    try:
        checkpoint = open_checkpoint(directory)
        result = validate(checkpoint, ValidationOptions(level=level, tp=2))
    except CheckError as error:
        _check_text(str(error), "message")
        return "refused"
    document = result.to_json()
    for format in formats:
        _check_result(render(document, format, Extras()), format)
    return result.verdict.value


def meet(target: str, directory: Path, turn: int, format: Format) -> str:
    """Put damaged files through a command line of their target; return how it ended.

    Raises:
        OutputError: A result is written that a reader must not get.
        UncaughtError: The command ended by an exception that is no message.
    """
    lines = LINE_TARGETS[target].lines
    verdict, text = run_line(lines[turn % len(lines)], directory, format)
    if verdict != "refused" or text:
        _check_result(text, format)
    return verdict


def _check_result(text: str, format: Format) -> None:
    if format is Format.JSON:
        json.loads(text, parse_constant=_no_constant)
    _check_text(text, format.value)


def _no_constant(text: str) -> None:
    raise OutputError(f"json: {text} is not JSON")


def _check_text(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OutputError(f"{what}: not UTF-8: {error}") from error
    for character in ("\x1b", "\u202e", "\x00"):
        if character in text and what != "message":  # the command line cleans messages
            raise OutputError(f"{what}: holds {character!r}")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise HangError when the block takes longer."""

    def hang(signum: int, frame: FrameType | None) -> None:
        raise HangError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limit_memory(mebibytes: int) -> None:
    """Let the process's address space grow by so much and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def run_batch(
    target: str, cases: int, seed: int, directory: Path, seconds: float = _DEFAULT_SECONDS
) -> tuple[dict[str, int], list[Crash]]:
    """Run cases of one target; count verdicts, and keep what crashed."""
    counts: dict[str, int] = {}
    crashes: list[Crash] = []
    level = RuleLevel.BYTES if target in BYTE_TARGETS else RuleLevel.HEADERS
    lines = LINE_TARGETS.get(target)
    strategy = TARGETS[target]() if lines is None else lines.strategy()
    formats = tuple(Format) if lines is None else FORMATS

    @hypothesis.seed(seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy, st.sampled_from(formats), st.integers(0, _WHOLE_ONE_IN - 1))
    def each(files: Files, format: Format, turn: int) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        write_files(directory, files)
        try:
            with time_limit(seconds):
                if lines is not None:
                    verdict = meet(target, directory, turn, format)
                elif turn and level is RuleLevel.HEADERS:
                    verdict = read(directory)
                else:
                    verdict = exercise(directory, level, (Format.JSON, format))
        except Exception as error:
            verdict = "crashed"
            crashes.append(_crash(target, error, files))
        counts[verdict] = counts.get(verdict, 0) + 1

    each()
    shutil.rmtree(directory, ignore_errors=True)
    return counts, crashes


def _crash(target: str, error: Exception, files: Files) -> Crash:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "nvfp4check" in frame.filename] or list(frames)
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    if isinstance(error, UncaughtError):
        where = error.where
    texts = {name: data.decode("latin-1") for name, data in files.items()}
    return Crash(target, f"{type(error).__name__}: {error}"[:500], where, texts)


def _work(jobs: Any, results: Any, mebibytes: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory(prefix="nvfp4check-fuzz-") as name:
        tempfile.tempdir = name  # a worker ends without the cleaning that the interpreter does
        run_batch("data", 2, 0, Path(name) / "case", 60)  # compile and import before the limit
        sound_home()
        limit_memory(mebibytes)
        for target, cases, seed in iter(jobs.get, None):
            results.put((target, *run_batch(target, cases, seed, Path(name) / "case", seconds)))
    results.put((None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, []))


def fuzz(
    cases: int,
    seed: int,
    jobs: int,
    targets: Sequence[str],
    mebibytes: int = _DEFAULT_MEBIBYTES,
    seconds: float = _DEFAULT_SECONDS,
) -> dict[str, Any]:
    """Run cases over several processes, spread evenly over the targets."""
    context = multiprocessing.get_context("spawn")
    work, results = context.Queue(), context.Queue()
    started = time.perf_counter()
    for number in range(-(-cases // _BATCH)):
        size = min(_BATCH, cases - number * _BATCH)
        work.put((targets[number % len(targets)], size, seed * 1_000_003 + number))
    workers = [
        context.Process(target=_work, args=(work, results, mebibytes, seconds), daemon=True)
        for _ in range(jobs)
    ]
    for worker in workers:
        work.put(None)
        worker.start()
    verdicts: dict[str, dict[str, int]] = {target: {} for target in targets}
    crashes: list[Crash] = []
    peak, running, done = 0, jobs, 0
    while running:
        target, found, crashed = _next(results, workers)
        if target is None:
            peak, running = max(peak, found), running - 1
            continue
        for verdict, count in found.items():
            verdicts[target][verdict] = verdicts[target].get(verdict, 0) + count
        crashes += crashed
        done += sum(found.values())
        print(f"\r{done:,} of {cases:,} cases, {len(crashes):,} crashes", end="", file=sys.stderr)
    print(file=sys.stderr)
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - started
    return {
        "schema": SCHEMA,
        "tool": {"name": "nvfp4check", "version": __version__},
        "cases": done,
        "seed": seed,
        "jobs": jobs,
        "seconds": round(elapsed, 1),
        "cases_per_second": round(done / elapsed, 1),
        "limits": {"seconds": seconds, "mebibytes": mebibytes},
        "peak_rss_bytes": peak,
        "verdicts": verdicts,
        "crashes": len(crashes),
        "crashed_at": _places(crashes),
    }


def _next(results: Any, workers: Sequence[Any]) -> tuple[Any, Any, list[Crash]]:
    """Wait for a result as long as someone can still give one.

    Raises:
        RuntimeError: A worker died: the case it was at killed the interpreter.
    """
    import queue

    while True:
        try:
            found: tuple[Any, Any, list[Crash]] = results.get(timeout=5)
        except queue.Empty:
            dead = [worker.exitcode for worker in workers if worker.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(f"a fuzzing process died with exit code {dead[0]}") from None
            continue
        return found


def _places(crashes: Sequence[Crash]) -> list[dict[str, Any]]:
    """Gather crashes by place, with a few whole cases of each."""
    places: dict[tuple[str, str], list[Crash]] = {}
    for crash in crashes:
        places.setdefault((crash.where, crash.error.partition(":")[0]), []).append(crash)
    return [
        {
            "where": where,
            "count": len(found),
            "examples": [asdict(crash) for crash in found[:_KEPT]],
        }
        for (where, _), found in sorted(places.items())
    ]


def main(argv: Sequence[str]) -> int:
    """Fuzz, and print JSON; exit code 1 when something crashed."""
    parser = argparse.ArgumentParser(prog="python -m nvfp4check.bench fuzz")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    every = [*TARGETS, *LINE_TARGETS]
    parser.add_argument("--target", choices=every, nargs="+", default=every)
    parser.add_argument("--seconds", type=float, default=_DEFAULT_SECONDS, help="for one case")
    parser.add_argument("--mebibytes", type=int, default=_DEFAULT_MEBIBYTES, help="growth allowed")
    options = parser.parse_args(argv)
    found = fuzz(
        options.cases, options.seed, options.jobs, options.target, options.mebibytes,
        options.seconds,
    )  # fmt: skip
    json.dump(found, sys.stdout, indent=2)
    print()
    return 1 if found["crashes"] else 0
