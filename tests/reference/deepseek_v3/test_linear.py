"""Quantised linears against a plain emulation, written here without the reference's functions."""

import itertools
from collections.abc import Callable

import pytest
import torch

from nvfp4ref import fp8_block, nvfp4
from nvfp4ref.conventions import Convention
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import Fp8BlockLinear, LinearMode, Nvfp4Linear, PlainLinear
from nvfp4ref.deepseek_v3.moe import moe
from nvfp4ref.deepseek_v3.weights import StateDict, moe_weights

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nvfp4_linear(mode: LinearMode, rows: int = 6, columns: int = 48) -> Nvfp4Linear:
    weight = random(rows, columns).bfloat16().float() * 0.02
    scale = nvfp4.global_decode_scale(weight.abs().max(), Convention.MODELOPT)
    codes, block_scales = nvfp4.quantize(weight, scale, Convention.MODELOPT)
    return Nvfp4Linear(
        packed_codes=codes,
        block_scales=block_scales,
        global_decode_scale=scale,
        input_decode_scale=torch.tensor(4.0 / 2688),
        mode=mode,
    )


def round_to_e2m1(value: float) -> float:
    """The nearest magnitude, ties to the even code, by comparing all eight."""
    best = min(range(8), key=lambda code: (abs(abs(value) - MAGNITUDES[code]), code % 2))
    return MAGNITUDES[best] if value >= 0 else -MAGNITUDES[best]


def quantized_activations(x: torch.Tensor, input_scale: float) -> torch.Tensor:
    """Codes times block scales of each row, one block of 16 after the other, in float32 steps."""
    f32 = torch.float32
    encode = 1 / torch.tensor(input_scale, dtype=f32)
    sixth = 1 / torch.tensor(6.0, dtype=f32)
    out = torch.empty_like(x, dtype=torch.float64)
    for row, start in itertools.product(range(len(x)), range(0, x.shape[1], 16)):
        block = x[row, start : start + 16].to(f32)
        ideal = encode * (block.abs().max() * sixth)
        scale = ideal.clamp(max=448).to(torch.float8_e4m3fn).to(f32)
        factor = 1 / (scale * (1 / encode)) if block.any() else torch.tensor(0.0)
        codes = [round_to_e2m1(float(value)) for value in (block * factor).clamp(-6, 6)]
        out[row, start : start + 16] = torch.tensor(codes, dtype=torch.float64) * scale.double()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_stored_nvfp4_equals_a_plain_emulation(dtype: torch.dtype) -> None:
    linear = nvfp4_linear(LinearMode.STORED)
    x = random(9, 48, seed=1).bfloat16().to(dtype)
    x[2, 16:32] = 0  # a block of zeros
    x[3, :16] *= 100  # a block beyond the input scale saturates

    assert linear.input_decode_scale is not None
    a = quantized_activations(x.float(), float(linear.input_decode_scale))
    codes = torch.stack((linear.packed_codes & 15, linear.packed_codes >> 4), dim=-1).flatten(1)
    sign = 1 - 2 * (codes >> 3).double()
    magnitudes = torch.tensor(MAGNITUDES, dtype=torch.float64)[(codes & 7).long()]
    scales = linear.block_scales.float().double().repeat_interleave(16, dim=1)
    b = sign * magnitudes * scales
    alpha = linear.input_decode_scale * linear.global_decode_scale
    expected = (alpha.double() * (a @ b.T)).to(dtype)

    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weight_only_is_a_plain_linear_of_the_dequantised_weight(dtype: torch.dtype) -> None:
    linear = nvfp4_linear(LinearMode.WEIGHT_ONLY)
    x = random(9, 48, seed=1).to(dtype)

    assert torch.equal(linear(x), PlainLinear(linear.dequantized(dtype))(x))


def test_a_weight_without_input_scale_quantises_no_activations() -> None:
    stored = nvfp4_linear(LinearMode.STORED)
    x = random(3, 48, seed=1)
    without = Nvfp4Linear(
        packed_codes=stored.packed_codes,
        block_scales=stored.block_scales,
        global_decode_scale=stored.global_decode_scale,
        mode=LinearMode.STORED,
    )

    assert torch.equal(without(x), nvfp4_linear(LinearMode.WEIGHT_ONLY)(x))
    assert not torch.equal(without(x), stored(x))


