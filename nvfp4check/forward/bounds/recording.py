"""The bounds of a run: asked for by name, and written beside its points.

RUN/bounds/NNN.safetensors    <prompt>/<point>/<arithmetic>: float64 [T], how far a token may lie
                              off
                              <prompt>/straddles/<arithmetic>: int32 [T], codes counted as flipped
                              <prompt>/settled/<arithmetic>: uint8 [T], 0 where another choice of
                              experts is legal; not in dense layers
                              <prompt>/uncached/<arithmetic>: bfloat16 [T, D], in which direction
                              attn_output errs if values are kept where an FP8 cache is meant

An arithmetic is a dtype, of several ranks with their number after it, of the direct form of
attention alone with that at the end: bfloat16/tp8/direct.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from nvfp4check.activations import SETTLED, STRADDLES, UNCACHED, bounds_file, write_tensors
from nvfp4check.findings import CheckError
from nvfp4check.forward.bounds.arithmetic import DECLARABLE, Declared, Roundings
from nvfp4check.forward.bounds.layer import LayerBounds
from nvfp4check.forward.bounds.parallel import require_ranks
from nvfp4check.forward.bounds.predictor import PredictorBounds
from nvfp4ref.deepseek_v3.config import DeepseekV3Config


def parse_bounds(text: str) -> tuple[str, ...]:
    """Return the arithmetics that `bfloat16,bfloat16/tp8` asks for, each once.

    Raises:
        CheckError: One of them cannot be declared.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise CheckError(f"--bounds {text!r}: give any of {', '.join(DECLARABLE)}, with commas")
    for name in names:
        Declared.of_candidate(name)
    return names


def roundings_of(
    names: Sequence[str], reference: torch.dtype, config: DeepseekV3Config
) -> Roundings | None:
    """Return what is rounded by candidates of these arithmetics and a reference; None without any.

    Raises:
        CheckError: An engine of so many ranks cannot have the model.
    """
    if not names:
        return None
    declared = [Declared.of_candidate(name) for name in names]
    roundings = Roundings(declared, Declared.of_reference(reference))
    require_ranks(roundings, config)
    return roundings


def write_bounds(
    run: Path,
    layer: int,
    found: LayerBounds | PredictorBounds,
    names: Sequence[str],
    lengths: Mapping[str, int],
) -> None:
    """Write the bounds of a layer that was computed."""
    rows = {**found.bounds, STRADDLES: found.straddles.to(torch.int32)}
    if found.settled is not None:
        rows[SETTLED] = found.settled.to(torch.uint8)
    if found.uncached is not None:
        rows[UNCACHED] = found.uncached.to(torch.bfloat16)
    tensors = {}
    for point, values in rows.items():
        for name, of_name in zip(names, values, strict=True):
            parts = torch.split(of_name, list(lengths.values()))
            for prompt, part in zip(lengths, parts, strict=True):
                tensors[f"{prompt}/{point}/{name}"] = part
    write_tensors(bounds_file(run, layer), tensors)
