"""Each law of the products, layouts and decoders sees the fault that it is there for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nvfp4ref import e2m1, e4m3, fp8_block, layout, matmul, packing

Tensor = torch.Tensor
Failing = Callable[..., set[str]]


def _bytes(scales: Tensor) -> Tensor:
    return scales.contiguous().view(torch.uint8)


def _scales(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float8_e4m3fn)


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
