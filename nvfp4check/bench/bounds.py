"""How wide derived bounds are: the bound of each token over the error of a correct candidate.

    python -m nvfp4check.bench bounds CKPT [--prompts 8] [--tokens 100] [--format json]

The checkpoint is computed over prompts of random tokens in float32, with bounds for float32 and
bfloat16; then again in float64, whose distance is the reference's own error, and in bfloat16, each
layer given the reference's states. A bound is for every correct candidate, and this is one: the
median says how much room is left, the least how near a token came.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import nvfp4check
from nvfp4check.activations import Run
from nvfp4check.agreement.bounds import AFTER_ROUTER
from nvfp4check.agreement.layers import VALUE_POINTS, values
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.cli.options import require_writable, write
from nvfp4check.findings import CheckError
from nvfp4check.forward.options import Activations, Arithmetic, ForwardOptions
from nvfp4check.forward.setup import config_of
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt

#: The dtype of a bound, and in what arithmetic it is tried.
TRIED = {"float32": Arithmetic.FLOAT64, "bfloat16": Arithmetic.BFLOAT16}


def prompts_for(vocabulary: int, count: int, tokens: int) -> list[Prompt]:
    """Return prompts of random tokens."""
    chosen = random.Random(0)
    return [
        Prompt(id=f"p{i}", tokens=tuple(chosen.randrange(vocabulary) for _ in range(tokens)))
        for i in range(count)
    ]


def room(reference: Run, candidate: Run, dtype: str, point: str) -> torch.Tensor:
    """Return bound over error of all tokens at a point; tokens with other experts are left out."""
    found = []
    for layer in reference.layers:
        if point not in reference.points(layer):
            continue
        for prompt in reference.prompts:
            r, c = values(reference, candidate, layer, prompt, point)
            error = (c.double() - r.double()).norm(dim=-1)
            same = error > 0
            if point in AFTER_ROUTER and "router_experts" in reference.points(layer):
                chosen = [
                    run.point(layer, prompt, "router_experts").sort(-1).values
                    for run in (reference, candidate)
                ]
                same &= (chosen[0] == chosen[1]).all(-1)
            found.append((reference.bound(layer, prompt, point, dtype) / error)[same])
    return torch.cat(found) if found else torch.empty(0)


def measure(location: str, count: int, tokens: int, folder: Path) -> dict[str, Any]:
    """Return the document of the measurement."""
    config = config_of(open_checkpoint(location))
    prompts = prompts_for(config.vocab_size, count, tokens)
    options = ForwardOptions(activations=Activations.ALL, bounds=tuple(TRIED))
    reference = run_forward(location, prompts, folder / "reference", options).run
    rows = []
    for dtype, arithmetic in TRIED.items():
        given = ForwardOptions(
            activations=Activations.ALL, arithmetic=arithmetic, inputs=reference.path
        )
        candidate = run_forward(location, prompts, folder / dtype, given).run
        for point in VALUE_POINTS:
            over = room(reference, candidate, dtype, point)
            if over.numel():
                rows.append(
                    {
                        "dtype": dtype,
                        "point": point,
                        "tokens": over.numel(),
                        "median": float(over.median()),
                        "least": float(over.min()),
                    }
                )
    return {
        "schema": "nvfp4check/bench-bounds/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "checkpoint": location,
        "prompts": count,
        "tokens": tokens,
        "bound_over_error": rows,
    }


def text_of(document: dict[str, Any]) -> str:
    """Return the document as a table."""
    found = {(row["dtype"], row["point"]): row for row in document["bound_over_error"]}
    points = dict.fromkeys(row["point"] for row in document["bound_over_error"])
    rows = [
        [
            point,
            *(
                f"{found[dtype, point][what]:.3g}" if (dtype, point) in found else "-"
                for dtype in TRIED
                for what in ("median", "least")
            ),
        ]
        for point in points
    ]
    headers = ["bound / error", *(f"{d}, {w}" for d in TRIED for w in ("median", "least"))]
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True) + "\n"


def main(argv: Sequence[str]) -> int:
    """Measure, and write a table or with --format json a document."""
    parser = argparse.ArgumentParser(
        prog="python -m nvfp4check.bench bounds", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    try:
        require_writable(args.output)
        with tempfile.TemporaryDirectory(prefix="nvfp4check-bounds-") as folder:
            document = measure(args.checkpoint, args.prompts, args.tokens, Path(folder))
        text = json.dumps(document, indent=2) if args.format == "json" else text_of(document)
        write(text, args.output)
    except CheckError as error:
        print(f"nvfp4check: error: {error}", file=sys.stderr)
        return 2
    return 0
