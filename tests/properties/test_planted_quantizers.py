"""Each law of the quantisers sees the fault that it is there for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nvfp4ref import e2m1, e4m3, fused, nvfp4, packing
from nvfp4ref.conventions import Convention

Tensor = torch.Tensor
Failing = Callable[..., set[str]]
ENGINE = Convention.ENGINE
MODELOPT = Convention.MODELOPT


def _bytes(scales: Tensor) -> Tensor:
    return scales.contiguous().view(torch.uint8)


def _scales(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float8_e4m3fn)


def swapped_nibbles(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = nvfp4.quantize(x, g, MODELOPT)
    return (codes >> 4) | (codes << 4), scales


def ties_away(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    scales = nvfp4.quantize_block_scales(x, g, MODELOPT)
    step = e4m3.decode(scales).repeat_interleave(16, -1) * g
    ratio = (x.float() / step).abs().nan_to_num(0.0)
    codes = torch.bucketize(ratio, torch.tensor(e2m1.MIDPOINTS), right=True).to(torch.uint8)
    right = nvfp4.quantize_elements(x, scales, g, MODELOPT)
    return packing.pack(torch.where(step == 0, right, codes | (right & 8))), scales


def rounded_scale_not_used(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    _, scales = nvfp4.quantize(x, g, MODELOPT)
    amax = x.float().view(*scales.shape, 16).abs().amax(-1)
    step = (amax / 6).clamp(min=1e-30).repeat_interleave(16, -1)
    return packing.pack(e2m1.encode((x.float() / step).nan_to_num(0.0))), scales


def flushed_subnormal_scales(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = nvfp4.quantize(x, g, MODELOPT)
    raw = _bytes(scales)
    return codes, _scales(torch.where(raw < 8, 0, raw))


def clamped_at_240(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = nvfp4.quantize(x, g, MODELOPT)
    raw = _bytes(scales)
    return codes, _scales(torch.where((raw > 0x77) & (raw < 0x7F), 0x77, raw))


def lost_negative_zero(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = nvfp4.quantize(x, g, MODELOPT)
    plain = packing.unpack(codes)
    return packing.pack(torch.where(plain == 8, 0, plain)), scales


def amax_of_two_blocks(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    paired = x.shape[1] // 32 * 32
    big = x.clone()
    if paired:
        amax = x[:, :paired].reshape(len(x), -1, 32).abs().amax(-1).repeat_interleave(2, -1)
        big[:, :paired:16] = amax
    scales = nvfp4.quantize_block_scales(big, g, MODELOPT)
    return packing.pack(nvfp4.quantize_elements(x, scales, g, MODELOPT)), scales


def last_block_dropped(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    short = x.clone()
    if x.shape[1] % 64:
        short[:, -16:] = 0
    return nvfp4.quantize(short, g, MODELOPT)


def double_rounded(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return nvfp4.quantize(x.bfloat16(), g, MODELOPT)


def batch_amax(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return nvfp4.quantize(x, g * (1 + 0.01 * len(x)), MODELOPT)


QUANTIZERS = {
    swapped_nibbles: "one-hot-elements",
    ties_away: "every-tie-and-its-neighbours",
    rounded_scale_not_used: "codes-are-the-conventions",
    flushed_subnormal_scales: "ends-of-the-range",
    clamped_at_240: "every-scale-tie-and-its-neighbours",
    lost_negative_zero: "codes-are-the-conventions",
    amax_of_two_blocks: "codes-are-the-conventions",
    last_block_dropped: "every-width",
    double_rounded: "every-tie-and-its-neighbours",
    batch_amax: "rows-are-independent",
}


@pytest.mark.parametrize(
    ("kernel", "law"), QUANTIZERS.items(), ids=lambda value: getattr(value, "__name__", value)
)
def test_a_wrong_quantiser_breaks_the_law_that_is_there_for_it(
    failing: Failing, kernel: Callable[..., Any], law: str
) -> None:
    assert failing("quantize", kernel, "modelopt", only=law) == {law}


def test_gate_and_up_exchanged_are_seen(failing: Failing) -> None:
    def kernel(gate: Tensor, up: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return fused.silu_mul_quantize(up, gate, g, ENGINE)

    assert "codes-are-within-the-activations-error" in failing(
        "silu_mul_quantize", kernel, "engine"
    )


def test_gelu_for_silu_is_seen(failing: Failing) -> None:
    def kernel(gate: Tensor, up: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.nn.functional.gelu(gate.double(), approximate="tanh") * up.double()
        return nvfp4.quantize(value.float(), g, ENGINE)

    assert failing("silu_mul_quantize", kernel, "engine") & {
        "codes-are-within-the-activations-error",
        "ends-of-the-sigmoid",
    }


def test_an_eps_outside_the_root_is_seen(failing: Failing) -> None:
    def kernel(
        x: Tensor, weight: Tensor, eps: float, g: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        summed = x if residual is None else fused.add_residual(x, residual)
        wide = summed.double()
        normed = wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps) * weight.double()
        out = nvfp4.quantize(normed.float().nan_to_num(0.0), g, ENGINE)
        return out if residual is None else (*out, summed)

    assert "sizes-and-eps" in failing("rms_norm_quantize", kernel, "engine")


def test_a_residual_that_is_not_returned_is_seen(failing: Failing) -> None:
    def kernel(
        x: Tensor, weight: Tensor, eps: float, g: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        out = fused.rms_norm_quantize(x, weight, eps, g, residual, convention=ENGINE)
        return out if residual is None else (*out[:2], residual)

    assert "codes-are-within-the-norms-error" in failing("rms_norm_quantize", kernel, "engine")
