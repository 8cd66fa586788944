"""Codes that may flip: the operand is the engine's, and what may become of it is bounded."""

from collections.abc import Callable

import pytest
import torch

from nvfp4check.forward.bounds import straddles
from nvfp4check.forward.bounds.arithmetic import (
    BOUNDED,
    DIRECTED_RANDOM,
    FRESH_BOUNDED,
    FRESH_RANDOM,
)
from nvfp4check.forward.bounds.uncertain import Uncertain
from nvfp4check.forward.exact import engine_operand
from nvfp4ref import e4m3
from nvfp4ref.deepseek_v3.cache import CacheFormat, LatentCache
from nvfp4ref.deepseek_v3.linear import quantize_fp8_activations
from nvfp4ref.fp8 import quantize_per_token

ENCODE = torch.tensor(448 * 6 / 5.0)
DECODE = 1 / ENCODE
CACHE_SCALE = 0.5


def activations(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).double()


def uncertain(x: torch.Tensor, relative: float) -> Uncertain:
    """x with an independent error of a relative size."""
    found = Uncertain.exactly(x, 1)
    found.variance[0, FRESH_RANDOM] = (relative * x).square()
    return found


def as_nvfp4(x: torch.Tensor) -> torch.Tensor:
    return engine_operand(x.float(), ENCODE) * float(DECODE)


