"""The forward against transformers' DeepseekV3ForCausalLM in float32, captured by hooks.

What versions of transformers do otherwise than DeepSeek's published arithmetic:
    up to 5.5.4  groups that are not chosen are masked with 0.0 instead of -inf, so an expert of a
                 masked group is taken where every choice score is negative
    4.x          the router's bias is cast to the dtype of the model on loading (bfloat16 there;
                 in float32, as here, nothing is lost)
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import AgreeOptions, AgreeResult, agree
from nvfp4check.agreement.divergence import SCORE_ERROR
from nvfp4check.agreement.statistics import Decision
from nvfp4check.capture import capture
from nvfp4check.forward.options import Activations, Arithmetic, ForwardOptions, KvCache
from nvfp4check.forward.streaming import run_forward
from nvfp4check.goldens import Closeness, compare
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import LinearMode
from nvfp4ref.deepseek_v3.weights import StateDict

transformers = pytest.importorskip("transformers")

TINY = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3"
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
MASKS_WITH_ZERO = VERSION < (5, 6)

YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
#: Nothing is a multiple of 128, and v_head_dim is not qk_nope_head_dim.
ODD: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 88,
    "intermediate_size": 136,
    "moe_intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 40,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_theta": 10000.0,
    "rope_scaling": YARN,
    "rope_interleave": True,
    "max_position_embeddings": 163840,
}
#: Groups of two experts of which one group is kept; two shared experts.
NARROW_GROUPS = {
    **ODD,
    "n_routed_experts": 10,
    "n_group": 5,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "v_head_dim": 16,
    "routed_scaling_factor": 1.7,
}
#: Every group is kept, weights are not normalised, mscales differ, dense layers in front.
ALL_GROUPS = {
    **ODD,
    "n_group": 3,
    "topk_group": 3,
    "num_experts_per_tok": 5,
    "norm_topk_prob": False,
    "first_k_dense_replace": 2,
    "rope_scaling": {**YARN, "factor": 8, "mscale": 0.707, "mscale_all_dim": 0.9},
}

PROMPTS = [
    Prompt(id="long", tokens=tuple((7 * i * i + 3 * i) % 211 for i in range(90))),
    Prompt(id="short", tokens=(3, 1, 4, 1, 5)),
    Prompt(id="one", tokens=(42,)),
]
OPTIONS = ForwardOptions(activations=Activations.ALL, kv_cache=KvCache.NONE)


def random_model(config: dict[str, Any], bias_mean: float, directory: Path) -> torch.nn.Module:
    """A model with seeded weights, saved as a checkpoint and loaded again as anyone would."""
    model = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**config, attn_implementation="eager")
    )
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                parameter.copy_(bias_mean + 0.05 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    return loaded(directory)


def loaded(directory: Path) -> torch.nn.Module:
    model: torch.nn.Module = transformers.DeepseekV3ForCausalLM.from_pretrained(
        directory, torch_dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def captured(model: torch.nn.Module, prompts: list[Prompt], run: Path) -> Run:
    """The run of transformers, each prompt alone in its batch."""
    with torch.no_grad(), capture(model, run, engine="transformers") as session:
        for prompt in prompts:
            with session.prompt(prompt.id, prompt.tokens or ()):
                model(input_ids=torch.tensor([prompt.tokens]), use_cache=False)
    return Run.open(run)


def agreement(checkpoint: Path, witness: Run, folder: Path) -> AgreeResult:
    """The witness against the forward in float64; the noise is the same forward in float32."""
    float64, float32 = (
        run_forward(checkpoint, PROMPTS, folder / a.value, replace(OPTIONS, arithmetic=a)).run
        for a in (Arithmetic.FLOAT64, Arithmetic.FLOAT32)
    )
    return agree(float64, witness, AgreeOptions(noise=(float32,)))


@contextmanager
def groups_masked_with_zero() -> Iterator[None]:
    """What transformers did up to 5.5.4, in any version: the mask's -inf becomes 0.0."""
    masked_fill = torch.Tensor.masked_fill

    def with_zero(tensor: torch.Tensor, mask: torch.Tensor, value: float) -> torch.Tensor:
        return masked_fill(tensor, mask, 0.0 if value == float("-inf") else value)

    gates = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter
    forward = gates.forward

    def gate(self: torch.nn.Module, x: torch.Tensor) -> Any:
        with patch.object(torch.Tensor, "masked_fill", with_zero):
            return forward(self, x)

    with patch.object(gates, "forward", gate):
        yield


def assert_agrees(run: Run, witness: Run) -> None:
    differences, compared = compare(witness, run, Closeness.FLOAT32)
    assert differences == []
    assert compared > 5 * len(run.prompts)


@pytest.mark.parametrize("bias_mean", [0.0, 1.5], ids=["bias-0", "bias-positive"])
@pytest.mark.parametrize(
    "config", [ODD, NARROW_GROUPS, ALL_GROUPS], ids=["odd", "narrow-groups", "all-groups"]
)
def test_random_models_agree_at_every_point(
    config: dict[str, Any], bias_mean: float, tmp_path: Path
) -> None:
    model = random_model(config, bias_mean, tmp_path / "checkpoint")

    witness = captured(model, PROMPTS, tmp_path / "witness")
    run = run_forward(tmp_path / "checkpoint", PROMPTS, tmp_path / "run", OPTIONS).run

    assert_agrees(run, witness)


