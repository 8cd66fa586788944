"""The audit against an FP8 base, beside others' dequantisation of the same weights alone.

A checkpoint of NVFP4 experts and its base in FP8 128 x 128 are written, every byte real, and
brought into the page cache. Then, in one run and in turn, so that a busy machine slows all alike:
the audit reads, dequantises and judges both in a process of its own, and ModelOpt, torchao and
compressed-tensors, as far as they can be imported, dequantise one such weight. Speed is in GB of
BF16 a second; of some rounds the median counts.

Exit code 0: measured; 2: could not be run.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import nvfp4check
from nvfp4check.bench.dequantize import implementations
from nvfp4check.bench.memory import memory
from nvfp4check.checkpoint.audit.whole import run_audit
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.writing import TensorSpec, encode_header
from nvfp4check.cli.options import require_writable, write
from nvfp4check.engine.local import LocalEngine
from nvfp4check.findings import CheckError
from nvfp4ref import fp8_block, nvfp4
from nvfp4ref.conventions import Convention

SCHEMA = "nvfp4check/bench-audit/1"
_ROWS, _COLUMNS = 2048, 7168  # gate_proj of one expert of DeepSeek-V3
_HEIGHT = 128
_EXPERTS_A_SHARD = 64
_OURS = "audit"


def write_pair(folder: Path, experts: int) -> None:
    """Write experts in NVFP4 (`folder/nvfp4`) and in FP8 (`folder/fp8`): one, its rows rolled."""
    weight = torch.randn(_ROWS, _COLUMNS, generator=torch.manual_seed(0)) * 0.02
    elements, scale_inv = fp8_block.quantize(weight)
    x = fp8_block.dequantize(elements, scale_inv, torch.bfloat16)
    decode = nvfp4.global_decode_scale(x.abs().amax(), Convention.MODELOPT)
    codes, scales = nvfp4.quantize(x, decode, Convention.MODELOPT)
    quantized = (("", "U8", codes), ("_scale", "F8_E4M3", scales), ("_scale_2", "F32", decode))
    source = (("", "F8_E4M3", elements), ("_scale_inv", "F32", scale_inv))
    for name, parts in (("nvfp4", quantized), ("fp8", source)):
        (folder / name).mkdir()
        for shard, first in enumerate(range(0, experts, _EXPERTS_A_SHARD)):
            numbers = range(first, min(first + _EXPERTS_A_SHARD, experts))
            path = folder / name / f"model-{shard + 1:05d}.safetensors"
            _write_shard(path, numbers, parts)


def _write_shard(
    path: Path, experts: range, parts: tuple[tuple[str, str, torch.Tensor], ...]
) -> None:
    specs = [
        TensorSpec(
            f"model.layers.3.mlp.experts.{expert}.gate_proj.weight{suffix}",
            dtype,
            tuple(tensor.shape),
        )
        for expert in experts
        for suffix, dtype, tensor in parts
    ]
    with path.open("wb") as file:
        file.write(encode_header(specs))
        for expert in experts:
            for _, _, tensor in parts:
                file.write(_rolled(tensor, expert).reshape(-1).view(torch.uint8).numpy().tobytes())


def _rolled(tensor: torch.Tensor, expert: int) -> torch.Tensor:
    """Roll a tensor's rows by whole FP8 blocks, so that the parts of a weight stay together."""
    if not tensor.dim():
        return tensor.reshape(1)
    raw = tensor.contiguous().view(torch.uint8)
    per_block = tensor.shape[0] * _HEIGHT // _ROWS
    return raw.roll(expert * per_block, 0)


def _worker(folder: str, jobs: int, ways: Any) -> None:
    """Audit once to compile, then once for the clock."""
    checkpoint, base = (open_checkpoint(Path(folder) / name) for name in ("nvfp4", "fp8"))
    torch.set_num_threads(1)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        outcome, gaps = run_audit(checkpoint, base, LocalEngine(jobs))
        seconds = time.perf_counter() - began
    wrong = sum(weight.wrong for weight in outcome.weights.values())
    ways.put((seconds, memory("VmHWM"), len(outcome.weights), wrong + len(gaps)))


def _audit(folder: Path, jobs: int) -> tuple[float, int]:
    """Return the seconds and the peak of memory of an audit in a new process."""
    context = multiprocessing.get_context("spawn")
    ways = context.Queue()
    worker = context.Process(target=_worker, args=(str(folder), jobs, ways))
    worker.start()
    seconds, peak, weights, wrong = ways.get(timeout=3600)
    worker.join()
    if not weights or wrong:
        raise CheckError(f"the audit of sound weights found {wrong} wrong in {weights} weights")
    return seconds, peak


def measure(experts: int, jobs: int, rounds: int) -> dict[str, Any]:
    """Return the document of the measurement."""
    torch.set_num_threads(1)
    runs = {
        name: run
        for name, run in implementations(_ROWS, _COLUMNS, 1)
        if not name.startswith("nvfp4check")
    }
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in (_OURS, *runs)}
    peak = 0
    with tempfile.TemporaryDirectory(prefix="nvfp4check-audit-") as folder:
        write_pair(Path(folder), experts)
        for _ in range(rounds):
            taken, used = _audit(Path(folder), jobs)
            seconds[_OURS].append(taken / experts)
            peak = max(peak, used)
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
    size = _ROWS * _COLUMNS * torch.bfloat16.itemsize
    speeds = {name: size / statistics.median(times) / 1e9 for name, times in seconds.items()}
    others = {name: speed for name, speed in speeds.items() if name not in (_OURS, "copy")}
    return {
        "schema": SCHEMA,
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "shape": [_ROWS, _COLUMNS],
        "experts": experts,
        "jobs": jobs,
        "rounds": rounds,
        "gigabytes_per_second": {name: round(speed, 3) for name, speed in speeds.items()},
        "times_the_fastest_other": (
            round(speeds[_OURS] / max(others.values()), 2) if others else None
        ),
        "peak_rss_bytes": peak,
    }


def _to_text(document: dict[str, Any]) -> str:
    table = tabulate(
        document["gigabytes_per_second"].items(), headers=["", "GB/s of BF16"], floatfmt=".2f"
    )
    ratio = document["times_the_fastest_other"]
    verdict = f"{ratio} times the fastest other" if ratio else "no other implementation installed"
    return (
        f"{table}\n{document['experts']} weights of {document['shape']}, {document['jobs']} "
        f"process(es): {verdict}; {document['peak_rss_bytes'] / 1e6:.0f} MB at most"
    )


def main(argv: Sequence[str]) -> int:
    """Measure, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nvfp4check.bench audit",
        description=__doc__.splitlines()[0],
        epilog="example: python -m nvfp4check.bench audit --experts 64",
    )
    parser.add_argument("--experts", type=int, default=64, metavar="N")
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there, atomically")
    options = parser.parse_args(argv)
    if min(options.experts, options.jobs, options.rounds) < 1:
        parser.error("experts, jobs and rounds are at least 1")
    try:
        require_writable(options.output)
        document = measure(options.experts, options.jobs, options.rounds)
        text = json.dumps(document, indent=2) if options.format == "json" else _to_text(document)
        write(f"{text}\n", options.output)
    except CheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
