"""The vector kernel against plain numpy, code by code."""

import numpy as np
import pytest

from nvfp4check.checkpoint import bounds
from nvfp4check.checkpoint.audit.sources import frozen
from nvfp4check.checkpoint.diff.kernel import (
    BEYOND,
    CHANGED,
    COUNTS,
    EMPTY_A,
    EMPTY_B,
    FIRST_STEP,
    STEPS,
    SUMS,
    compare_rows,
    same_products,
)
from nvfp4check.checkpoint.diff.measured import by_powers, same_bytes
from nvfp4check.checkpoint.diff.values_pair import ordinals

ORDER = np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, -1, -2, -3, -4, -5, -6, -7])


def tables():
    values = np.nan_to_num(bounds.e4m3_values()[:, None] * bounds.e2m1_values()[None, :])
    gaps = np.nan_to_num(bounds.nvfp4_half_gaps(1.0))
    return np.stack([values, values / 2, gaps, gaps / 2]).astype(np.float32)


def run(codes_a, scales_a, codes_b, scales_b, row_blocks):
    sums, counts = np.zeros(SUMS), np.zeros(COUNTS, np.int64)
    largest = np.zeros(scales_a.size // row_blocks, np.float32)
    arrays = [frozen(array) for array in (codes_a, scales_a, codes_b, scales_b)]
    compare_rows(*arrays, tables(), row_blocks, sums, counts, largest)
    return sums, counts, largest


def decoded(codes, scales, place):
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1, 16)
    both = tables()[[place, place + 2]].astype(np.float64)
    return both[0][scales[:, None], nibbles], both[1][scales[:, None], nibbles], nibbles


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


@pytest.mark.parametrize("case", [random(0, 96), random(1, 4096), every_pair_of_codes()])
def test_every_sum_and_count_is_that_of_plain_numpy(case):
    codes, scales = case
    row_blocks = 32
    a, gap_a, nibbles_a = decoded(codes[0], scales[0], 0)
    b, gap_b, nibbles_b = decoded(codes[1], scales[1], 1)
    steps = np.abs(ORDER[nibbles_a] - ORDER[nibbles_b])

    sums, counts, largest = run(codes[0], scales[0], codes[1], scales[1], row_blocks)

    # Within a row of blocks float32 sums err by one rounding a block, and one of each product.
    expected = [(a * a).sum(), (b * b).sum(), ((a - b) ** 2).sum()]
    assert np.abs(sums / expected - 1).max() <= (row_blocks + 20) * 2.0**-24
    assert counts[CHANGED] == (nibbles_a != nibbles_b).sum()
    assert [counts[FIRST_STEP + i] for i in range(len(STEPS))] == [
        (steps >= step).sum() for step in STEPS
    ]
    gap = (gap_a.astype(np.float32) + gap_b.astype(np.float32)).astype(np.float64)
    distance = np.abs(a.astype(np.float32) - b.astype(np.float32))
    assert counts[BEYOND] == (distance > gap).sum()
    assert np.array_equal(largest, distance.reshape(-1, row_blocks * 16).max(axis=1))


@pytest.mark.parametrize("row_blocks", [1, 7, 8, 13, 1048])
def test_equal_blocks_under_equal_tables_count_as_by_plain_numpy(row_blocks):
    """Equal blocks are summed apart; rows end within a group of eight, or go over many groups."""
    rng = np.random.default_rng(row_blocks)
    codes, scales = random(row_blocks, 3 * row_blocks)
    codes[0][: 8 * row_blocks : 2] = codes[0][1 : 8 * row_blocks : 2] = 0x80
    codes[1] = np.where(rng.random(codes[0].size) < 0.05, codes[1], codes[0])
    scales[1] = np.where(rng.random(scales[0].size) < 0.1, scales[1], scales[0])
    a, gap_a, nibbles_a = decoded(codes[0], scales[0], 0)
    b, gap_b, nibbles_b = decoded(codes[1], scales[1], 0)
    same = tables()[[0, 0, 2, 2]]
    sums, counts = np.zeros(SUMS), np.zeros(COUNTS, np.int64)
    largest = np.zeros(3, np.float32)
    arrays = [frozen(array) for array in (codes[0], scales[0], codes[1], scales[1])]

    compare_rows(*arrays, same, row_blocks, sums, counts, largest)

    expected = np.array([(a * a).sum(), (b * b).sum(), ((a - b) ** 2).sum()])
    assert (np.abs(sums - expected) <= (row_blocks + 20) * 2.0**-24 * expected).all()
    assert counts[CHANGED] == (nibbles_a != nibbles_b).sum()
    assert counts[EMPTY_A] == ((nibbles_a & 7) == 0).all(axis=1).sum() >= row_blocks
    assert counts[EMPTY_B] == ((nibbles_b & 7) == 0).all(axis=1).sum()
    distance = np.abs(a.astype(np.float32) - b.astype(np.float32))
    gap = gap_a.astype(np.float32) + gap_b.astype(np.float32)
    assert counts[BEYOND] == (distance > gap).sum()
    assert np.array_equal(largest, distance.reshape(3, -1).max(axis=1))


def test_products_are_equal_only_where_the_ratio_of_global_scales_makes_them_so():
    units = bounds.e4m3_values()[:, None] * bounds.e2m1_values()[None, :] * 1024
    products = np.where(np.isnan(units), 1 << 40, np.nan_to_num(units)).astype(np.int64)
    codes = np.full(8, 0x22, np.uint8)
    one, two = np.array([0x38], np.uint8), np.array([0x40], np.uint8)  # 1.0 and 2.0

    assert same_products(codes, one, codes, two, products, 2, 1)
    assert not same_products(codes, one, codes, two, products, 1, 1)
    nan = np.array([0x7F], np.uint8)
    assert same_products(codes, nan, codes, nan, products, 1, 1)
    assert not same_products(codes, nan, codes, one, products, 1, 1)


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