def test_a_negative_bias_is_routed_as_the_version_masks_groups(tmp_path: Path) -> None:
    model = random_model(ODD, -3.0, tmp_path / "checkpoint")
    witness = captured(model, PROMPTS, tmp_path / "witness")
    options = OPTIONS

    if MASKS_WITH_ZERO:
        free = run_forward(tmp_path / "checkpoint", PROMPTS, tmp_path / "free", OPTIONS).run
        assert not torch.equal(
            free.point(1, "long", "router_experts").sort(dim=1).values,
            witness.point(1, "long", "router_experts").sort(dim=1).values,
        )
        # All else agrees once its experts are taken.
        options = ForwardOptions(
            activations=Activations.ALL, kv_cache=KvCache.NONE, routing=tmp_path / "witness"
        )
    run = run_forward(tmp_path / "checkpoint", PROMPTS, tmp_path / "run", options).run

    assert_agrees(run, witness)


@pytest.mark.parametrize("bias_mean", [0.0, 1.5, -3.0], ids=["zero", "positive", "negative"])
def test_agree_passes_where_this_version_routes_as_deepseek_does(
    bias_mean: float, tmp_path: Path
) -> None:
    if MASKS_WITH_ZERO and bias_mean < 0:
        pytest.skip(f"transformers {transformers.__version__} masks groups with 0.0")
    model = random_model(ODD, bias_mean, tmp_path / "checkpoint")
    witness = captured(model, PROMPTS, tmp_path / "witness")

    result = agreement(tmp_path / "checkpoint", witness, tmp_path)

    assert (result.verdict, result.divergence) == (Decision.PASS, None)
    assert len(result.layers) == 26  # five points of four layers, and two of three routers
    assert not any(layer.flips for layer in result.routing)


def test_agree_names_the_router_of_a_version_that_masks_groups_with_zero(tmp_path: Path) -> None:
    # The installed version where it does so; else it is patched to, see groups_masked_with_zero.
    model = random_model(ODD, -3.0, tmp_path / "checkpoint")
    with nullcontext() if MASKS_WITH_ZERO else groups_masked_with_zero():
        witness = captured(model, PROMPTS, tmp_path / "witness")

    result = agreement(tmp_path / "checkpoint", witness, tmp_path)

    assert result.verdict is Decision.FAIL
    found = result.divergence
    assert found is not None
    assert (found.layer, found.point, found.held_against) == (1, "router_experts", SCORE_ERROR)
    first = result.routing[0]
    assert len(first.flips) == first.tokens
    assert all(flip.legal is False for flip in first.flips)


def test_a_prompt_beyond_the_original_length_agrees(tmp_path: Path) -> None:
    config = {**ODD, "num_hidden_layers": 2}
    model = random_model(config, 0.5, tmp_path / "checkpoint")
    prompts = [Prompt(id="p", tokens=tuple((5 * i * i + i) % 211 for i in range(4500)))]

    witness = captured(model, prompts, tmp_path / "witness")
    run = run_forward(tmp_path / "checkpoint", prompts, tmp_path / "run", OPTIONS).run

    assert_agrees(run, witness)


def test_the_trained_model_agrees_at_every_point(tmp_path: Path) -> None:
    prompts = [Prompt(id=p.id, tokens=tuple(t % 1024 for t in p.tokens or ())) for p in PROMPTS]

    witness = captured(loaded(TINY / "bf16"), prompts, tmp_path / "witness")
    run = run_forward(TINY / "bf16", prompts, tmp_path / "run", OPTIONS).run

    assert_agrees(run, witness)


def test_weight_only_nvfp4_is_transformers_on_the_dequantised_weights(tmp_path: Path) -> None:
    stored: dict[str, torch.Tensor] = {}
    for shard in sorted((TINY / "nvfp4").glob("*.safetensors")):
        stored.update(load_file(shard))
    source = StateDict(stored, LinearMode.WEIGHT_ONLY)
    tensors = {
        name: source.linear(name.removesuffix(".weight")).dequantized(torch.float32)
        if f"{name}_scale_2" in stored
        else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith("_scale") and not name.endswith("_scale_2")
        if not name.startswith("model.layers.5.")
    }
    dequantized = tmp_path / "checkpoint"
    dequantized.mkdir()
    save_file(tensors, dequantized / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((TINY / "nvfp4" / "config.json").read_text())
    (dequantized / "config.json").write_text(json.dumps(config))

    witness = captured(loaded(dequantized), PROMPTS, tmp_path / "witness")
    options = ForwardOptions(
        mode=LinearMode.WEIGHT_ONLY, activations=Activations.ALL, kv_cache=KvCache.NONE
    )
    run = run_forward(TINY / "nvfp4", PROMPTS, tmp_path / "run", options).run

    assert_agrees(run, witness)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_theta", 10001.0),
        ("routed_scaling_factor", 2.4999),
        ("rms_norm_eps", 3e-6),
        ("topk_group", 3),
    ],
)
def test_a_model_computed_slightly_otherwise_is_seen(
    field: str, value: float, tmp_path: Path
) -> None:
    model = random_model(ODD, 0.0, tmp_path / "checkpoint")
    witness = captured(model, PROMPTS, tmp_path / "witness")
    file = tmp_path / "checkpoint" / "config.json"
    config = json.loads(file.read_text())
    assert DeepseekV3Config.from_dict(config)
    if field == "rope_theta" and isinstance(config.get("rope_parameters"), dict):
        config["rope_parameters"][field] = value
    config[field] = value
    file.write_text(json.dumps(config))

    run = run_forward(tmp_path / "checkpoint", PROMPTS, tmp_path / "run", OPTIONS).run

    differences, _ = compare(witness, run, Closeness.FLOAT32)
    assert differences