def test_an_awq_scale_multiplies_the_input_first() -> None:
    stored = nvfp4_linear(LinearMode.STORED)
    x = random(3, 48, seed=1)
    awq = Nvfp4Linear(
        packed_codes=stored.packed_codes,
        block_scales=stored.block_scales,
        global_decode_scale=stored.global_decode_scale,
        input_decode_scale=stored.input_decode_scale,
        pre_quant_scale=torch.linspace(0.5, 2, 48),
    )

    assert torch.equal(awq(x), stored(x * torch.linspace(0.5, 2, 48)))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_stored_fp8_equals_a_loop_over_blocks(power_of_two: bool) -> None:
    weight, scale_inv = fp8_block.quantize(random(200, 300) * 0.02)
    x = random(4, 300, seed=1)
    linear = Fp8BlockLinear(
        weight=weight, weight_scale_inv=scale_inv, power_of_two_scales=power_of_two
    )

    expected = torch.zeros(4, 200, dtype=torch.float64)
    for row, start in itertools.product(range(4), range(0, 300, 128)):
        block = x[row, start : start + 128]
        scale = block.abs().max().clamp(min=1e-4) / 448
        if power_of_two:
            scale = 2 ** torch.log2(scale).ceil()
        codes = (block / scale).to(torch.float8_e4m3fn).double()
        for n in range(200):
            dot = codes @ weight[n, start : start + 128].double()
            expected[row, n] += dot * scale.double() * scale_inv[n // 128, start // 128].double()

    # The block sums are exact; adding three of them in another order moves float64 alone.
    assert ((linear(x) - expected).abs() <= 2**-23 * expected.abs() + 1e-14).all()


def test_an_expert_is_computed_for_its_own_tokens_and_weighted(
    odd_config: DeepseekV3Config, random_tensors: Callable[..., dict[str, torch.Tensor]]
) -> None:
    tensors = {name: tensor.double() for name, tensor in random_tensors(odd_config).items()}
    x = random(10, odd_config.hidden_size, seed=4).double()
    seen: dict[str, torch.Tensor] = {}
    prefix = "model.layers.1.mlp"

    weights = moe_weights(StateDict(tensors), prefix, odd_config)
    actual = moe(x, weights, odd_config, record=seen.__setitem__)

    def mlp(v: torch.Tensor, name: str) -> torch.Tensor:
        gate, up, down = (tensors[f"{name}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        g = v @ gate.T
        return (g / (1 + (-g).exp()) * (v @ up.T)) @ down.T

    expected = mlp(x, f"{prefix}.shared_experts")
    for token, slot in itertools.product(range(10), range(odd_config.num_experts_per_tok)):
        expert = int(seen["router_experts"][token, slot])
        weight = seen["router_weights"][token, slot]
        expected[token] += weight * mlp(x[token], f"{prefix}.experts.{expert}")
    assert float((actual - expected).norm() / expected.norm()) < 1e-14


def test_forced_experts_replace_the_choice_and_keep_the_weights_of_the_router(
    odd_config: DeepseekV3Config, random_tensors: Callable[..., dict[str, torch.Tensor]]
) -> None:
    tensors = random_tensors(odd_config)
    x = random(10, odd_config.hidden_size, seed=4)
    weights = moe_weights(StateDict(tensors), "model.layers.1.mlp", odd_config)
    free: dict[str, torch.Tensor] = {}
    forced: dict[str, torch.Tensor] = {}

    expected = moe(x, weights, odd_config, record=free.__setitem__)
    same = moe(x, weights, odd_config, free["router_experts"], forced.__setitem__)
    other = moe(x, weights, odd_config, (free["router_experts"] + 1) % 12)

    assert torch.equal(same, expected)
    assert torch.equal(forced["router_weights"], free["router_weights"])
    assert not torch.equal(other, expected)
