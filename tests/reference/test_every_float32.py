"""E2M1 and E4M3 against CUDA's casts of every float32, recorded as the places where a code changes.

Both encoders depend on the magnitude by a search among midpoints, so between two of these places
nothing changes: equal codes at both ends of every run are equal codes on all 2**32 values.
"""

import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nvfp4ref import e2m1, e4m3
from nvfp4ref.e4m3 import Overflow

RECORDED = json.loads(
    (
        Path(__file__).parents[2] / "goldens" / "vectors" / "casts_cuda_every_float32.json"
    ).read_text()
)["casts"]

ENCODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "__nv_cvt_float_to_fp4(E2M1, cudaRoundNearest)": e2m1.encode,
    "__nv_cvt_float_to_fp8(SATFINITE, E4M3)": partial(e4m3.encode, overflow=Overflow.SATURATE),
    "__nv_cvt_float_to_fp8(NOSAT, E4M3)": partial(e4m3.encode, overflow=Overflow.NAN),
}

#: Bits of +inf and -inf: what lies above is NaN.
INFINITIES = (0x7F800000, 0xFF800000)


def numbers(bits: list[int]) -> torch.Tensor:
    """Return float32 of these bits."""
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def runs(name: str) -> list[tuple[int, int, int]]:
    """Return [first, last] bits and code of each run, cut at the borders of NaN and of signs."""
    changes = dict(map(tuple, RECORDED[name]))
    borders = sorted({*changes, 0x80000000, *(one + 1 for one in INFINITIES), 2**32})
    found, code = [], 0
    for first, following in pairwise(borders):
        code = changes.get(first, code)
        found.append((first, following - 1, code))
    return found


def test_every_cast_is_held_to_the_record():
    assert set(ENCODERS) == set(RECORDED)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_float32_that_is_a_number_gets_cudas_code(name):
    kept = [run for run in runs(name) if not numbers([run[0]]).isnan()]
    ends = numbers([bits for first, last, _ in kept for bits in (first, last)])
    codes = torch.tensor([code for *_, code in kept for _ in range(2)], dtype=torch.uint8)

    assert sum(last - first + 1 for first, last, _ in kept) == 2 * (INFINITIES[0] + 1)
    assert torch.equal(ENCODERS[name](ends), codes)


@pytest.mark.parametrize("name", ENCODERS)
def test_codes_rise_with_the_magnitude_so_that_ends_speak_for_what_is_between(name):
    exponents = torch.arange(-160, 129, dtype=torch.float64)
    steps = 1 + torch.arange(64, dtype=torch.float64) / 64
    magnitudes = (torch.exp2(exponents).unsqueeze(1) * steps).flatten().float()

    for sign in (1.0, -1.0):
        codes = ENCODERS[name](sign * magnitudes).int()
        assert bool((codes.diff() >= 0).all())


@pytest.mark.parametrize("name", ENCODERS)
def test_cuda_gives_every_nan_one_code(name):
    codes = {code for first, _, code in runs(name) if numbers([first]).isnan()}

    assert codes == ({7} if "fp4" in name else {0x7F})
