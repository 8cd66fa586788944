"""The vector kernel against plain numpy and integers, code by code and scale by scale."""

import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from nvfp4check.checkpoint import bounds
from nvfp4check.checkpoint.diff.kernel import (
    CHUNK,
    VOID_A,
    VOID_B,
    VOID_IN_ONE,
    Found,
    compare_blocks,
)
from nvfp4check.checkpoint.diff.kernel_steps import BEYOND, FIRST_STEP, MOST_STEPS, STEPS
from nvfp4check.checkpoint.diff.kernel_sums import CHANGED, CHANGED_SCALES, EMPTY_A, EMPTY_B
from nvfp4check.checkpoint.diff.measured import by_powers, same_bytes
from nvfp4check.checkpoint.diff.scale_pairs import ENTRY, HALF, make_entry, scale_pairs
from nvfp4check.checkpoint.diff.values_pair import ordinals
from nvfp4ref import e2m1

PLACES = np.array([7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0])
VALUES = bounds.e2m1_values()
#: Global scales, or what stands for them: equal, an ulp apart, apart, far apart, one of them 0.
APART = (0.75, float(np.float32(0.9)))
FACTORS = [(1.0, 1.0), (1.0, 1 + 2.0**-23), APART, (2.0**-40, 1.0), (0.0, 1.0)]


def unpacked(codes):
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1, 16)


def is_void(scales):
    return (scales & 0x7F) == 0x7F


def places_on_the_coarser_grid(codes, scales, factors):
    """Place of every code, by `nvfp4ref.e2m1` where its grid is the finer one."""
    units = [
        bounds.e4m3_values()[side] * factor for side, factor in zip(scales, factors, strict=True)
    ]
    found = []
    coarse = np.maximum(*np.abs(units))
    is_finer = np.abs(units[0]) < np.abs(units[1])
    for own, other, held, is_fine in ((0, 1, codes[0], is_finer), (1, 0, codes[1], ~is_finer)):
        with np.errstate(all="ignore"):
            value = np.nan_to_num(VALUES[held] * units[own][:, None] / coarse[:, None])
        sign = np.where(units[other] < 0, -1, 1)[:, None]
        rounded = e2m1.encode(torch.from_numpy(value * sign)).numpy()
        place = np.where(is_fine[:, None], PLACES[rounded], PLACES[held])
        found.append(np.where((coarse == 0)[:, None], 0, place))
    return found


def check(codes, scales, factors):
    """Compare, and hold every number against the plain way to it."""
    found = Found()
    compare_blocks(codes, scales, 0, scale_pairs(*factors), found)
    nibbles = [unpacked(side) for side in codes]
    void = [is_void(side) for side in scales]
    sound = ~(void[0] | void[1])
    units = bounds.nvfp4_units() * 1024
    n = [
        np.where(sound[:, None], np.nan_to_num(units[s[:, None], c]), 0).astype(np.int64)
        for s, c in zip(scales, nibbles, strict=True)
    ]
    for place, (one, two) in enumerate(((0, 0), (0, 1), (1, 1))):
        assert found.total(place) == sum((n[one] * n[two]).sum(axis=1).tolist())
    counts = found.counts
    assert counts[CHANGED] == (nibbles[0] != nibbles[1]).sum()
    assert counts[CHANGED_SCALES] == (scales[0] != scales[1]).sum()
    assert counts[EMPTY_A] == ((nibbles[0] & 7) == 0).all(axis=1).sum()
    assert counts[EMPTY_B] == ((nibbles[1] & 7) == 0).all(axis=1).sum()
    assert counts[VOID_A] == void[0].sum()
    assert counts[VOID_B] == void[1].sum()
    assert counts[VOID_IN_ONE] == (void[0] != void[1]).sum()
    safe = [np.where(side, 0, held) for side, held in zip(void, scales, strict=True)]
    values = [
        units[s[:, None], c] / 1024 * f for s, c, f in zip(safe, nibbles, factors, strict=True)
    ]
    gaps = [
        bounds.nvfp4_half_gaps(f)[s[:, None], c] + bounds.ZONE * np.abs(v)
        for s, c, f, v in zip(safe, nibbles, factors, values, strict=True)
    ]
    distance = np.where(sound[:, None], np.abs(values[0] - values[1]), 0)
    beyond = (distance > gaps[0] + gaps[1]) | (void[0] != void[1])[:, None]
    assert counts[BEYOND] == beyond.sum()
    assert found.largest[0] == distance.max(initial=0)
    if found.largest[0]:
        assert found.block[0] == distance.max(axis=1).argmax()
    places = places_on_the_coarser_grid(nibbles, safe, factors)
    steps = np.where(sound[:, None], np.abs(places[0] - places[1]), 0)
    at_least = [(steps >= least).sum() for least in STEPS]
    assert counts[FIRST_STEP : FIRST_STEP + len(STEPS)].tolist() == at_least
    assert max(counts[MOST_STEPS], min(1, at_least[0])) == steps.max(initial=0)
    return found


