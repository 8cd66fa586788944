"""The byte pass against the speed at which the same files are merely read.

A checkpoint of NVFP4 weights is written (or given), brought into the page cache, and then, in one
run and with as many processes each time: its mapped pages are summed as 64-bit words, its files
are read() into a buffer of 1 MiB, and its weights are scanned.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nvfp4check import __version__
from nvfp4check.bench.memory import memory
from nvfp4check.checkpoint.opening import Checkpoint, open_checkpoint
from nvfp4check.checkpoint.scan import default_counter, scan, why_not_scannable, with_new_maps
from nvfp4check.checkpoint.scan_tally import count_with_numpy
from nvfp4check.checkpoint.writing import TensorSpec, encode_header
from nvfp4check.engine.local import one_thread

SCHEMA = "nvfp4check/bench-bytepass/1"
_ROWS, _COLUMNS = 7168, 2048  # down_proj of one expert of DeepSeek-V3
_MAPPED_PIECE = 1 << 22
_BUFFER = 1 << 20
_MAPPED_BYTES = 64 << 20


def write_checkpoint(directory: Path, size: int) -> None:
    """Write shards of Gaussian-like NVFP4 experts, `size` bytes together, every byte real."""
    rng = np.random.default_rng(0)
    codes, scales = _weight(rng)
    one = codes.nbytes + scales.nbytes
    experts = max(1, size // one)
    for shard, first in enumerate(range(0, experts, 64)):
        specs: list[TensorSpec] = []
        for expert in range(first, min(first + 64, experts)):
            name = f"model.layers.3.mlp.experts.{expert}.down_proj.weight"
            specs += [
                TensorSpec(name, "U8", (_ROWS, _COLUMNS // 2)),
                TensorSpec(f"{name}_scale", "F8_E4M3", (_ROWS, _COLUMNS // 16)),
            ]
        path = directory / f"model-{shard + 1:05d}.safetensors"
        with path.open("wb") as file:
            file.write(encode_header(specs))
            for expert in range(len(specs) // 2):
                shift = 16 * (first + expert)
                file.write(np.roll(codes, shift).tobytes())
                file.write(np.roll(scales, shift // 8).tobytes())


def _weight(rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Codes of a Gaussian under block scaling, with a six in each block, and scales."""
    share = (0.067, 0.131, 0.125, 0.117, 0.160, 0.169, 0.150, 0.081)
    magnitudes = rng.choice(8, size=_ROWS * _COLUMNS, p=share).astype(np.uint8)
    magnitudes[::16] = 7
    nibbles = magnitudes | (rng.integers(0, 2, magnitudes.size, dtype=np.uint8) << 3)
    scales = np.clip(rng.normal(0x68, 6, magnitudes.size // 16), 1, 0x7E).astype(np.uint8)
    return nibbles[0::2] | (nibbles[1::2] << 4), scales


def _touch(checkpoint: Checkpoint, shard: str) -> None:
    """Sum every mapped byte of a shard as 64-bit words."""
    view = checkpoint.storage.view(shard)
    if view is None:
        raise ValueError(f"{shard}: is not mapped")
    whole = np.frombuffer(view, np.uint8)
    words = whole[: whole.size - whole.size % 8].view("<u8")
    for start in range(0, words.size, _MAPPED_PIECE // 8):
        np.add.reduce(words[start : start + _MAPPED_PIECE // 8])


def _read(checkpoint: Checkpoint, shard: str) -> None:
    """Read a shard into one small buffer."""
    buffer = bytearray(_BUFFER)
    with (Path(checkpoint.location) / shard).open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _scan(checkpoint: Checkpoint, shard: str) -> None:
    """Scan the weights of a shard, letting go of its maps now and then as validate does."""
    mapped, read = with_new_maps(checkpoint), 0
    for weight in checkpoint.weights.values():
        if why_not_scannable(weight) is None and weight.entries[0].shard == shard:
            if read > _MAPPED_BYTES:
                mapped, read = with_new_maps(checkpoint), 0
            read += scan(mapped, weight).nbytes


_WAYS: dict[str, Callable[[Checkpoint, str], None]] = {
    "mapped": _touch,
    "read": _read,
    "scan": _scan,
}


def _worker(location: str, way: str, shards: list[str], gate: Any, done: Any) -> None:
    checkpoint = open_checkpoint(location)
    _ = checkpoint.weights
    if way == "scan":
        counter = default_counter()
        from nvfp4check.checkpoint.scan_tally import Tally

        counter(np.zeros(512, np.uint8), np.zeros(64, np.uint8), Tally())  # compile beforehand
    one_thread()
    gate.wait()
    started, cpu_started = time.perf_counter(), time.process_time()
    for shard in shards:
        _WAYS[way](checkpoint, shard)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    done.put((seconds, cpu_seconds, memory("VmHWM"), memory("RssAnon")))


def measure(location: str, way: str, processes: int) -> dict[str, float]:
    """Run one way over all shards; the largest time and memory of a process."""
    shards = sorted(open_checkpoint(location).shards)
    context = multiprocessing.get_context("spawn")
    gate, done = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_worker, args=(location, way, shards[i::processes], gate, done))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    results = [done.get(timeout=3600) for _ in workers]
    for worker in workers:
        worker.join()
    names = ("seconds", "cpu_seconds", "peak_rss_bytes", "anonymous_bytes")
    return {
        name: max(column) for name, column in zip(names, zip(*results, strict=True), strict=True)
    }


def report(location: str, processes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Measure every way with each number of processes, the fastest of some repeats."""
    size = sum(header.file_size for header in open_checkpoint(location).shards.values())
    measure(location, "read", 1)  # into the page cache
    runs = []
    for count in processes:
        best: dict[str, dict[str, float]] = {}
        cpu = dict.fromkeys(_WAYS, float("inf"))
        for _ in range(repeats):
            for way in _WAYS:  # in turn, so that a busy machine slows all alike
                found = measure(location, way, count)
                if way not in best or found["seconds"] < best[way]["seconds"]:
                    best[way] = found
                cpu[way] = min(cpu[way], found["cpu_seconds"])
        speed = {way: size / found["seconds"] / 1e9 for way, found in best.items()}
        runs.append(
            {
                "processes": count,
                "gb_per_second": speed,
                "scan_to_mapped": speed["scan"] / speed["mapped"],
                "scan_to_read": speed["scan"] / speed["read"],
                # In seconds of processor time, which other work on the machine delays less.
                "scan_to_mapped_cpu": cpu["mapped"] / cpu["scan"],
                "scan_peak_rss_bytes": best["scan"]["peak_rss_bytes"],
                "scan_anonymous_bytes": best["scan"]["anonymous_bytes"],
            }
        )
    counter = "numpy" if default_counter() is count_with_numpy else "numba"
    return {
        "schema": SCHEMA,
        "tool": {"name": "nvfp4check", "version": __version__},
        "bytes": size,
        "counter": counter,
        "runs": runs,
    }


def main(argv: Sequence[str]) -> int:
    """Write or take a checkpoint, measure, and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m nvfp4check.bench bytepass")
    parser.add_argument("--checkpoint", help="measure this one instead of writing one")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the one to write")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    made = None
    if options.checkpoint is None:
        made = Path(tempfile.mkdtemp(prefix="nvfp4check-bytepass-"))
    try:
        if made is not None:
            write_checkpoint(made, int(options.gib * 2**30))
        found = report(options.checkpoint or str(made), options.processes, options.repeats)
    finally:
        if made is not None:
            shutil.rmtree(made)
    json.dump(found, sys.stdout, indent=2)
    print()
    return 0
