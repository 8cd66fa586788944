"""The bound itself: no producer's weight is ever beyond it, and no wrong code is ever within.

Weights are drawn with tails, outliers, dead rows and zeros, in every dtype; block scales come from
the amax, from a search for the least squared error, or from the better of 4-over-6's two; codes
from every convention under them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nvfp4ref import e2m1, e4m3, nvfp4
from nvfp4ref.conventions import Convention
from nvfp4ref.packing import pack

ROWS, COLUMNS = 24, 64
ZONE = 2.0**-20  # of `audit.numbers`: where reciprocals and orders of rounding may decide

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SEARCHES = ("amax", "least squares", "4-over-6")

seeds = st.integers(0, 2**32 - 1)
several = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def draw_weight(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw a weight of some spread and shape of tail."""
    generator = torch.manual_seed(seed)
    x = torch.randn(ROWS, COLUMNS, generator=generator)
    tail = float(torch.rand((), generator=generator)) * 2 + 0.5
    x = x.sign() * x.abs() ** tail
    x *= 2.0 ** torch.randint(-8, 3, (), generator=generator)
    blocks = torch.randint(-6, 1, (ROWS, COLUMNS // 16), generator=generator)
    x *= 2.0 ** blocks.repeat_interleave(16, 1)
    x[1] = 0
    x[2, ::5] = -0.0
    x[3, 7] *= 30
    return x.to(dtype)


def search(x: torch.Tensor, decode: torch.Tensor, scales: torch.Tensor, how: str) -> torch.Tensor:
    """Choose bytes of block scales [M, C], from those that the amax gives."""
    if how == "amax":
        return scales
    byte = scales.int()
    choices = [byte + step for step in range(-6, 3)]
    if how == "4-over-6":
        amax = x.double().reshape(*scales.shape, 16).abs().amax(-1)
        choices = [
            e4m3.encode((amax / top / decode.double()).float(), e4m3.Overflow.SATURATE).int()
            for top in (6, 4)
        ]
    best, least = scales, torch.full(scales.shape, torch.inf, dtype=torch.float64)
    for choice in choices:
        made = choice.clamp(1, 0x7E).to(torch.uint8)
        units = e4m3.decode(made).double() * decode.double()
        blocks = x.double().reshape(*scales.shape, 16)
        codes = e2m1.encode((blocks / units.unsqueeze(-1)).float())
        error = (e2m1.decode(codes).double() * units.unsqueeze(-1) - blocks).square().sum(-1)
        better = (error < least) & (amax_of(x, scales) > 0) & (scales > 0)
        best, least = torch.where(better, made, best), torch.where(better, error, least)
    return best


def amax_of(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return x.double().reshape(*scales.shape, 16).abs().amax(-1)


@pytest.fixture
def produced(audited: Callable[..., Any]) -> Callable[..., Any]:
    """Quantise as a producer that searches would, change codes if asked, and audit."""

    def make(
        x: torch.Tensor,
        convention: Convention,
        how: str,
        change: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> Any:
        over = 448 / 256 if how == "4-over-6" else 1
        decode = nvfp4.global_decode_scale(x.abs().amax(), convention) * over
        if convention is Convention.COMPRESSED_TENSORS:  # stores the other direction only
            decode = nvfp4.global_encode_scale(x.abs().amax(), convention).reciprocal()

        def searched(packed: torch.Tensor, scales: torch.Tensor) -> None:
            scales.copy_(search(x, decode, scales, how))
            codes = nvfp4.quantize_elements(
                x,
                scales.view(torch.float8_e4m3fn),
                decode,
                convention,
                global_encode_scale=decode.reciprocal(),
            )
            if change is not None:
                change(codes, scales)
            packed.copy_(pack(codes))

        return audited(x, convention, decode=decode, change=searched)

    return make


@pytest.mark.parametrize("how", SEARCHES)
@pytest.mark.parametrize("convention", Convention)
@several
@given(seed=seeds, dtype=st.sampled_from(DTYPES))
def test_no_producers_weight_is_beyond_the_bound(
    produced: Callable[..., Any],
    convention: Convention,
    how: str,
    seed: int,
    dtype: torch.dtype,
) -> None:
    found = produced(draw_weight(seed, dtype), convention, how).audit

    assert (found.counts["beyond"], found.counts["off"]) == (0, 0)
    assert (found.first_beyond, found.first_off) == (None, None)
    assert not found.is_strange


@pytest.mark.parametrize("how", SEARCHES)
@pytest.mark.parametrize("convention", Convention)
@several
@given(seed=seeds, dtype=st.sampled_from(DTYPES), data=st.data())
def test_one_wrong_code_is_always_seen_at_its_place(
    produced: Callable[..., Any],
    convention: Convention,
    how: str,
    seed: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    x = draw_weight(seed, dtype)
    row = data.draw(st.sampled_from([0, *range(3, ROWS)]))
    column = data.draw(st.integers(0, COLUMNS - 1))
    other = data.draw(st.integers(0, 15))
    was: list[int] = []

    def spoil(codes: torch.Tensor, scales: torch.Tensor) -> None:
        was.append(int(codes[row, column]))
        was.append(int(scales[row, column // 16]))
        codes[row, column] = other

    made = produced(x, convention, how, spoil)
    code, byte = was
    assume(byte)  # under a scale of zero every code means zero
    unit = float(e4m3.decode(torch.tensor(byte, dtype=torch.uint8))) * float(made.decode)
    assume(e2m1.MAGNITUDES[code & 7] != e2m1.MAGNITUDES[other & 7] or (code & 7 and code != other))
    assume(not _is_tie(float(x[row, column]), unit, code & 7, other & 7))
    found = made.audit

    assert found.wrong == 1
    assert {found.first_beyond, found.first_off} == {None, row * COLUMNS + column}


def _is_tie(value: float, unit: float, code: int, other: int) -> bool:
    """Whether either of two magnitudes is right, so that the other is no error."""
    low, high = sorted((code, other))
    middle = (e2m1.MAGNITUDES[low] + e2m1.MAGNITUDES[high]) / 2 * unit
    return high == low + 1 and abs(abs(value) - middle) <= 4 * ZONE * middle


def test_the_searches_differ_from_the_amax() -> None:
    """What is drawn and searched exercises what it says it does."""
    x = draw_weight(0, torch.float32)
    decode = nvfp4.global_decode_scale(x.abs().amax(), Convention.MODELOPT)
    scales = nvfp4.quantize_block_scales(x, decode, Convention.MODELOPT).view(torch.uint8)
    for how in SEARCHES[1:]:
        assert int((search(x, decode, scales, how) != scales).sum()) > scales.numel() // 8
