"""Checkpoints of a few weights, quantised by the reference, beside the base they came from."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nvfp4check.checkpoint.audit.results import WeightAudit
from nvfp4check.checkpoint.audit.sources import Reader
from nvfp4check.checkpoint.audit.weights import audit_weight
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4ref import nvfp4
from nvfp4ref.conventions import Convention
from nvfp4ref.packing import unpack

NAME = "model.layers.0.mlp.down_proj.weight"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight and what became of it."""

    x: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    decode: torch.Tensor
    encode: torch.Tensor
    audit: WeightAudit


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["SomeForCausalLM"]}))
    return folder


@pytest.fixture
def audited(tmp_path: Path) -> Callable[..., Quantized]:
    """Quantise a weight under a convention, change it if asked, write it down and audit it."""
    numbers = itertools.count()

    def make(
        x: torch.Tensor,
        convention: Convention,
        *,
        decode: torch.Tensor | None = None,
        change: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
        base: dict[str, torch.Tensor] | None = None,
    ) -> Quantized:
        amax = x.abs().amax()
        encode = nvfp4.global_encode_scale(amax, convention)
        if decode is None:
            decode = nvfp4.global_decode_scale(amax, convention)
        packed = convention is Convention.COMPRESSED_TENSORS
        if packed:
            decode = encode.reciprocal()
        else:
            encode = decode.reciprocal()
        codes, scales = nvfp4.quantize(x, decode, convention, global_encode_scale=encode)
        if change is not None:
            change(codes, scales.view(torch.uint8))
        module = NAME.removesuffix(".weight")
        stored = {
            f"{module}.{'weight_packed' if packed else 'weight'}": codes,
            f"{module}.weight_scale": scales,
            f"{module}.{'weight_global_scale' if packed else 'weight_scale_2'}": (
                encode.reshape(1) if packed else decode
            ),
        }
        number = next(numbers)
        ours = open_checkpoint(_write(tmp_path / f"quantized-{number}", stored))
        theirs = open_checkpoint(_write(tmp_path / f"base-{number}", base or {NAME: x}))
        found = audit_weight(Reader(ours), ours.weights[NAME], Reader(theirs), theirs.weights[NAME])
        return Quantized(x, unpack(codes), scales, decode, encode, found)

    return make
