"""How fast NVFP4 and FP8 128 x 128 become BF16 here, beside ModelOpt, torchao, compressed-tensors.

Every implementation that is installed dequantises the same weight in the same run, interleaved, and
the median of its rounds counts. Speed is in GB of BF16 a second; `copy` is a plain copy of them.

Exit code 0: measured; 2: could not be run.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import nvfp4check
from nvfp4check.cli.options import require_writable, write
from nvfp4check.dequantize import dequantize_fp8_block, dequantize_nvfp4
from nvfp4check.findings import CheckError
from nvfp4ref import fp8_block, nvfp4
from nvfp4ref.conventions import Convention

_Run = Callable[[], torch.Tensor]

_OURS = "nvfp4check nvfp4"


def implementations(rows: int, columns: int, threads: int) -> Iterator[tuple[str, _Run]]:
    """Yield the name of each implementation and a function that dequantises one weight."""
    generator = torch.manual_seed(0)
    weight = (torch.randn(rows, columns, generator=generator) * 0.02).to(torch.bfloat16)
    decode = nvfp4.global_decode_scale(weight.abs().amax(), Convention.MODELOPT)
    codes, scales = nvfp4.quantize(weight, decode, Convention.MODELOPT)
    elements, scale_inv = fp8_block.quantize(weight)
    room, bf16 = torch.empty_like(weight), torch.bfloat16
    yield "copy", lambda: room.copy_(weight)
    yield (
        _OURS,
        lambda: dequantize_nvfp4(codes, scales, decode, bf16, out=room, threads=threads),
    )
    yield (
        "nvfp4check fp8",
        lambda: dequantize_fp8_block(elements, scale_inv, bf16, out=room, threads=threads),
    )
    if importlib.util.find_spec("modelopt"):
        yield "modelopt", _modelopt(weight, codes, scales, decode)
    if importlib.util.find_spec("torchao"):
        yield "torchao", _torchao(weight, decode)
    if importlib.util.find_spec("compressed_tensors"):
        yield "compressed-tensors", _compressed_tensors(codes, scales, decode)


def _modelopt(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, decode: torch.Tensor
) -> _Run:
    qtensor = importlib.import_module("modelopt.torch.quantization.qtensor")
    packed = qtensor.NVFP4QTensor(weight.shape, weight.dtype, codes)

    def run() -> torch.Tensor:
        values: torch.Tensor = packed.dequantize(
            dtype=weight.dtype, scale=scales, double_scale=decode, block_sizes={-1: 16}
        )
        return values

    return run


def _torchao(weight: torch.Tensor, decode: torch.Tensor) -> _Run:
    tensors = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")
    packed = tensors.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=decode)

    def run() -> torch.Tensor:
        values: torch.Tensor = packed.dequantize(weight.dtype)
        return values

    return run


def _compressed_tensors(codes: torch.Tensor, scales: torch.Tensor, decode: torch.Tensor) -> _Run:
    compressor = importlib.import_module("compressed_tensors.compressors.nvfp4")
    schemes = importlib.import_module("compressed_tensors.quantization.quant_scheme")
    scheme = schemes.QuantizationScheme(targets=["Linear"], **schemes.NVFP4)
    state = {
        "weight_packed": codes,
        "weight_scale": scales,
        "weight_global_scale": decode.reciprocal().reshape(1),
    }

    def run() -> torch.Tensor:
        weight: torch.Tensor = compressor.NVFP4PackedCompressor.decompress(state, scheme)["weight"]
        return weight.to(torch.bfloat16)

    return run


def measure(rows: int, columns: int, threads: int, rounds: int) -> dict[str, Any]:
    """Return the document of the measurement."""
    torch.set_num_threads(threads)
    runs = dict(implementations(rows, columns, threads))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # compile, and touch the memory
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    size = rows * columns * torch.bfloat16.itemsize
    speeds = {name: size / statistics.median(times) / 1e9 for name, times in seconds.items()}
    others = {
        name: speed
        for name, speed in speeds.items()
        if name != "copy" and not name.startswith("nvfp4check")
    }
    return {
        "schema": "nvfp4check/bench-dequantize/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "shape": [rows, columns],
        "threads": threads,
        "rounds": rounds,
        "gigabytes_per_second": {name: round(speed, 3) for name, speed in speeds.items()},
        "times_the_fastest_other": (
            round(speeds[_OURS] / max(others.values()), 2) if others else None
        ),
    }


def _to_text(document: dict[str, Any]) -> str:
    table = tabulate(
        document["gigabytes_per_second"].items(), headers=["to BF16", "GB/s"], floatfmt=".2f"
    )
    ratio = document["times_the_fastest_other"]
    verdict = f"{ratio} times the fastest other" if ratio else "no other implementation installed"
    return f"{table}\n{document['shape']}, {document['threads']} thread(s): {verdict}"


def main(argv: Sequence[str]) -> int:
    """Measure, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nvfp4check.bench dequantize",
        description=__doc__.splitlines()[0],
        epilog="example: python -m nvfp4check.bench dequantize --threads 2",
    )
    parser.add_argument("--rows", type=int, default=2048, metavar="N")
    parser.add_argument("--columns", type=int, default=7168, metavar="K")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there, atomically")
    options = parser.parse_args(argv)
    if min(options.rows, options.columns, options.threads, options.rounds) < 1:
        parser.error("rows, columns, threads and rounds are at least 1")
    if options.columns % 16:
        parser.error(f"columns are a multiple of 16, found {options.columns}")
    try:
        require_writable(options.output)
        document = measure(options.rows, options.columns, options.threads, options.rounds)
        as_json = options.format == "json"
        text = json.dumps(document, indent=2) if as_json else _to_text(document)
        write(f"{text}\n", options.output)
    except CheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
