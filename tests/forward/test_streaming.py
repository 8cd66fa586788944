"""The streamed forward: equal to the reference, each weight read once, only those needed."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nvfp4check.activations import POINTS
from nvfp4check.checkpoint.opening import Checkpoint, open_checkpoint
from nvfp4check.checkpoint.storage import LocalStorage
from nvfp4check.forward.options import (
    Activations,
    Arithmetic,
    ForwardOptions,
    KvCache,
)
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import LinearMode
from nvfp4ref.deepseek_v3.model import forward
from nvfp4ref.deepseek_v3.weights import StateDict, model_weights


def reference(
    tensors: dict[str, torch.Tensor],
    config: DeepseekV3Config,
    prompts: list[Prompt],
    mode: LinearMode,
    dtype: torch.dtype,
) -> tuple[list[torch.Tensor], dict[tuple[int, str], torch.Tensor]]:
    """Logits of each prompt, and the packed value of every layer and point."""
    weights = model_weights(StateDict(tensors, mode), config)
    tokens = [torch.tensor(prompt.tokens) for prompt in prompts]
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def record(layer: int, point: str, value: torch.Tensor) -> None:
        seen[layer, point] = value

    logits, _, _ = forward(tokens, weights, config, dtype, record=record)
    return logits, seen


@pytest.mark.parametrize("dtype", Arithmetic)
@pytest.mark.parametrize(
    ("checkpoint", "mode"),
    [
        ("bf16", LinearMode.UNQUANTIZED),
        ("fp8", LinearMode.WEIGHT_ONLY),
        ("fp8", LinearMode.STORED),
        ("nvfp4", LinearMode.WEIGHT_ONLY),
        ("nvfp4", LinearMode.STORED),
    ],
)
def test_a_streamed_run_has_the_values_of_the_reference(
    tiny: Path,
    prompts: list[Prompt],
    stored_tensors: Callable[[Path], dict[str, torch.Tensor]],
    checkpoint: str,
    mode: LinearMode,
    dtype: Arithmetic,
    tmp_path: Path,
) -> None:
    config = DeepseekV3Config.from_dict(json.loads((tiny / checkpoint / "config.json").read_text()))
    tensors = stored_tensors(tiny / checkpoint)
    expected, points = reference(tensors, config, prompts, mode, dtype.dtype)

    options = ForwardOptions(
        mode=mode, arithmetic=dtype, activations=Activations.ALL, kv_cache=KvCache.NONE
    )
    run = run_forward(tiny / checkpoint, prompts, tmp_path / "run", options).run

    for prompt, logits in zip(run.prompts, expected, strict=True):
        assert torch.equal(run.logits(prompt), logits.to(run.logits(prompt).dtype))
    lengths = [len(prompt.tokens or ()) for prompt in prompts]
    for layer in range(5):
        assert run.points(layer) == (POINTS[:5] if layer == 0 else POINTS)
        for point in run.points(layer):
            for prompt, part in zip(
                run.prompts, torch.split(points[layer, point], lengths), strict=True
            ):
                assert torch.equal(run.point(layer, prompt, point), part)


def test_compressed_tensors_decode_with_the_reciprocal_of_their_scale(
    goldens: Path,
    prompts: list[Prompt],
    stored_tensors: Callable[[Path], dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    directory = goldens / "small-deepseek-v3" / "compressed-tensors"
    prompts = [Prompt(id="a", tokens=tuple(range(40)))]
    config = DeepseekV3Config.from_dict(json.loads((directory / "config.json").read_text()))
    source = StateDict(stored_tensors(directory), LinearMode.STORED)
    expected, _, _ = forward([torch.arange(40)], model_weights(source, config), config)

    run = run_forward(directory, prompts, tmp_path / "run", ForwardOptions()).run

    assert run.info.mode == "stored"
    assert torch.equal(run.logits("a"), expected[0])


class CountingStorage(LocalStorage):
    """Counts how often each byte range is read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.reads: Counter[tuple[str, int, int]] = Counter()

    def read(self, name: str, start: int, stop: int) -> bytes:
        self.reads[name, start, stop] += 1
        return super().read(name, start, stop)


def test_only_experts_that_were_chosen_are_read_and_every_weight_once(
    tiny: Path, keep_all: ForwardOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = CountingStorage(tiny / "nvfp4")

    def opened(location: Path) -> Checkpoint:
        checkpoint = open_checkpoint(location)
        checkpoint.storage = storage
        return checkpoint

    monkeypatch.setattr("nvfp4check.forward.streaming.open_checkpoint", opened)
    prompt = Prompt(id="one", tokens=(17,))
    run = run_forward(tiny / "nvfp4", [prompt], tmp_path / "run", keep_all).run

    checkpoint = open_checkpoint(tiny / "nvfp4")
    for name, entry in checkpoint.tensors.items():
        if ".mlp.experts." in name and not name.startswith("model.layers.5."):
            layer, expert = int(name.split(".")[2]), int(name.split(".")[5])
            chosen = run.point(layer, "one", "router_experts").flatten().tolist()
            assert storage.reads[entry.shard, entry.start, entry.stop] == (expert in chosen)
        elif name.startswith("model.layers.5."):
            assert storage.reads[entry.shard, entry.start, entry.stop] == 0
    assert max(storage.reads.values()) == 1


def test_hidden_keeps_the_residual_stream_and_the_routes(
    tiny: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    run = run_forward(
        tiny / "bf16", prompts, tmp_path / "run", ForwardOptions(activations=Activations.HIDDEN)
    ).run

    assert run.points(0) == ("hidden",)
    assert run.points(1) == ("hidden", "router_scores", "router_experts", "router_weights")


def test_an_fp8_cache_changes_what_attention_sees(
    tiny: Path, prompts: list[Prompt], keep_all: ForwardOptions, tmp_path: Path
) -> None:
    without = run_forward(tiny / "nvfp4", prompts, tmp_path / "without", keep_all).run
    through = run_forward(
        tiny / "nvfp4", prompts, tmp_path / "through", ForwardOptions(activations=Activations.ALL)
    ).run

    a, b = without.point(0, "a", "attn_output"), through.point(0, "a", "attn_output")
    difference = float((a - b).norm() / a.norm())
    assert 0 < difference < 2**-4  # E4M3 rounds a value by at most 2**-4 of it
    assert torch.equal(without.point(0, "a", "attn_input"), through.point(0, "a", "attn_input"))
