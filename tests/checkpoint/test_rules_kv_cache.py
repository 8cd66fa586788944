"""NV307 and NV308, each with a fault that it sees; and the bounds against what layers put out."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.kv_bounds import Reach, reach_of
from nvfp4check.checkpoint.naming import Part
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.validation import ValidationOptions, validate
from nvfp4check.findings import Finding, Severity

ATTENTION = "model.layers.1.self_attn"
K_SCALE = f"{ATTENTION}.k_proj.k_scale"

Findings = Callable[[Path], list[Finding]]


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    def run(path: Path) -> list[Finding]:
        options = ValidationOptions(select=("NV3",), journal=tmp_path / "journal.jsonl")
        return list(validate(open_checkpoint(path), options).findings)

    return run


def add_scale(clone: CheckpointEditor, value: float, name: str = K_SCALE) -> None:
    clone.add(name, np.float32(value).tobytes(), dtype="F32", shape=())


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_an_unusable_scale_is_found(
    clone: CheckpointEditor, findings: Findings, value: float
) -> None:
    add_scale(clone, value)
    [finding] = findings(clone.path)

    assert (finding.rule, finding.tensor) == ("NV307", K_SCALE)


@pytest.mark.parametrize("value", [1.0, 0.5, 0.02])
@pytest.mark.parametrize("name", [K_SCALE, f"{ATTENTION}.v_proj.v_scale"])
def test_a_scale_that_something_could_need_is_sound(
    clone: CheckpointEditor, findings: Findings, name: str, value: float
) -> None:
    add_scale(clone, value, name)

    assert findings(clone.path) == []


@pytest.mark.parametrize("value", [1.5, 20.0, 1e5])
def test_a_scale_that_nothing_could_need_is_found(
    clone: CheckpointEditor, findings: Findings, value: float
) -> None:
    add_scale(clone, value)
    [finding] = findings(clone.path)

    assert (finding.rule, finding.severity) == ("NV308", Severity.WARNING)
    assert finding.tensor == K_SCALE
    assert f"the reciprocal is {1 / value:.3g}" in finding.message


def test_a_scale_that_clips_every_token_is_found(
    clone: CheckpointEditor, findings: Findings
) -> None:
    add_scale(clone, 1e-4)
    [finding] = findings(clone.path)

    assert finding.rule == "NV308"
    assert "every token's latent" in finding.message


def test_a_cache_in_another_format_is_not_judged(
    clone: CheckpointEditor, findings: Findings
) -> None:
    add_scale(clone, 20.0)
    with clone.edit_json("hf_quant_config.json") as document:
        document["quantization"]["kv_cache_quant_algo"] = "NVFP4"

    assert findings(clone.path) == []


def test_norms_of_another_form_bound_nothing(clone: CheckpointEditor) -> None:
    add_scale(clone, 20.0)
    with clone.edit_json("config.json") as config:
        config["architectures"] = ["Gemma3ForCausalLM"]
    checkpoint = open_checkpoint(clone.path)

    assert reach_of(checkpoint, checkpoint.weights[K_SCALE], Part.K_SCALE) is None


def layer_reach(
    folder: Path, tensors: dict[str, torch.Tensor], scale: str, part: Part, **more: object
) -> Reach:
    config = {"architectures": ["DeepseekV3ForCausalLM"], **more}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {f"{name}": t.contiguous() for name, t in tensors.items()}
        | {f"{ATTENTION}.{scale}": torch.tensor(1.0)},
        folder / "model.safetensors",
    )
    checkpoint = open_checkpoint(folder)
    reach = reach_of(checkpoint, checkpoint.weights[f"{ATTENTION}.{scale}"], part)
    assert reach is not None
    return reach


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt() * weight


def rotated(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), spike=st.booleans())
def test_no_latent_and_no_rotated_key_is_outside_its_bounds(
    tmp_path_factory: pytest.TempPathFactory, seed: int, spike: bool
) -> None:
    generator = torch.manual_seed(seed)
    hidden, rank, rope = 64, 32, 16
    norm = torch.rand(hidden, generator=generator, dtype=torch.float64) * 2
    latent_norm = torch.rand(rank, generator=generator, dtype=torch.float64) + 0.1
    weight = torch.randn(rank + rope, hidden, generator=generator, dtype=torch.float64)
    reach = layer_reach(
        tmp_path_factory.mktemp("layer"),
        {
            f"{ATTENTION.rpartition('.')[0]}.input_layernorm.weight": norm.float(),
            f"{ATTENTION}.kv_a_layernorm.weight": latent_norm.float(),
            f"{ATTENTION}.kv_a_proj_with_mqa.weight": weight.float(),
        },
        "k_proj.k_scale",
        Part.K_SCALE,
    )
    x = torch.randn(256, hidden, generator=generator, dtype=torch.float64)
    if spike:  # along a row: where Cauchy and Schwarz become an equality
        x = torch.cat([x, (weight * norm)[:rank], (weight * norm)[rank:]])
    y = normed(x, norm) @ weight.T
    latent = normed(y[:, :rank], latent_norm)
    angle = torch.rand(rope // 2, generator=generator, dtype=torch.float64) * 7
    whole = torch.cat([latent, rotated(y[:, rank:], angle)], -1).abs()
    near = 1 + 2.0**-20  # the weights are stored as float32

    assert float(whole.max()) <= reach.most * near
    assert float(latent.abs().amax(-1).min()) * near >= reach.least > 0


def test_the_bound_of_a_projection_is_reached(tmp_path: Path) -> None:
    """Values have no rotation: an input along the largest row is as large as the bound says."""
    generator = torch.manual_seed(0)
    norm = torch.rand(64, generator=generator, dtype=torch.float64) + 0.5
    weight = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    reach = layer_reach(
        tmp_path,
        {
            f"{ATTENTION.rpartition('.')[0]}.input_layernorm.weight": norm.float(),
            f"{ATTENTION}.v_proj.weight": weight.float(),
        },
        "v_proj_.v_scale",
        Part.V_SCALE,
    )
    rows = weight * norm
    largest = rows[rows.norm(dim=1).argmax()]
    value = normed(largest, norm) @ weight.T

    assert reach.most == pytest.approx(float(value.abs().max()), rel=2.0**-20)


YARN = {"type": "yarn", "factor": 40, "mscale": 1.0}
STRETCHED = 1 + math.log(40) / 10


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, 1.0),
        ({"rope_scaling": None}, 1.0),
        ({"rope_scaling": YARN}, STRETCHED),
        ({"rope_parameters": YARN | {"rope_theta": 1e4}}, STRETCHED),
        ({"text_config": {"rope_scaling": YARN}}, STRETCHED),
        ({"rope_parameters": {"full_attention": YARN, "sliding_attention": {}}}, STRETCHED),
        ({"rope_scaling": YARN | {"mscale": 2}}, 1 + 2 * math.log(40) / 10),
        ({"rope_scaling": YARN | {"attention_factor": 5.0}}, 5.0),
        ({"rope_scaling": {"factor": "40", "mscale": math.nan}}, 1.0),
    ],
)
def test_keys_are_stretched_as_the_config_says_in_every_form_it_has(
    tmp_path: Path, config: dict[str, object], factor: float
) -> None:
    tensors = {
        f"{ATTENTION.rpartition('.')[0]}.input_layernorm.weight": torch.ones(64),
        f"{ATTENTION}.k_proj.weight": torch.eye(64),
    }
    reach = layer_reach(tmp_path, tensors, "k_proj_.k_scale", Part.K_SCALE, **config)

    assert reach.most == pytest.approx(math.sqrt(2) * math.sqrt(64) * factor, rel=2.0**-40)
