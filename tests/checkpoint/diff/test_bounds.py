"""The half gap of every format holds every original, and is reached."""

import numpy as np
import pytest
import torch

from nvfp4check.checkpoint import bounds
from nvfp4ref import e2m1, e4m3, nvfp4
from nvfp4ref.conventions import Convention


def test_every_float_around_e2m1_is_within_its_codes_half_gap():
    originals = torch.linspace(-7, 7, 100_001, dtype=torch.float64)
    codes = e2m1.encode(originals).numpy()
    distance = np.abs(originals.numpy() - bounds.e2m1_values()[codes])
    assert (distance <= bounds.E2M1_HALF_GAPS[codes]).all()
    # The gap is no wider than needed: some original of every code but 0 and 6 is at its edge.
    for code in range(1, 7):
        assert distance[codes == code].max() > 0.99 * bounds.E2M1_HALF_GAPS[code]


def test_every_e4m3_midpoint_is_within_half_a_gap():
    midpoints = torch.tensor(e4m3.MIDPOINTS[:-1], dtype=torch.float64)
    bytes_ = e4m3.encode(midpoints.float()).view(torch.uint8).numpy()
    distance = np.abs(midpoints.numpy() - bounds.e4m3_values()[bytes_])
    assert (distance <= bounds.E4M3_HALF_GAPS[bytes_]).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_to_a_plain_dtype_stays_within_half_a_gap(dtype):
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(20_000, generator=generator, dtype=torch.float64) * 40 - 30
    originals = torch.cat([2.0**exponents, torch.tensor([0.0, 2.0**-25, 1e-41]).double()])
    if dtype != "F32":
        originals = originals.float().double()  # torch rounds doubles twice
    originals = originals[originals.to(kind).isfinite()]
    stored = originals.to(kind).double().numpy()
    gaps = bounds.plain_half_gaps(stored, dtype)
    distance = np.abs(stored - originals.numpy())
    assert (distance <= gaps).all()
    assert (distance > 0.9 * gaps).any()


@pytest.mark.parametrize("convention", [*Convention])
def test_the_original_of_every_convention_is_within_the_half_gap(convention):
    generator = torch.Generator().manual_seed(1)
    spread = torch.exp2(torch.randn(64, 1, generator=generator) * 3)
    original = torch.randn(64, 256, generator=generator) * spread
    scale = nvfp4.global_decode_scale(original.abs().amax(), convention)
    packed, scales = nvfp4.quantize(original, scale, convention)
    low, high = (packed & 15).numpy(), (packed >> 4).numpy()
    codes = np.stack([low, high], axis=-1).reshape(64, 256)
    bytes_ = np.repeat(scales.view(torch.uint8).numpy(), 16, axis=1)
    decoded = bounds.e4m3_values()[bytes_] * bounds.e2m1_values()[codes] * float(scale)
    gaps = bounds.nvfp4_half_gaps(float(scale))[bytes_, codes]
    distance = np.abs(original.double().numpy() - decoded)
    assert (distance <= gaps + bounds.ZONE * np.abs(original.numpy())).all()
