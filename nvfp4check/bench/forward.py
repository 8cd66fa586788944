"""One full-size layer of DeepSeek-V3 with experts, streamed: memory, bytes a second, shares.

    python -m nvfp4check.bench forward [--tokens 64] [--experts 256] [--mode stored]
                                       [--bounds bfloat16]

A synthetic checkpoint of one layer (7168 x 2048 x 256 experts in NVFP4, attention as published:
about 6 GB) is written to a temporary folder, filled with random codes. `nvfp4check forward` runs
over it in a process of its own, once to warm the page cache and once measured: peak RSS, seconds,
bytes a second and the share of each kind of work. Then reading, dequantising and multiplying the
same weights are each measured alone, and the whole model's time is reckoned from the bytes. With
--bounds the run is repeated with bounds derived beside it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

import nvfp4check
from nvfp4check.checkpoint.naming import Part
from nvfp4check.checkpoint.opening import Checkpoint, open_checkpoint
from nvfp4check.checkpoint.quant_config import from_hf_quant_config
from nvfp4check.checkpoint.synth import synthesize
from nvfp4check.cli.options import require_writable, write
from nvfp4check.dequantize import dequantize_nvfp4
from nvfp4check.findings import CheckError
from nvfp4check.forward.meter import Meter
from nvfp4check.forward.reading import ReadAhead, as_stored

#: nvidia/DeepSeek-V3.1-NVFP4: bytes of all its tensors.
WHOLE_MODEL = 413_306_995_616

#: The published config.json, but for one layer, few tokens in the vocabulary and no MTP layer.
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 1,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 163840,
    "vocab_size": 4096,
}
HF_QUANT_CONFIG = {
    "producer": {"name": "modelopt", "version": "0.39.0"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": [
            "lm_head",
            "model.layers.0.self_attn.kv_a_proj_with_mqa",
            "model.layers.0.self_attn.kv_b_proj",
            "model.layers.0.self_attn.q_a_proj",
            "model.layers.0.self_attn.q_b_proj",
        ],
    },
}


def write_checkpoint(directory: Path, experts: int) -> None:
    """Write the synthetic layer, every tensor filled."""
    config: dict[str, object] = {**CONFIG, "n_routed_experts": experts}
    quantization = from_hf_quant_config(HF_QUANT_CONFIG)
    synthesize(config, dict(HF_QUANT_CONFIG), quantization, directory, shards=4)
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, 2**26, dtype=np.uint8)
    scales = random.integers(0x50, 0x7F, 2**24, dtype=np.uint8)
    small = torch.from_numpy(random.standard_normal(2**24).astype(np.float32) * 0.02).bfloat16()
    values = small.view(torch.uint8).numpy()
    checkpoint = open_checkpoint(directory)
    for entry in checkpoint.tensors.values():
        fill = {"U8": codes, "F8_E4M3": scales, "BF16": values}.get(entry.dtype)
        if entry.name.endswith(("norm.weight", "layernorm.weight")):
            fill = torch.ones(entry.numel, dtype=torch.bfloat16).view(torch.uint8).numpy()
        elif entry.dtype == "F32":
            scale = 0.0 if entry.name.endswith("bias") else 3e-5
            fill = np.full(entry.numel, scale, dtype=np.float32).view(np.uint8)
        assert fill is not None, entry
        with (directory / entry.shard).open("r+b") as file:
            file.seek(entry.start)
            left = entry.nbytes
            while left:
                left -= file.write(fill[: min(left, len(fill))].data)


def forward(
    directory: Path, tokens: int, mode: str, bounds: str | None = None
) -> tuple[dict[str, Any], float, int]:
    """Run the command; return its result, the seconds it took and its peak RSS in bytes."""
    prompts = directory / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "p", "tokens": [(37 * i) % 4096 for i in range(tokens)]}))
    with tempfile.TemporaryDirectory(dir=directory) as out:
        command = [
            *(sys.executable, "-m", "nvfp4check", "forward", str(directory)),
            *("--prompts", str(prompts), "--out", f"{out}/run", "--mode", mode),
            *("--format", "json"),
            *(() if bounds is None else ("--bounds", bounds)),
        ]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    # The largest of all children; they are the same command.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    result: dict[str, Any] = json.loads(done.stdout)
    return result, seconds, peak


def alone(checkpoint: Checkpoint, tokens: int, mode: str, share: int = 8) -> dict[str, float]:
    """Return the seconds of reading, dequantising and multiplying the experts, each alone.

    Every `share`-th expert is measured and the time multiplied; each gets the rows it has when
    tokens spread evenly. Dequantisation is to float32, the product in the dtype of the mode of
    weights that have it already.
    """
    names = [
        name
        for name, weight in checkpoint.weights.items()
        if ".mlp.experts." in name and int(name.split(".")[5]) % share == 0
    ]
    weights = [checkpoint.weights[name] for name in names]
    experts = {int(name.split(".")[5]) for name in checkpoint.weights if ".mlp.experts." in name}
    rows = max(1, tokens * 8 // len(experts))
    wide = torch.float64 if mode == "stored" else torch.float32
    spent = {"read": 0.0, "dequantize": 0.0, "multiply": 0.0}
    rooms: dict[tuple[int, ...], torch.Tensor] = {}  # new memory would cost more than the work
    with ReadAhead(checkpoint.storage, 0, Meter()) as reader:
        for weight in weights:
            start = time.perf_counter()
            raw = reader.take(weight)
            spent["read"] += time.perf_counter() - start
            stored = {part: as_stored(raw[part], weight.parts[part]) for part in weight.parts}
            room = rooms.setdefault(weight.shape, torch.zeros(weight.shape))
            start = time.perf_counter()
            dequantize_nvfp4(
                stored[Part.CODES],
                stored[Part.BLOCK_SCALES],
                torch.ones(()),
                out=room,
                threads=torch.get_num_threads(),
            )
            spent["dequantize"] += time.perf_counter() - start
            values, x = room.to(wide), torch.ones(rows, weight.shape[1], dtype=wide)
            start = time.perf_counter()
            x @ values.T
            spent["multiply"] += time.perf_counter() - start
    return {work: seconds * share for work, seconds in spent.items()}


def with_bounds(directory: Path, tokens: int, mode: str, bounds: str) -> dict[str, Any]:
    """Return what a run costs that derives bounds; it is the last, for its peak is the highest."""
    forward(directory, tokens, mode, bounds)  # compiles
    result, _, peak = forward(directory, tokens, mode, bounds)
    work = result["seconds_by_work"]
    return {"dtypes": bounds, "seconds": result["seconds"], "peak_rss": peak, "by_work": work}


def measure(directory: Path, tokens: int, mode: str, bounds: str | None = None) -> dict[str, Any]:
    """Return the document of the measurement."""
    forward(directory, tokens, mode)  # fills the page cache and compiles
    result, _, peak = forward(directory, tokens, mode)
    checkpoint = open_checkpoint(directory)
    parts = alone(checkpoint, tokens, mode)
    bounded = with_bounds(directory, tokens, mode, bounds) if bounds is not None else None
    speed = result["bytes_read"] / result["seconds"]
    return {
        "schema": "nvfp4check/bench-forward/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "mode": mode,
        "tokens": tokens,
        "processors": len(os.sched_getaffinity(0)),
        "checkpoint_bytes": checkpoint.nbytes,
        "bytes_read": result["bytes_read"],
        "seconds": result["seconds"],
        "bytes_per_second": round(speed),
        "peak_rss": peak,
        "seconds_by_work": result["seconds_by_work"],
        "experts_alone": {work: round(seconds, 3) for work, seconds in parts.items()},
        "times_the_sum": round(result["seconds"] / sum(parts.values()), 3),
        "whole_model_seconds": round(WHOLE_MODEL / speed),
        "bounds": bounded,
    }


def _bounds_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    bounds = document["bounds"]
    if bounds is None:
        return []
    ratio = bounds["seconds"] / document["seconds"]
    peak = f"peak RSS {bounds['peak_rss'] / 2**30:.2f} GiB"
    shares = ", ".join(f"{work} {spent:.1f} s" for work, spent in bounds["by_work"].items())
    return [
        (f"with bounds for {bounds['dtypes']}", f"{bounds['seconds']:.1f} s, {ratio:.2f} times"),
        ("", f"{peak}; {shares}"),
    ]


def text_of(document: dict[str, Any]) -> str:
    """Return the document as a table."""
    seconds = document["seconds"]
    shares = ", ".join(
        f"{work} {spent:.1f} s ({spent / seconds:.0%})"
        for work, spent in document["seconds_by_work"].items()
    )
    alone_ = ", ".join(f"{k} {v:.1f} s" for k, v in document["experts_alone"].items())
    rows = [
        ("mode, tokens", f"{document['mode']}, {document['tokens']}"),
        (
            "read",
            f"{document['bytes_read'] / 1e9:.2f} of {document['checkpoint_bytes'] / 1e9:.2f} GB",
        ),
        ("time", f"{seconds:.1f} s, {document['bytes_per_second'] / 1e9:.2f} GB/s"),
        ("peak RSS", f"{document['peak_rss'] / 2**30:.2f} GiB"),
        ("work (read runs beside)", shares),
        ("experts, each work alone", alone_),
        ("time over their sum", f"{document['times_the_sum']:.2f}"),
        *_bounds_rows(document),
        ("413 GB at this speed", f"{document['whole_model_seconds'] / 60:.0f} min"),
    ]
    return tabulate(rows, tablefmt="plain") + "\n"


def main(argv: Sequence[str]) -> int:
    """Measure, and write a table or with --format json a document."""
    parser = argparse.ArgumentParser(
        prog="python -m nvfp4check.bench forward", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--experts", type=int, default=256, help="fewer for a quick look")
    parser.add_argument("--mode", choices=("stored", "weight-only"), default="stored")
    parser.add_argument("--bounds", help="dtypes that bounds are derived for, with commas")
    parser.add_argument("--dir", type=Path, help="where the layer of about 6 GB is written")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    try:
        require_writable(args.output)
        with tempfile.TemporaryDirectory(dir=args.dir, prefix="nvfp4check-layer-") as folder:
            directory = Path(folder) / "checkpoint"
            write_checkpoint(directory, args.experts)
            document = measure(directory, args.tokens, args.mode, args.bounds)
        text = json.dumps(document, indent=2) if args.format == "json" else text_of(document)
        write(text, args.output)
    except (CheckError, subprocess.CalledProcessError) as error:
        print(f"nvfp4check: error: {error}", file=sys.stderr)
        return 2
    return 0
