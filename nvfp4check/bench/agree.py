"""`python -m nvfp4check.bench agree`: logits compared, beside merely reading them.

Two runs of random logits, 2,048 positions of DeepSeek-V3's 129,280 tokens unless told otherwise,
are written to a temporary directory. Measured, each in a process of its own so that its memory is
its own: reading both files in the same blocks, and comparing them. The processor's time is that of
all threads; it does not suffer from what else the machine does.

With `--hidden 7168` the runs hold states of that width and a checkpoint their BF16 head; measured
are both matrix products alone, of weights in memory, and the comparison.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from nvfp4check.activations import (
    FINAL_HIDDEN_FILE,
    LOGITS_FILE,
    TOKENS_FILE,
    PromptInfo,
    Run,
    RunInfo,
    opened,
    write_info,
    write_tensors,
)
from nvfp4check.agreement.logits import compare_logits
from nvfp4check.agreement.positions import compare_positions
from nvfp4check.agreement.sources import Full, opened_logits
from nvfp4check.agreement.summary import summarize
from nvfp4check.bench.memory import memory
from nvfp4check.forward.inventory import HEAD
from nvfp4check.forward.setup import ARCHITECTURE

PROMPT = "p"
DTYPES = ("float32", "bfloat16", "float16")
#: Seconds between two looks at the memory.
_LOOK = 0.01


def main(argv: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m nvfp4check.bench agree")
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=129_280)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--directory", type=Path, help="where the runs are written and left")
    parser.add_argument("--hidden", type=int, help="states of this width and a head, no logits")
    parser.add_argument("--part", choices=("read", "multiply", "compare"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        print(json.dumps(_part(options.part, options.directory, getattr(torch, options.dtype))))
        return 0
    if options.hidden:
        return _states(options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.directory or Path(temporary)
        _write(folder, options.positions, options.vocabulary, getattr(torch, options.dtype))
        size = sum((folder / name / LOGITS_FILE).stat().st_size for name in ("a", "b"))
        found = {
            part: _measured(part, folder, options.dtype) for part in ("read", "read", "compare")
        }
    read, compare = found["read"], found["compare"]
    shape = f"{options.positions:,} positions x {options.vocabulary:,} tokens"
    print(f"{shape}, {options.dtype}, twice: {size / 1e9:.2f} GB")
    print(f"threads          {torch.get_num_threads()}")
    for name, part in found.items():
        print(
            f"{name:<8} {part['seconds']:8.2f} s, {part['cpu']:.2f} s of the processor, "
            f"{size / part['seconds'] / 1e9:.2f} GB/s, memory of its own {part['own'] / 1e9:.2f} GB"
        )
    pairs = options.positions * options.vocabulary
    print(f"a pair of logits takes {compare['cpu'] / pairs * 1e9:.1f} ns of the processor")
    print(
        f"compare takes {compare['seconds'] / read['seconds']:.1f} times the time of reading, "
        f"{compare['cpu'] / read['cpu']:.1f} times in time of the processor"
    )
    print(f"mean KL {compare['kl']:.6g}")
    return 0


def _states(options: argparse.Namespace) -> int:
    """Measure states and a head, and print."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.directory or Path(temporary)
        shape = options.positions, options.hidden, options.vocabulary
        _write_states(folder, *shape)
        found = {part: _measured(part, folder, "float32") for part in ("multiply", "compare")}
    multiply, compare = found["multiply"], found["compare"]
    print("{:,} states of {:,}, a head of {:,}, twice".format(*shape))
    print(f"threads          {torch.get_num_threads()}")
    for name, part in found.items():
        print(
            f"{name:<8} {part['seconds']:8.2f} s, {part['cpu']:.2f} s of the processor, memory of "
            f"its own {part['own'] / 1e9:.2f} GB"
        )
    print(
        f"compare takes {compare['seconds'] / multiply['seconds']:.2f} times the time of both "
        f"products, {compare['cpu'] / multiply['cpu']:.2f} times in time of the processor"
    )
    return 0


