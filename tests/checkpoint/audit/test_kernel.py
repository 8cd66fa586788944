"""The audit's arithmetic held to the reference's, on every kind of block there is."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nvfp4check.checkpoint.audit.by_fp8 import by_way_of_fp8
from nvfp4check.checkpoint.audit.kernel import encode_e2m1, encode_e4m3, jit, round_to
from nvfp4check.checkpoint.audit.sources import frozen
from nvfp4ref import e2m1, e4m3, fp8_block, nvfp4
from nvfp4ref.conventions import Convention


@jit
def _e4m3_of(values: Any, out: Any) -> None:
    for i in range(values.size):
        out[i] = encode_e4m3(values[i])


@jit
def _e2m1_of(values: Any, out: Any) -> None:
    for i in range(values.size):
        out[i] = encode_e2m1(values[i])


@jit
def _rounded(values: Any, dtype: int, out: Any) -> None:
    for i in range(values.size):
        out[i] = round_to(values[i], dtype)


def _around(points: tuple[float, ...]) -> torch.Tensor:
    exact = torch.tensor(points)
    infinity = torch.tensor(torch.inf)
    return torch.cat([exact, exact.nextafter(infinity), exact.nextafter(torch.zeros(()))])


def _every_bfloat16() -> torch.Tensor:
    return torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float()


def test_e4m3_bytes_are_the_references_at_every_midpoint_and_every_bfloat16() -> None:
    values = torch.cat([_every_bfloat16(), _around(e4m3.MIDPOINTS), _around(e4m3.MAGNITUDES)])
    out = np.empty(values.numel(), np.uint8)
    _e4m3_of(values.numpy(), out)

    assert torch.equal(torch.from_numpy(out), e4m3.encode(values, e4m3.Overflow.SATURATE))


def test_e2m1_codes_are_the_references_at_every_midpoint_and_every_bfloat16() -> None:
    values = torch.cat([_every_bfloat16(), _around(e2m1.MIDPOINTS), _around(e2m1.MAGNITUDES)])
    out = np.empty(values.numel(), np.uint8)
    _e2m1_of(values.numpy(), out)

    assert torch.equal(torch.from_numpy(out), e2m1.encode(values))


@pytest.mark.parametrize(("number", "dtype"), [(1, torch.bfloat16), (2, torch.float16)])
def test_rounding_to_a_half_is_torchs(number: int, dtype: torch.dtype) -> None:
    generator = torch.manual_seed(0)
    values = torch.randint(0, 0x477FE000, (200_000,), generator=generator, dtype=torch.int32)
    values = values.view(torch.float32)
    out = np.empty(values.numel(), np.float32)
    _rounded(values.numpy(), number, out)

    assert torch.equal(torch.from_numpy(out), values.to(dtype).float())


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", [(128, 128), (200, 144), (1, 16), (130, 300)])
def test_by_way_of_fp8_is_the_references_quantise_and_dequantise(
    shape: tuple[int, int], ue8m0: bool
) -> None:
    x = torch.randn(shape, generator=torch.manual_seed(1)) * torch.logspace(-6, 0, shape[1])
    x[:, :16] = 0
    x[0, 0] = -0.0
    x = x.bfloat16()
    kind = fp8_block.ScaleFormat.UE8M0 if ue8m0 else fp8_block.ScaleFormat.FLOAT32
    expected = fp8_block.dequantize(*fp8_block.quantize(x, kind), torch.bfloat16)
    words = x.view(torch.int16).numpy().view(np.uint16)
    out = np.empty_like(words)
    by_way_of_fp8(frozen(words), ue8m0, out)

    assert np.array_equal(out, expected.view(torch.int16).numpy().view(np.uint16))


def _gauss(dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(48, 256, generator=torch.manual_seed(2)) * 0.02).to(dtype)


def _ties(dtype: torch.dtype) -> torch.Tensor:
    """Quarters under scales that are powers of two or nearly so: most elements lie on a tie."""
    quarters = torch.randint(-24, 25, (48, 256), generator=torch.manual_seed(3)) / 4
    return (quarters * 2.0 ** torch.arange(-8, 8).repeat_interleave(3).unsqueeze(1)).to(dtype)


def _tiny(dtype: torch.dtype) -> torch.Tensor:
    """Blocks from the largest scale down through subnormal ones to scales that round to zero."""
    x = 16 * torch.randn(48, 256, generator=torch.manual_seed(4))
    blocks = 2.0 ** (-32 * torch.rand(48, 16, generator=torch.manual_seed(5)))
    return (x * blocks.repeat_interleave(16, 1)).to(dtype)


def _zeros(dtype: torch.dtype) -> torch.Tensor:
    """Zeros of both signs, alone, in blocks and in rows."""
    x = _gauss(torch.float32)
    x[5] = 0.0
    x[6] = -0.0
    x[7, ::3] = 0.0
    x[8, ::3] = -0.0
    x[9, 16:32] = 0.0
    return x.to(dtype)


_DATA: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "gauss": _gauss,
    "ties": _ties,
    "tiny": _tiny,
    "zeros": _zeros,
}


def _differences(made: Any, convention: Convention) -> tuple[int, int]:
    """Count what a convention makes otherwise, by the reference."""
    scales = nvfp4.quantize_block_scales(
        made.x, made.decode, convention, global_encode_scale=made.encode
    )
    codes = nvfp4.quantize_elements(
        made.x, made.scales, made.decode, convention, global_encode_scale=made.encode
    )
    unlike = scales.view(torch.uint8) != made.scales.view(torch.uint8)
    return int(unlike.sum()), int((codes != made.codes).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("convention", Convention)
def test_no_convention_is_wrong_and_what_every_other_makes_otherwise_is_counted_exactly(
    audited: Callable[..., Any], convention: Convention, dtype: torch.dtype
) -> None:
    x = torch.cat([make(dtype) for make in _DATA.values()])
    made = audited(x, convention)
    found = made.audit

    for other in Convention:
        differs = found.scale_differs[other], found.code_differs[other]
        assert differs == _differences(made, other), other
    assert found.differs(convention) == 0
    assert (found.wrong, found.is_strange) == (0, False)
    assert (found.first_off, found.first_beyond) == (None, None)
    assert found.counts["searched"] == found.counts["unexplained"] == 0
    assert found.amax == float(x.abs().max())


@pytest.mark.parametrize("amax", [1e-37, 3e36])
def test_global_scales_at_the_ends_of_float32_are_left_to_the_reference(
    audited: Callable[..., Any], amax: float
) -> None:
    x = torch.randn(16, 64, generator=torch.manual_seed(6))
    made = audited(x * (amax / x.abs().max()), Convention.MODELOPT_0_39)

    assert made.audit.wrong == 0
    assert made.audit.differs("modelopt-0.39") == 0


def test_codes_are_nearest_by_exact_arithmetic(audited: Callable[..., Any]) -> None:
    made = audited(_ties(torch.bfloat16), Convention.ENGINE)
    units = e4m3.decode(made.scales).double().repeat_interleave(16, 1) * made.decode.double()
    magnitudes = made.x.double().abs()
    table = torch.tensor(e2m1.MAGNITUDES, dtype=torch.float64)
    distances = (magnitudes.unsqueeze(-1) - table * units.unsqueeze(-1)).abs()
    stored = distances.gather(-1, (made.codes % 8).long().unsqueeze(-1)).squeeze(-1)

    assert made.audit.nearest == int((stored == distances.amin(-1)).sum())
    assert made.audit.counts["near_ties"] > 0


def _step(codes: torch.Tensor, _scales: torch.Tensor) -> None:
    """Turn a magnitude of 2, which stands for 1.75 to 2.5, into 1.5."""
    row, column = ((codes & 7) == 4).nonzero()[0].tolist()
    codes[row, column] -= 1


def test_a_code_one_step_away_is_off_and_not_beyond(audited: Callable[..., Any]) -> None:
    found = audited(_gauss(torch.bfloat16), Convention.MODELOPT, change=_step).audit

    assert (found.counts["off"], found.counts["beyond"]) == (1, 0)
    assert 0.25 <= found.worst <= 1.0


def test_a_flipped_sign_is_beyond_at_its_place(audited: Callable[..., Any]) -> None:
    def flip(codes: torch.Tensor, _scales: torch.Tensor) -> None:
        codes[3, 5] = (codes[3, 5] & 0xF0) | 0x0F
        codes[3, 6] |= 0x77

    made = audited(_gauss(torch.bfloat16), Convention.MODELOPT, change=flip)
    found = made.audit

    assert found.counts["beyond"] >= 1
    assert found.first_beyond is not None
    assert found.first_beyond // 256 == 3


def test_scales_found_by_search_are_legal(audited: Callable[..., Any]) -> None:
    x = _gauss(torch.bfloat16)
    decode = nvfp4.global_decode_scale(x.abs().amax(), Convention.MODELOPT)
    scales = nvfp4.quantize_block_scales(x, decode, Convention.MODELOPT).view(torch.uint8)
    searched = torch.where(torch.arange(16) % 2 == 0, scales - 2, scales)
    packed = nvfp4.packing.pack(
        nvfp4.quantize_elements(x, searched.view(torch.float8_e4m3fn), decode, Convention.MODELOPT)
    )

    def change(codes: torch.Tensor, stored: torch.Tensor) -> None:
        codes.copy_(packed)
        stored.copy_(searched)

    found = audited(x, Convention.MODELOPT, change=change).audit

    assert found.wrong == 0
    assert found.counts["searched"] > 48 * 7
    assert found.counts["clipped"] > 0


def test_scales_that_bring_the_largest_element_to_four_are_told(
    audited: Callable[..., Any],
) -> None:
    x = _gauss(torch.bfloat16)
    decode = x.abs().amax().float() / (6 * 256)
    four = (x.view(48, 16, 16).abs().amax(-1).float() / (4 * decode)).to(torch.float8_e4m3fn)
    packed = nvfp4.packing.pack(nvfp4.quantize_elements(x, four, decode, Convention.MODELOPT))

    def change(codes: torch.Tensor, stored: torch.Tensor) -> None:
        codes.copy_(packed)
        stored.copy_(four.view(torch.uint8))

    found = audited(x, Convention.MODELOPT, decode=decode, change=change).audit

    assert found.wrong == 0
    assert found.counts["over_four"] == found.counts["searched"] == found.blocks


def test_a_global_scale_too_small_for_the_tensor_is_beyond(audited: Callable[..., Any]) -> None:
    x = _gauss(torch.bfloat16)
    x[40, 100] = 1.0
    small = nvfp4.global_decode_scale(x.abs().amax() / 2, Convention.MODELOPT)
    found = audited(x, Convention.MODELOPT, decode=small).audit

    assert found.counts["beyond"] == 1
    assert found.first_beyond == 40 * 256 + 100
    assert found.worst == pytest.approx(6, rel=2.0**-7)  # 12 in the base, 6 in the code; bf16


@pytest.mark.parametrize("byte", [0x7F, 0xFF, 0xB8])
def test_blocks_whose_scale_is_no_number_are_left_to_other_rules(
    audited: Callable[..., Any], byte: int
) -> None:
    def spoil(_codes: torch.Tensor, scales: torch.Tensor) -> None:
        scales[2, 3] = byte

    found = audited(_gauss(torch.bfloat16), Convention.MODELOPT, change=spoil).audit

    assert (found.counts["void"], found.wrong) == (1, 0)


def test_a_scale_of_zero_over_a_live_block_is_beyond(audited: Callable[..., Any]) -> None:
    def lose(_codes: torch.Tensor, scales: torch.Tensor) -> None:
        scales[2, 3] = 0

    found = audited(_gauss(torch.bfloat16), Convention.MODELOPT, change=lose).audit

    assert found.counts["beyond"] == 16
    assert found.first_beyond == 2 * 256 + 48


def test_elements_of_the_base_that_are_no_numbers_are_counted(audited: Callable[..., Any]) -> None:
    x = _gauss(torch.float32)
    scale = nvfp4.global_decode_scale(x.abs().amax(), Convention.MODELOPT)
    spoilt = x.clone()
    spoilt[1, 2], spoilt[1, 3] = torch.nan, torch.inf
    found = audited(
        x, Convention.MODELOPT, decode=scale,
        base={"model.layers.0.mlp.down_proj.weight": spoilt},
    ).audit  # fmt: skip

    assert (found.counts["not_finite"], found.wrong) == (2, 0)
    assert found.amax == float(x.abs().max())
