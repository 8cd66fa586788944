"""`diff` against the speed at which the same files are merely read.

Two checkpoints of NVFP4 weights are written, brought into the page cache, and then, in one run and
with as many processes each time: their mapped pages are summed as 64-bit words, a checkpoint is
compared with a copy of itself, and with one whose codes and scales were made anew. Bytes count on
both sides. The cases:

same      a copy
other     codes or scales a step up, under the same global scale
rescaled  quantised anew under another global scale: every block scale is another number, rounded to
          E4M3, and codes go with it; a tenth of them a step up

Another processor is asked for in numba's words, as one without AVX-512:
NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx,+avx2,+bmi,+bmi2,+fma,+popcnt,+sse4.2,+ssse3
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nvfp4check import __version__
from nvfp4check.bench.bytepass import measure
from nvfp4check.bench.memory import memory
from nvfp4check.checkpoint.diff.measured import Array
from nvfp4check.checkpoint.diff.run import DiffOptions, diff_checkpoints
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.scan_numba import VECTOR_BYTES
from nvfp4check.checkpoint.writing import TensorSpec, encode_header
from nvfp4ref import e2m1, packing

SCHEMA = "nvfp4check/bench-diff/1"
_ROWS, _COLUMNS = 7168, 2048  # down_proj of one expert of DeepSeek-V3
_A_SHARD = 64
_GLOBAL_SCALE = 2.0**-12
#: The other global scale is this times as large.
_FACTOR = 1.1
CASES = ("same", "other", "rescaled")


def write_checkpoint(directory: Path, size: int, case: str) -> None:
    """Write shards of whole NVFP4 experts, `size` bytes together: any codes, plausible scales."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (_ROWS, _COLUMNS // 2), np.uint8)
    scales = np.clip(rng.normal(0x68, 6, (_ROWS, _COLUMNS // 16)), 8, 0x7C).astype(np.uint8)
    global_scale = _GLOBAL_SCALE
    if case == "other":
        # A step up for a tenth of the codes or scales, as another quantiser might choose.
        half = _ROWS // 2
        codes[:half] |= (rng.random(codes[:half].shape) < 0.1).astype(np.uint8)
        scales[half:] += rng.random(scales[half:].shape) < 0.1
    elif case == "rescaled":
        global_scale *= _FACTOR
        codes, scales = _requantized(codes, scales, rng)
    experts = max(1, size // (codes.nbytes + scales.nbytes))
    for shard, first in enumerate(range(0, experts, _A_SHARD)):
        held = range(first, min(first + _A_SHARD, experts))
        specs: list[TensorSpec] = []
        for expert in held:
            name = f"model.layers.3.mlp.experts.{expert}.down_proj.weight"
            specs += [
                TensorSpec(name, "U8", codes.shape),
                TensorSpec(f"{name}_scale", "F8_E4M3", scales.shape),
                TensorSpec(f"{name}_scale_2", "F32", ()),
            ]
        with (directory / f"model-{shard + 1:05d}.safetensors").open("wb") as file:
            file.write(encode_header(specs))
            for expert in held:
                file.write(np.roll(codes, 16 * expert).tobytes())
                file.write(np.roll(scales, 2 * expert).tobytes())
                file.write(np.float32(global_scale).tobytes())


def _requantized(codes: Array, scales: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Quantise numbers around those of the codes under the other global scale."""
    steps = torch.from_numpy(scales.copy()).view(torch.float8_e4m3fn).float()
    made = (steps / _FACTOR).to(torch.float8_e4m3fn)
    ratios = (steps / (made.float() * _FACTOR)).numpy().repeat(16, axis=1)
    values = e2m1.decode(packing.unpack(torch.from_numpy(codes))).numpy() * ratios
    values *= np.where(rng.random(values.shape) < 0.1, 1.25, 1.0)
    packed = packing.pack(e2m1.encode(torch.from_numpy(values)))
    return packed.numpy(), made.view(torch.uint8).numpy()


def _compare(a: str, b: str, jobs: int, done: Any) -> None:
    sides = open_checkpoint(a), open_checkpoint(b)
    with tempfile.TemporaryDirectory() as folder:
        options = DiffOptions(jobs=jobs, journal=Path(folder) / "journal.jsonl")
        diff_checkpoints(*sides, replace(options, only="*.experts.0.*"))  # loads machine code
        started = time.perf_counter()
        result = diff_checkpoints(*sides, options)
        seconds = time.perf_counter() - started
    below = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss if jobs > 1 else 0
    done.put((seconds, result.summary, max(memory("VmHWM"), 1024 * below)))


def _timed(a: str, b: str, jobs: int) -> tuple[float, dict[str, int], int]:
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    worker = context.Process(target=_compare, args=(a, b, jobs, done))
    worker.start()
    found: tuple[float, dict[str, int], int] = done.get(timeout=3600)
    worker.join()
    return found


def _apart(function: Callable[..., None], *arguments: Any) -> None:
    """Call in a process of its own: this one's memory is the least that others are said to have."""
    worker = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    worker.start()
    worker.join()
    if worker.exitcode:
        raise RuntimeError(f"{function.__name__} ended with {worker.exitcode}")


def report(folder: Path, size: int, jobs: Sequence[int], repeats: int) -> dict[str, Any]:
    """Write the checkpoints and measure every case, the fastest of some repeats."""
    places = {name: str(folder / name) for name in ("a", *CASES)}
    for name, place in places.items():
        _apart(write_checkpoint, Path(place), size, name)
    held = {
        name: sum(header.file_size for header in open_checkpoint(place).shards.values())
        for name, place in places.items()
    }
    for place in places.values():
        measure(place, "read", 1)  # into the page cache
    _timed(places["a"], places["rescaled"], 1)  # compiles, and keeps the machine code
    runs = []
    for count in jobs:
        best: dict[str, float] = {}
        memory: dict[str, int] = {}
        summaries: dict[str, dict[str, int]] = {}
        for _ in range(repeats):  # in turn, so that a busy machine slows all alike
            for way in ("mapped", "read"):
                seconds = measure(places["a"], way, count)["seconds"]
                best[way] = min(best.get(way, seconds), seconds)
            for case in CASES:
                seconds, summaries[case], peak = _timed(places["a"], places[case], count)
                best[case] = min(best.get(case, seconds), seconds)
                memory[case] = max(memory.get(case, 0), peak)
        speed = {
            way: held["a"] * (2 if way in summaries else 1) / seconds / 1e9
            for way, seconds in best.items()
        }
        runs.append(
            {
                "jobs": count,
                "gb_per_second": speed,
                "equal_to_mapped": speed["same"] / speed["mapped"],
                "different_to_mapped": speed["other"] / speed["mapped"],
                "rescaled_to_mapped": speed["rescaled"] / speed["mapped"],
                "peak_rss_bytes": memory,
                "classes": summaries,
            }
        )
    return {
        "schema": SCHEMA,
        "tool": {"name": "nvfp4check", "version": __version__},
        "bytes_a_side": held["a"],
        "vector_bytes": VECTOR_BYTES,
        "runs": runs,
    }


def main(argv: Sequence[str]) -> int:
    """Write checkpoints, measure, and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m nvfp4check.bench diff")
    parser.add_argument("--gib", type=float, default=1.0, help="size of each checkpoint")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="nvfp4check-diff-"))
    try:
        found = report(folder, int(options.gib * 2**30), options.jobs, options.repeats)
    finally:
        shutil.rmtree(folder)
    json.dump(found, sys.stdout, indent=2)
    print()
    return 0
