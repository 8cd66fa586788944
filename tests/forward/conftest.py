"""Prompts, checkpoints and runs that the tests of the streamed forward share."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4check.forward.options import Activations, ForwardOptions, KvCache
from nvfp4check.tokens import Prompt

GOLDENS = Path(__file__).parents[2] / "goldens"

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors, dict[str, object]], object]


@pytest.fixture
def goldens() -> Path:
    return GOLDENS


@pytest.fixture
def tiny() -> Path:
    """The trained model of five layers and one for multi-token prediction; bf16, fp8, nvfp4."""
    return GOLDENS / "tiny-deepseek-v3"


@pytest.fixture
def prompts() -> list[Prompt]:
    return [
        Prompt(id="a", tokens=tuple(range(3, 30))),
        Prompt(id="b/slash", tokens=(5,)),
        Prompt(id="c", tokens=tuple(range(900, 940, 3))),
    ]


@pytest.fixture
def keep_all() -> ForwardOptions:
    """Every point, and no rounding of keys and values."""
    return ForwardOptions(activations=Activations.ALL, kv_cache=KvCache.NONE)


@pytest.fixture
def stored_tensors() -> Callable[[Path], Tensors]:
    """Return a function that reads every tensor of a checkpoint."""
    return read_all


def read_all(directory: Path) -> Tensors:
    tensors: Tensors = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


@pytest.fixture
def bytes_of() -> Callable[[Path], dict[str, str]]:
    """Return a function that gives the digest of every file of a run."""
    return lambda run: {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(run.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def edited(tmp_path: Path, tiny: Path) -> Callable[..., Path]:
    """Return a function that copies a tiny checkpoint, its tensors or configuration changed."""

    def copy_of(edit: Edit, source: str = "nvfp4") -> Path:
        tensors = read_all(tiny / source)
        config = json.loads((tiny / source / "config.json").read_text())
        edit(tensors, config)
        copy = tmp_path / "edited"
        copy.mkdir()
        owned = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(owned, copy / "model.safetensors")
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return copy_of