def as_fp8(x: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    values, scales = quantize_fp8_activations(x.float(), power_of_two)
    return values.double() * scales.double().repeat_interleave(128, -1)[:, : x.shape[1]]


def as_fp8_tokens(x: torch.Tensor) -> torch.Tensor:
    values, scales = quantize_per_token(x)
    return values.double() * scales.double()


def in_cache(x: torch.Tensor) -> torch.Tensor:
    cache = LatentCache.empty(x.shape[1], 1, torch.float32, CacheFormat.FP8, CACHE_SCALE)
    return cache.extended(x.float(), x[:, :1].float()).read()[0].double()


FORMS: dict[
    str,
    tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[Uncertain], straddles.Quantised]],
] = {
    "nvfp4": (as_nvfp4, lambda x: straddles.nvfp4(x, ENCODE)),
    "fp8": (
        lambda x: as_fp8(x, False),
        lambda x: straddles.fp8(x, power_of_two_scales=False),
    ),
    "fp8-power-of-two": (
        lambda x: as_fp8(x, True),
        lambda x: straddles.fp8(x, power_of_two_scales=True),
    ),
    "fp8-per-token": (as_fp8_tokens, lambda x: straddles.fp8(x, width=x.value.shape[-1])),
    "cache": (in_cache, lambda x: straddles.e4m3(x, CACHE_SCALE)),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_operand_is_what_the_reference_makes_of_the_value(form: str) -> None:
    x = activations(20, 256, seed=1)
    x[0, :16] = 0

    plain, bounded = FORMS[form]

    # The reference rounds the scale, and the code times it, to float32; the bound is in float64.
    found = bounded(uncertain(x, 1e-7)).value.value
    assert torch.allclose(found, plain(x).double(), rtol=2 * 2**-24, atol=0)


@pytest.mark.parametrize("relative", [1e-7, 2e-3, 2e-2])
@pytest.mark.parametrize("form", FORMS)
def test_what_many_errors_make_of_a_row_stays_within_its_bound(form: str, relative: float) -> None:
    x = activations(24, 384, seed=2).float().double()
    plain, bounded = FORMS[form]
    found = bounded(uncertain(x, relative))
    ratios = []
    for seed in range(10):
        noise = relative * x * activations(24, 384, seed=100 + seed)
        moved = plain(x + noise) - found.value.value
        ratios.append((moved.norm(dim=-1) / found.value.bound[0]).nan_to_num(0.0))

    worst = torch.stack(ratios)
    assert float(worst.max()) <= 1
    if relative > 1e-6:  # and not by orders of magnitude
        assert float(worst.median()) > 0.06


@pytest.mark.parametrize("form", FORMS)
def test_values_without_error_have_no_straddling_codes_but_near_ties(form: str) -> None:
    x = activations(8, 256, seed=3).float().double()

    found = FORMS[form][1](Uncertain.exactly(x, 1))

    assert int(found.straddles.sum()) <= 1
    assert float(found.value.bound.max()) == 0 or int(found.straddles.sum()) == 1


def test_what_a_token_shares_moves_its_fp8_scales_alike_and_flips_no_code() -> None:
    x = activations(8, 256, seed=6).float().double()

    def shared(of: torch.Tensor) -> straddles.Quantised:
        found = Uncertain.exactly(of, 1)
        found.common[0, DIRECTED_RANDOM] = 1e-2**2
        return straddles.fp8(found)

    found, exact = shared(x), straddles.fp8(Uncertain.exactly(x, 1))
    moved = (as_fp8(x * 1.01, False) - found.value.value).norm(dim=-1)

    assert torch.equal(found.straddles, exact.straddles)
    roundings = 2 * 4 * 2**-24 / 0.01  # four of either in float32, against a hundredth
    assert torch.allclose(moved, 0.01 * found.value.value.norm(dim=-1), rtol=roundings, atol=0)
    assert (moved < found.value.bound[0]).all()
    # A scale that is the floor's does not move, so codes do.
    small = x * 1e-6
    found = shared(small)
    assert (found.straddles > 0).all()
    moved = (as_fp8(small * 1.01, False) - found.value.value).norm(dim=-1)
    assert float(moved.max()) > 0
    assert (moved < found.value.bound[0]).all()


def on_a_threshold(form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A row with one element on a threshold of its code, and the same one step above."""
    x = torch.full((1, 128), 1e-3, dtype=torch.float64)
    x[0, 0] = 5.0  # the largest: it sets the scale
    if form == "nvfp4":
        scale = float(e4m3.round_(ENCODE * (torch.tensor(5.0) / 6)) * DECODE)
        x[0, 1] = 2.5 * scale
    elif form == "cache":
        x[0, 1] = 1.0625 * CACHE_SCALE
    else:
        scale = 2.0**-6 if form == "fp8-power-of-two" else 5.0 / 448
        x[0, 1] = 108 * scale  # between 104 and 112
    x = x.float().double()
    below, above = x.clone(), x.clone()
    below[0, 1] *= 1 - 1e-4
    above[0, 1] *= 1 + 1e-4
    return below, above


@pytest.mark.parametrize("form", FORMS)
def test_a_code_on_a_threshold_may_flip_and_only_counting_it_allows_that(form: str) -> None:
    below, above = on_a_threshold(form)
    plain, bounded = FORMS[form]

    found = bounded(uncertain(below, 1e-4))

    flipped = (plain(above) - plain(below)).norm()
    assert float(flipped) > 0
    assert int(found.straddles) >= 1
    assert float(flipped) <= float(found.value.bound)
    # Without the codes that straddle, the flip would be called a fault.
    uncounted = found.value.variance.clone()
    uncounted[:, FRESH_BOUNDED] = 0
    without = Uncertain(found.value.value, uncounted, found.value.common)
    assert float(flipped) > float(without.bound)


def test_a_block_scale_on_a_threshold_takes_all_sixteen_elements_along() -> None:
    # The scale lies at the midpoint of two E4M3 values: 17 between 16 and 18.
    x = torch.linspace(0.1, 0.9, 16).double()[None] * 17 * 6 / float(ENCODE)
    x[0, 0] = 17 * 6 / float(ENCODE)
    x = x.float().double()

    found = straddles.nvfp4(uncertain(x, 1e-4), ENCODE)

    flipped = as_nvfp4(x * (1 + 2e-4)) - as_nvfp4(x * (1 - 2e-4))
    assert int((flipped != 0).sum()) > 8
    assert int(found.straddles) > 8
    assert float(flipped.norm()) <= float(found.value.bound)


def test_more_flips_are_allowed_than_are_likely_and_no_more_than_can_be() -> None:
    x = activations(4, 1024, seed=5).float().double()

    found = straddles.nvfp4(uncertain(x, 2e-3), ENCODE)

    bounded = found.value.variance[0, FRESH_BOUNDED].sum(-1).sqrt() * BOUNDED
    everything = (as_nvfp4(x).abs() / 2 + float(DECODE)).norm(dim=-1)
    flips = (as_nvfp4(x * 1.002) - as_nvfp4(x)).norm(dim=-1)
    assert (flips < bounded).all()
    assert (bounded < everything).all()
