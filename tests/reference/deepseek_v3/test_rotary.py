"""Rotary embedding: pairs, angles, YaRN's ramp, and what each may not change."""

import math

import pytest
import torch

from nvfp4ref.deepseek_v3.config import DeepseekV3Config, RotaryConfig
from nvfp4ref.deepseek_v3.rotary import angles, frequencies, rope

PUBLISHED = {
    "qk_rope_head_dim": 64,
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
}
PLAIN = {"qk_rope_head_dim": 64, "rope_theta": 10000}


def random_heads(tokens: int, heads: int = 2, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, heads, width, generator=generator, dtype=torch.float64)


def test_position_zero_changes_nothing() -> None:
    x = random_heads(1)

    assert torch.equal(rope(x, torch.tensor([0]), PUBLISHED), x)


def test_a_pair_is_two_neighbours_turned_by_a_complex_factor() -> None:
    x = random_heads(5)
    positions = torch.tensor([0, 1, 7, 4095, 100_000])
    theta = angles(positions, RotaryConfig.of(PUBLISHED)).double()

    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    turned = turned * torch.polar(torch.ones_like(theta), theta).unsqueeze(1)

    expected = torch.view_as_real(turned).flatten(-2)
    difference = (rope(x, positions, PUBLISHED) - expected).abs().max()
    assert difference <= 8 * torch.finfo(torch.float64).eps  # two products and a sum of |x| < 4


@pytest.mark.parametrize("config", [PLAIN, PUBLISHED])
def test_the_norm_of_a_pair_is_kept(config: dict[str, object]) -> None:
    x = random_heads(6)
    positions = torch.tensor([0, 1, 31, 4096, 40_000, 163_839])

    before = x.unflatten(-1, (-1, 2)).norm(dim=-1)
    after = rope(x, positions, config).unflatten(-1, (-1, 2)).norm(dim=-1)

    assert ((after - before).abs() <= 8 * torch.finfo(torch.float64).eps * before).all()


def test_scores_depend_on_the_distance_alone() -> None:
    x = random_heads(2)
    near = rope(x, torch.tensor([3, 10]), PUBLISHED)
    far = rope(x, torch.tensor([3 + 1024, 10 + 1024]), PUBLISHED)

    def score(both: torch.Tensor) -> torch.Tensor:
        return (both[0] * both[1]).sum(dim=-1)

    # Angles are float32: at 1034 rad each of the two is off by at most 2**-14.
    slope = x[0].norm(dim=-1) * x[1].norm(dim=-1)
    assert ((score(near) - score(far)).abs() <= 2 * 2**-14 * slope).all()


def test_frequencies_outside_the_ramp_are_kept_or_divided_by_the_factor() -> None:
    plain = frequencies(RotaryConfig.of(PLAIN))
    yarn = frequencies(RotaryConfig.of(PUBLISHED))

    # 4096 / (2 pi 32) = 20.4 tokens a radian at pair 10.5; 4096 / (2 pi) = 652 at pair 22.5.
    assert torch.equal(yarn[:11], plain[:11])
    assert torch.equal(yarn[23:], plain[23:] / 40)
    assert ((yarn[11:23] < plain[11:23]) & (yarn[11:23] > plain[11:23] / 40)).all()


def test_angles_are_products_rounded_to_float32() -> None:
    positions = torch.tensor([5000, 163_839])
    rotary = RotaryConfig.of(PUBLISHED)

    exact = torch.outer(positions.double(), frequencies(rotary).double())

    assert torch.equal(angles(positions, rotary), exact.float())


def test_the_softmax_scale_of_the_published_model_has_mscale_squared() -> None:
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "kv_lora_rank", "v_head_dim"),
        *("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"),
        "first_k_dense_replace",
    )
    fields = dict.fromkeys(names, 1)
    config = DeepseekV3Config.from_dict(
        {**fields, **PUBLISHED, "qk_nope_head_dim": 128, "routed_scaling_factor": 2.5}
    )

    m = 0.1 * math.log(40) + 1
    assert config.softmax_scale == 192**-0.5 * m**2
    assert config.rotary.rope_scaling is not None
    assert config.rotary.rope_scaling.rotary_factor == 1.0


def test_differing_mscales_stretch_cosine_and_sine() -> None:
    scaling = {**PUBLISHED["rope_scaling"], "mscale": 0.707}  # type: ignore[dict-item]
    x = random_heads(1)

    turned = rope(x, torch.tensor([9]), {**PUBLISHED, "rope_scaling": scaling})

    stretch = (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    ratio = turned.norm() / x.norm()
    assert abs(float(ratio) - stretch) <= 1e-14


def test_the_form_of_transformers_5_is_the_same_configuration() -> None:
    newer = {
        "qk_rope_head_dim": 64,
        "rope_parameters": {
            **PUBLISHED["rope_scaling"],  # type: ignore[dict-item]
            "rope_type": "yarn",
            "rope_theta": 10000,
        },
    }

    assert RotaryConfig.of(newer) == RotaryConfig.of(PUBLISHED)


def test_another_kind_of_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="'linear'"):
        RotaryConfig.of({**PLAIN, "rope_scaling": {"type": "linear", "factor": 2}})


@pytest.mark.parametrize("shape", [(3, 2, 32), (2, 2, 64), (3, 64)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rope takes x"):
        rope(torch.zeros(shape), torch.arange(3), PLAIN)
