"""Fused activations: the values they quantise."""

import math

import pytest
import torch

from nvfp4ref import nvfp4
from nvfp4ref.conventions import Convention
from nvfp4ref.fused import (
    add_residual,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)

SCALE = torch.tensor(0.001)


@pytest.mark.parametrize("gate", [-30.0, -1.0, 0.0, 0.5, 8.0])
def test_silu_mul_is_the_formula(gate: float) -> None:
    value = silu_mul(torch.tensor([gate]), torch.tensor([3.0])).item()

    assert value == pytest.approx(3 * gate / (1 + math.exp(-gate)), rel=2**-50)


def test_rms_norm_is_the_formula() -> None:
    x, weight = torch.tensor([[3.0, -4.0]]), torch.tensor([2.0, 0.5])

    values = rms_norm(x, weight, 0.5)

    root = math.sqrt((9 + 16) / 2 + 0.5)
    assert values.tolist()[0] == pytest.approx([6 / root, -2 / root], rel=2**-50)


def test_silu_mul_quantize_quantises_the_rounded_product() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 3, 32, generator=generator)

    codes, scales = silu_mul_quantize(gate, up, SCALE, Convention.ENGINE)

    expected = nvfp4.quantize(silu_mul(gate, up).float(), SCALE, Convention.ENGINE)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales.view(torch.uint8), expected[1].view(torch.uint8))


def test_the_norm_is_of_the_rounded_sum() -> None:
    x = torch.full((1, 16), 1.0, dtype=torch.bfloat16)
    residual = torch.full((1, 16), 2.0**-9, dtype=torch.bfloat16)
    weight = torch.ones(16, dtype=torch.bfloat16)

    codes, scales, summed = rms_norm_quantize(
        x, weight, 0.0, SCALE, residual, convention=Convention.ENGINE
    )

    assert torch.equal(summed, add_residual(x, residual))
    assert torch.equal(summed, x), "1 + 2**-9 is a tie in bfloat16 and goes to the even 1"
    plain = rms_norm_quantize(summed, weight, 0.0, SCALE, convention=Convention.ENGINE)
    assert torch.equal(codes, plain[0])
    assert torch.equal(scales.view(torch.uint8), plain[1].view(torch.uint8))


def test_without_a_residual_none_is_returned() -> None:
    x = torch.ones(1, 16)

    assert len(rms_norm_quantize(x, x[0], 1e-6, SCALE, convention=Convention.ENGINE)) == 2
