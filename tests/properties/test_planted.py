"""Each law sees the fault that it is there for: one planted computation for each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nvfp4ref import e2m1, e4m3, fp8_block, fused, layout, matmul, nvfp4, packing
from nvfp4ref.conventions import Convention
from nvfp4ref.deepseek_v3 import attention, rotary, routing

Tensor = torch.Tensor
Failing = Callable[..., set[str]]
ENGINE = Convention.ENGINE
MODELOPT = Convention.MODELOPT


def _bytes(scales: Tensor) -> Tensor:
    return scales.contiguous().view(torch.uint8)


def _scales(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float8_e4m3fn)


# quantize


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


# matmul


def neighbours_scale(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, alpha: Tensor, d: Any) -> Tensor:
    return matmul.matmul(a, _scales(_bytes(sa).roll(1, 1)), b, sb, alpha, d)


def swizzled_scales(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, alpha: Tensor, d: Any) -> Tensor:
    flat = _bytes(layout.swizzle(sb)).flatten()[: sb.numel()]
    return matmul.matmul(a, sa, b, _scales(flat.view(sb.shape)), alpha, d)


def e8m0_scales(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, alpha: Tensor, d: Any) -> Tensor:
    left = e2m1.decode(packing.unpack(a)) * _e8m0(sa)
    right = e2m1.decode(packing.unpack(b)) * _e8m0(sb)
    return (alpha * (left @ right.T)).to(d)


def _e8m0(scales: Tensor) -> Tensor:
    return torch.exp2(_bytes(scales).float() - 127).repeat_interleave(16, -1)


def nan_scale_is_480(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, alpha: Tensor, d: Any) -> Tensor:
    kept = [_scales(torch.where((_bytes(s) & 0x7F) == 0x7F, 0x7E, _bytes(s))) for s in (sa, sb)]
    return matmul.matmul(a, kept[0], b, kept[1], alpha, d)


def tail_dropped(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, alpha: Tensor, d: Any) -> Tensor:
    blocks = sa.shape[1] // 4 * 4 or sa.shape[1]
    return matmul.matmul(
        a[:, : blocks * 8],
        _scales(_bytes(sa)[:, :blocks]),
        b[:, : blocks * 8],
        _scales(_bytes(sb)[:, :blocks]),
        alpha,
        d,
    )


def alpha_squared(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, alpha: Tensor, d: Any) -> Tensor:
    return matmul.matmul(a, sa, b, sb, alpha * alpha.abs(), d)


def bfloat16_sums(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, alpha: Tensor, d: Any) -> Tensor:
    order = matmul.Accumulation(chunk=16, dtype=torch.bfloat16)
    return matmul.matmul(a, sa, b, sb, alpha, d, order=order)


def float16_sums(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, alpha: Tensor, d: Any) -> Tensor:
    product = matmul.exact(a, sa, b, sb).value
    return (product.half().float() * alpha).to(d)


def one_in_two_thousand(
    a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, alpha: Tensor, d: Any
) -> Tensor:
    return matmul.matmul(a, sa, b, sb, alpha * 1.0005, d)


MATMULS = {
    neighbours_scale: "one-live-block",
    swizzled_scales: "scales-read-back",
    e8m0_scales: "every-scale",
    nan_scale_is_480: "nan-scales",
    tail_dropped: "every-k",
    alpha_squared: "alpha-is-applied-once",
    bfloat16_sums: "exact-sums-are-exact",
    float16_sums: "large-sums",
    one_in_two_thousand: "exact-sums-are-exact",
}


@pytest.mark.parametrize(
    ("kernel", "law"), MATMULS.items(), ids=lambda value: getattr(value, "__name__", value)
)
def test_a_wrong_product_breaks_the_law_that_is_there_for_it(
    failing: Failing, kernel: Callable[..., Any], law: str
) -> None:
    assert failing("matmul", kernel, only=law) == {law}


def test_a_product_of_the_next_expert_is_seen(failing: Failing) -> None:
    def kernel(
        a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, alpha: Tensor, o: Tensor, d: Any
    ) -> Tensor:
        return matmul.grouped_matmul(
            a, sa, b.roll(1, 0), _scales(_bytes(sb).roll(1, 0)), alpha, o, d
        )

    assert "exact-sums-are-exact" in failing("grouped_matmul", kernel)


def test_one_alpha_for_all_experts_is_seen(failing: Failing) -> None:
    def kernel(
        a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, alpha: Tensor, o: Tensor, d: Any
    ) -> Tensor:
        return matmul.grouped_matmul(a, sa, b, sb, alpha[:1].expand_as(alpha), o, d)

    assert "exact-sums-are-exact" in failing("grouped_matmul", kernel)


# layouts and decoders


def test_scales_left_linear_are_seen(failing: Failing) -> None:
    def kernel(scales: Tensor) -> Tensor:
        flat = torch.zeros(layout.swizzled_size(*scales.shape), dtype=torch.uint8)
        flat[: scales.numel()] = _bytes(scales).flatten()
        return flat

    assert "scales-that-name-their-place" in failing("swizzle", kernel)


def test_padding_that_is_not_zero_is_seen(failing: Failing) -> None:
    def kernel(scales: Tensor) -> Tensor:
        flat = torch.full((layout.swizzled_size(*scales.shape),), 0x7E, dtype=torch.uint8)
        flat[layout.offsets_128x4(*scales.shape).flatten()] = _bytes(scales).flatten()
        return flat

    assert failing("swizzle", kernel) == {"every-shape", "scales-that-name-their-place"}


def test_tiles_read_with_unpadded_columns_are_seen(failing: Failing) -> None:
    def kernel(flat: Tensor, rows: int, columns: int) -> Tensor:
        r, c = torch.arange(rows).unsqueeze(1), torch.arange(columns).unsqueeze(0)
        tile = (r // 128) * max(columns // 4, 1) + c // 4
        places = tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
        return _scales(_bytes(flat)[places.clamp(max=flat.numel() - 1)])

    assert "every-shape" in failing("unswizzle", kernel)


@pytest.mark.parametrize(
    "wrong", [0.5, 2.0, "subnormal", "nan"], ids=["half", "twice", "subnormal", "nan"]
)
def test_a_wrong_scale_decoder_is_seen(failing: Failing, wrong: float | str) -> None:
    def kernel(codes: Tensor, scales: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        raw = _bytes(scales)
        values = e4m3.decode(raw)
        if wrong == "subnormal":
            values = torch.where((raw > 0) & (raw < 8), (8 + raw) * 2.0**-10, values)
        elif wrong == "nan":
            values = values.nan_to_num(480.0)
        else:
            values = values * float(wrong)
        step = (values * g).repeat_interleave(16, -1)
        return (e2m1.decode(packing.unpack(codes)) * step).to(dtype)

    assert "every-code-under-every-scale" in failing("dequantize", kernel)


def test_a_product_formed_in_bfloat16_is_seen(failing: Failing) -> None:
    def kernel(codes: Tensor, scales: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        step = (e4m3.decode(scales) * g).bfloat16().repeat_interleave(16, -1)
        return (e2m1.decode(packing.unpack(codes)).bfloat16() * step).to(dtype)

    assert "every-code-under-every-scale" in failing("dequantize", kernel)


def test_fp8_tiles_of_equal_shares_are_seen(failing: Failing) -> None:
    """576 rows over 5 scales are tiles of 128, not of 116."""

    def kernel(w: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
        rows = -(-w.shape[0] // scale_inv.shape[0])
        spread = scale_inv.repeat_interleave(rows, 0)[: w.shape[0]]
        spread = spread.repeat_interleave(128, 1)[:, : w.shape[1]]
        return (e4m3.decode(w) * spread).to(dtype)

    assert "scales-that-name-their-tile" in failing("dequantize_fp8_block", kernel)


def test_fp8_divided_by_scale_inv_is_seen(failing: Failing) -> None:
    def kernel(w: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
        return fp8_block.dequantize(w, 1 / scale_inv, dtype)

    assert "every-shape" in failing("dequantize_fp8_block", kernel)


# fused quantisers


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


# rope, route, attention


def test_halves_for_pairs_are_seen(failing: Failing) -> None:
    def kernel(x: Tensor, positions: Tensor, config: Any) -> Tensor:
        pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        turned = rotary.rope(pairs, positions, config)
        return turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    assert "one-live-element" in failing("rope", kernel)


def test_a_position_off_by_one_is_seen(failing: Failing) -> None:
    def kernel(x: Tensor, positions: Tensor, config: Any) -> Tensor:
        return rotary.rope(x, positions + 1, config)

    assert "position-zero-is-the-identity" in failing("rope", kernel)


def test_frequencies_that_are_not_stretched_are_seen(failing: Failing) -> None:
    def kernel(x: Tensor, positions: Tensor, config: Any) -> Tensor:
        return rotary.rope(x, positions, {**config, "rope_scaling": None})

    assert "every-kind-of-position" in failing("rope", kernel)


def _route(change: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def kernel(
        logits: Tensor, bias: Tensor, groups: int, kept: int, top_k: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        experts = routing.choose(change(logits, bias), groups, kept, top_k)
        return experts, routing.weigh(logits, experts, scaling)

    return kernel


def test_a_bias_in_bfloat16_is_seen(failing: Failing) -> None:
    kernel = _route(lambda logits, bias: logits.sigmoid() + bias.bfloat16().float())

    assert "biases-choose-and-do-not-weigh" in failing("route", kernel)


def test_softmax_scores_are_seen(failing: Failing) -> None:
    kernel = _route(lambda logits, bias: logits.softmax(-1) + bias)

    assert "biases-choose-and-do-not-weigh" in failing("route", kernel)


def test_groups_masked_with_zero_are_seen(failing: Failing) -> None:
    def kernel(
        logits: Tensor, bias: Tensor, groups: int, kept: int, top_k: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        scores = routing.choice_scores(logits, bias)
        grouped = scores.view(len(scores), groups, scores.shape[1] // groups)
        best = grouped.topk(2, dim=-1).values.sum(-1)
        order = best.sort(-1, descending=True, stable=True).indices[:, :kept]
        open_groups = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, order, True)
        masked = torch.where(open_groups.unsqueeze(-1), grouped, 0.0).flatten(1)
        experts = routing.choose(masked, 1, 1, top_k)
        return experts, routing.weigh(logits, experts, scaling)

    assert "biases-choose-and-do-not-weigh" in failing("route", kernel)


def test_weights_with_the_bias_are_seen(failing: Failing) -> None:
    def kernel(
        logits: Tensor, bias: Tensor, groups: int, kept: int, top_k: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        scores = routing.choice_scores(logits, bias)
        experts = routing.choose(scores, groups, kept, top_k)
        weights = scores.gather(-1, experts.long())
        return experts, weights / (weights.sum(-1, keepdim=True) + 1e-20) * scaling

    assert "biases-choose-and-do-not-weigh" in failing("route", kernel)


def test_ties_to_the_higher_index_are_seen(failing: Failing) -> None:
    def kernel(
        logits: Tensor, bias: Tensor, groups: int, kept: int, top_k: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        mirrored = routing.route(logits.flip(-1), bias.flip(-1), groups, kept, top_k, scaling)
        return logits.shape[1] - 1 - mirrored[0], mirrored[1]

    assert failing("route", kernel) == {"ties-go-to-the-lower-index"}


@pytest.mark.parametrize("factor", [1.01, 192**-0.5 / 0.1352337788608801], ids=["1 %", "no m"])
def test_another_softmax_scale_is_seen(failing: Failing, factor: float) -> None:
    def kernel(*arguments: Any) -> Tensor:
        return attention.mla_decode(*arguments[:-1], arguments[-1] * factor)

    assert "every-length" in failing("mla_decode", kernel)


def test_a_token_too_many_is_seen(failing: Failing) -> None:
    def kernel(*arguments: Any) -> Tensor:
        latent, table, lengths = arguments[2], arguments[4], arguments[5]
        longer = (lengths + 1).clamp(max=table.shape[1] * latent.shape[1])
        return attention.mla_decode(*arguments[:5], longer, arguments[6])

    assert "one-token-is-returned" in failing("mla_decode", kernel)


def test_a_score_without_the_rotary_part_is_seen(failing: Failing) -> None:
    def kernel(q: Tensor, rope: Tensor, *rest: Any) -> Tensor:
        return attention.mla_decode(q, torch.zeros_like(rope), *rest)

    assert "every-length" in failing("mla_decode", kernel)
