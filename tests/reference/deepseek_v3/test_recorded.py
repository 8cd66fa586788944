"""The reference meets what other implementations recorded: no other software is needed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.model import empty_caches, forward
from nvfp4ref.deepseek_v3.mtp import mtp
from nvfp4ref.deepseek_v3.weights import StateDict, model_weights, mtp_weights

GOLDENS = Path(__file__).parents[3] / "goldens"
TINY = GOLDENS / "tiny-deepseek-v3"
SMALL = GOLDENS / "small-deepseek-v3"

#: Relative Frobenius distance between float32 runs: 335 units of 2**-24, of which sums in another
#: order take about two a layer; a wrong computation is off by 1e-3 and more.
FLOAT32_LIMIT = 2e-5


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def opened(directory: Path) -> tuple[StateDict, DeepseekV3Config]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(shard))
    config = DeepseekV3Config.from_dict(json.loads((directory / "config.json").read_text()))
    return StateDict(tensors), config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("witness", ["transformers-4.57.6", "transformers-5.23.0", "deepseek"])
def test_a_random_model_agrees_with_three_implementations(witness: str, dtype: torch.dtype) -> None:
    recorded = load_file(SMALL / "reference" / f"{witness}.safetensors")
    source, config = opened(SMALL / "bf16")
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def record(layer: int, point: str, value: torch.Tensor) -> None:
        seen[layer, point] = value

    tokens = list(recorded["input_ids"])
    logits, _, _ = forward(tokens, model_weights(source, config), config, dtype, record=record)

    assert relative(torch.stack(logits), recorded["logits"]) < FLOAT32_LIMIT
    for layer in range(config.num_hidden_layers):
        for point in ("attn_output", "mlp_output", "hidden"):
            expected = recorded[f"{layer}/{point}"].flatten(0, 1)
            assert relative(seen[layer, point], expected) < FLOAT32_LIMIT
        if config.is_moe(layer):
            experts = seen[layer, "router_experts"].sort(dim=1).values
            expected = recorded[f"{layer}/router_experts"].sort(dim=1).values
            assert torch.equal(experts.long(), expected)


@pytest.mark.parametrize("prompt", ["prompt0", "prompt1", "prompt2", "prompt3"])
def test_the_mtp_layer_agrees_with_the_code_that_trained_it(prompt: str) -> None:
    recorded = load_file(TINY / "activations" / "mtp-trainer-float32.safetensors")
    tokens = load_file(TINY / "activations" / "transformers-float32" / "tokens.safetensors")[prompt]
    source, config = opened(TINY / "bf16")
    _, hidden, _ = forward([tokens], model_weights(source, config), config)
    seen: dict[str, torch.Tensor] = {}

    logits, _ = mtp(
        hidden[0][:-1],
        tokens[1:],
        empty_caches(1, config, torch.float32),
        [len(tokens) - 1],
        mtp_weights(source, config.num_hidden_layers, config),
        config,
        record=seen.__setitem__,
    )

    assert relative(seen["eh_proj"], recorded[f"{prompt}.mtp.eh_proj_out"]) < FLOAT32_LIMIT
    assert relative(seen["hidden"], recorded[f"{prompt}.mtp.block_out"]) < FLOAT32_LIMIT
    assert relative(logits, recorded[f"{prompt}.mtp.logits"]) < FLOAT32_LIMIT


def test_an_exchange_of_the_halves_of_eh_proj_would_be_seen() -> None:
    recorded = load_file(TINY / "activations" / "mtp-trainer-float32.safetensors")
    tokens = load_file(TINY / "activations" / "transformers-float32" / "tokens.safetensors")
    source, config = opened(TINY / "bf16")
    _, hidden, _ = forward([tokens["prompt1"]], model_weights(source, config), config)
    name = "model.layers.5.eh_proj.weight"
    weight = source.tensor(name)
    swapped = {
        **{key: source.tensor(key) for key in source.names if key != name},
        name: torch.cat((weight[:, 256:], weight[:, :256]), dim=1),
    }

    logits, _ = mtp(
        hidden[0][:-1],
        tokens["prompt1"][1:],
        empty_caches(1, config, torch.float32),
        [17],
        mtp_weights(StateDict(swapped), 5, config),
        config,
    )

    assert relative(logits, recorded["prompt1.mtp.logits"]) > 1e-2