def random(seed, blocks):
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, 256, 8 * blocks, np.uint8) for _ in range(2)]
    scales = [rng.integers(0, 256, blocks, np.uint8) for _ in range(2)]
    return codes, scales


def every_pair_of_codes():
    """256 blocks: code i of a against code j of b, for all i and j, under two scales."""
    one, two = (grid.reshape(-1) for grid in np.mgrid[0:16, 0:16])
    a, b = (np.repeat(side, 16).astype(np.uint8) for side in (one, two))
    codes = [side[0::2] | side[1::2] << 4 for side in (a, b)]
    return codes, [np.full(256, 0x38, np.uint8), np.full(256, 0x40, np.uint8)]


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize(
    "case", [random(0, 96), random(1, 4099), every_pair_of_codes()], ids=["few", "many", "codes"]
)
def test_every_sum_and_count_is_that_of_plain_numpy(case, factors):
    check(*case, factors)


@pytest.mark.parametrize("blocks", [1, 7, 8, 13, CHUNK, CHUNK + 8, 3 * CHUNK + 5])
def test_nearly_equal_blocks_count_as_by_plain_numpy(blocks):
    """Equal groups are passed over; the last group and the last chunk may be short."""
    rng = np.random.default_rng(blocks)
    codes, scales = random(blocks, blocks)
    codes[0][: 8 * (blocks // 3)] &= 0x88
    codes[1] = np.where(rng.random(codes[0].size) < 0.01, codes[1], codes[0])
    scales[0] &= 0x5F  # no NaN
    scales[1] = np.where(rng.random(blocks) < 0.02, scales[0] + 1, scales[0]).astype(np.uint8)
    for factors in FACTORS:
        check(codes, scales, factors)


def test_nan_scales_void_their_blocks_and_no_other():
    codes, scales = random(5, 2 * CHUNK)
    scales = [side & 0x5F for side in scales]
    for place, bytes_ in ((3, (0x7F, 0x38)), (9, (0x38, 0xFF)), (CHUNK + 1, (0x7F, 0x7F))):
        for side, byte in zip(scales, bytes_, strict=True):
            side[place] = byte

    found = check(codes, scales, (1.0, 1.0))

    assert found.counts[VOID_A] == found.counts[VOID_B] == found.counts[VOID_IN_ONE] == 2


def test_the_largest_sums_of_a_chunk_are_exact():
    """Every code 6 and every scale 448: a float64 still holds the sum to the last digit."""
    blocks = CHUNK
    codes = [np.full(8 * blocks, 0x77, np.uint8), np.full(8 * blocks, 0xFF, np.uint8)]
    scales = [np.full(blocks, 0x7E, np.uint8)] * 2
    scales[1] = np.where(np.arange(blocks) == 17, 0x01, 0x7E).astype(np.uint8)

    check(codes, scales, (1.0, 1.0))


def test_equal_energies_are_told_apart_by_their_difference_alone():
    """Values n_a G_a and n_b G_b are equal exactly if the energy of their difference is 0."""
    codes, scales = random(6, 64)
    scales[0] = scales[0] & 0x3F | 0x08
    scales[1] = scales[0] + 8  # the same numbers times 2
    codes[1] = codes[0]
    found = Found()
    compare_blocks(codes, scales, 0, scale_pairs(1.0, 0.5), found)
    aa, ab, bb = (found.total(place) for place in range(3))
    half = Fraction(1, 2)

    assert aa - 2 * half * ab + half**2 * bb == 0
    assert found.largest[0] == 0
    assert aa - 2 * (half + Fraction(1, 2**24)) * ab + (half + Fraction(1, 2**24)) ** 2 * bb > 0


@pytest.mark.parametrize("factors", [(1.0, 1.0), APART])
def test_the_entry_of_every_pair_of_scales_says_what_every_pair_of_codes_is(factors):
    """All 254 x 254 scales, all 16 x 16 codes: one range of places is the whole bound."""
    pairs = scale_pairs(*factors)
    bytes_ = np.array([byte for byte in range(256) if byte & 0x7F != 0x7F], np.uint8)
    every = np.repeat(np.arange(16), 16), np.tile(np.arange(16), 16)
    gaps = [bounds.nvfp4_half_gaps(factor) for factor in factors]
    units = bounds.nvfp4_units()
    for one in bytes_:
        for two in bytes_:
            make_entry(pairs, one, two)
        held = pairs.entries.reshape(-1, ENTRY)[int(one) * 256 + bytes_.astype(int)].reshape(
            -1, 8, 16
        )
        assert (held[:, :4, 0] <= 15).all()
        first, second = held[:, :4, every[0]], held[:, 4:, every[1]]
        apart = np.maximum(first.astype(int) - second, 0)
        a = units[one, every[0]] * factors[0]
        b = units[bytes_[:, None], every[1]] * factors[1]
        granted = gaps[0][one, every[0]] + gaps[1][bytes_[:, None], every[1]]
        granted = granted + bounds.ZONE * (np.abs(a) + np.abs(b))
        assert np.array_equal(apart[:, :2].any(axis=1), np.abs(a - b) > granted)
        assert (np.minimum(apart[:, 0], apart[:, 1]) == 0).all()
        codes = [np.broadcast_to(side, (bytes_.size, 256)) for side in every]
        scales = [np.full(bytes_.size, one), bytes_]
        places = places_on_the_coarser_grid(codes, scales, factors)
        assert np.array_equal(apart[:, 2] + apart[:, 3], np.abs(places[0] - places[1]))
    assert HALF * 2 == ENTRY


@pytest.mark.parametrize("vector_bytes", [0, 32])
def test_processors_without_avx_512_count_the_same(vector_bytes, tmp_path):
    """The code for them, compiled anew, is held against plain numpy."""
    script = f"""
import importlib.util, sys
import nvfp4check.checkpoint.scan_numba as scan
scan.VECTOR_BYTES = {vector_bytes}
spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
for factors in cases.FACTORS:
    for case in (cases.random(1, 4099), cases.every_pair_of_codes()):
        cases.check(*case, factors)
cases.test_the_largest_sums_of_a_chunk_are_exact()
print("checked")
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    ran = subprocess.run(
        [sys.executable, "-c", script, __file__], env=environment, capture_output=True, text=True
    )

    assert ran.stdout == "checked\n", ran.stderr


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, (1 << 17) + 3])
def test_one_byte_anywhere_makes_bytes_unequal(size):
    one = np.arange(size, dtype=np.uint8)
    assert same_bytes(one, one.copy())
    for place in {0, size // 2, size - 1} if size else ():
        other = one.copy()
        other[place] ^= 1
        assert not same_bytes(one, other)


def test_columns_of_the_ulp_histogram_double():
    assert by_powers(np.array([0, 1, 1, 2, 3, 4, 5, 8, 9])) == {
        "1": 2,
        "2": 1,
        "3": 2,
        "5": 2,
        "9": 1,
    }


def test_ordinals_count_every_bfloat16_in_order():
    words = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    values = (words.astype(np.uint32) << 16).view(np.float32)
    number = ~np.isnan(values)
    order = np.argsort(ordinals(words)[number], kind="stable")
    assert (np.diff(values[number][order]) >= 0).all()
    assert ordinals(np.array([0x8000], np.uint16))[0] == 0