def _write_states(folder: Path, positions: int, hidden: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    head, scale = folder / "checkpoint", hidden**-0.5
    weight = torch.empty(vocabulary, hidden, dtype=torch.bfloat16)
    for row in weight:
        row.copy_(torch.randn(hidden, generator=generator) * scale)
    write_tensors(head / "model.safetensors", {HEAD: weight})
    config = {"architectures": [ARCHITECTURE], "vocab_size": vocabulary, "hidden_size": hidden}
    (head / "config.json").write_text(json.dumps(config))
    states = torch.randn(positions, hidden, generator=generator)
    for name, noise in (("a", 0.0), ("b", 0.02)):
        other = states + noise * torch.randn(states.shape, generator=generator)
        write_tensors(folder / name / FINAL_HIDDEN_FILE, {PROMPT: other})
        _describe(folder / name, positions, vocabulary, {"location": str(head)})


def _describe(run: Path, positions: int, vocabulary: int, checkpoint: dict[str, str]) -> None:
    write_tensors(run / TOKENS_FILE, {PROMPT: torch.arange(positions) % vocabulary})
    prompts = (PromptInfo(id=PROMPT, tokens=positions),)
    write_info(run, RunInfo(prompts=prompts, complete=True, checkpoint=checkpoint))


def _write(folder: Path, positions: int, vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.empty(positions, vocabulary)
    for row in base:  # a row at a time: normal_ of all at once would double the memory
        row.normal_(0, 3, generator=generator)
    for name in ("a", "b"):
        if name == "b":
            for row in base:
                row.add_(torch.randn(vocabulary, generator=generator), alpha=0.05)
        write_tensors(folder / name / LOGITS_FILE, {PROMPT: base.to(dtype)})
        _describe(folder / name, positions, vocabulary, {})


def _measured(part: str, folder: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-m", "nvfp4check.bench", "agree"]
    line = [*command, "--part", part, "--directory", str(folder), "--dtype", dtype]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _part(part: str, folder: Path, dtype: torch.dtype) -> dict[str, float]:
    runs = Run.open(folder / "a"), Run.open(folder / "b")
    some = torch.zeros(1, 1, dtype=dtype)
    compare_logits(some, some)  # compiled, or read from the cache of what was
    found = {"kl": 0.0}
    head = _widened(folder) if part == "multiply" else torch.empty(0)
    before, own, done = memory("RssAnon"), [0], threading.Event()

    def look() -> None:
        while not done.wait(_LOOK):
            own[0] = max(own[0], memory("RssAnon") - before)

    looking = threading.Thread(target=look)
    looking.start()
    start, cpu = time.perf_counter(), time.process_time()
    if part == "read":
        found["kl"] = sum(_read(run) for run in runs)
    elif part == "multiply":
        found["kl"] = sum(_multiply(run, head) for run in runs)
    else:
        positions = compare_positions(*runs, (PROMPT,))
        if positions is None:
            raise TypeError("the runs hold full logits")
        found["kl"] = summarize(positions.metrics).kl.mean
    found["seconds"], found["cpu"] = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    looking.join()
    found["own"] = float(own[0])
    return found


def _widened(folder: Path) -> torch.Tensor:
    """Return the head as float32."""
    with opened(folder / "checkpoint" / "model.safetensors") as file:
        weight: torch.Tensor = file.get_tensor(HEAD)
    return weight.float()


def _multiply(run: Run, head: torch.Tensor) -> float:
    """Multiply every state with the head, and return something made of it."""
    states, total = run.final_hidden(PROMPT), 0.0
    for first in range(0, len(states), 1024):
        total += (states[first : first + 1024] @ head.T)[0, 0].item()
    return total


def _read(run: Run) -> float:
    """Read every byte, and return something made of it."""
    total = 0.0
    with opened_logits(run) as logits:
        source = logits.of(PROMPT)
        if not isinstance(source, Full):
            raise TypeError("the runs hold full logits")
        for first in range(0, source.positions, source.block):
            rows = source.rows(first, min(first + source.block, source.positions))
            total += float(rows.sum())
    return total
