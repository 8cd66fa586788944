"""The byte pass against slow loops over codes, and its two counters against one another."""

import json
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4check.checkpoint import scan_numba
from nvfp4check.checkpoint.scan import (
    Pairs,
    WeightScan,
    default_counter,
    pairs_of,
    scan_bytes,
)
from nvfp4check.checkpoint.scan_locate import BlockDefects, Spot, locate
from nvfp4check.checkpoint.scan_tally import Bytes, Counter, Tally, count_with_numpy
from nvfp4check.checkpoint.scan_tiling import tiling_of
from nvfp4ref import e2m1, e4m3, layout


def three_sweeps_counter(codes: Bytes, scales: Bytes, tally: Tally) -> None:
    """The compiled counting of processors without the instructions for a single sweep."""
    scan_numba.count_by_steps(scan_numba._count, codes, scales, tally)


COUNTERS = [count_with_numpy, scan_numba.count_with_numba, three_sweeps_counter]


def words_counter(codes: Bytes, scales: Bytes, tally: Tally) -> None:
    """The compiled counting that needs no vector look-ups, piece by piece."""
    read_only = codes.copy()
    read_only.flags.writeable = False
    numbers, seen = np.zeros(scales.size, np.uint64), np.zeros(32, np.uint64)
    scan_numba._pack_words(read_only, 0, scales.size, numbers, seen)
    for byte, number in zip(scales.tolist(), numbers.tolist(), strict=True):
        tally.joint[byte] += (1, number & (1 << 26) - 1, (number >> 26 & (1 << 23) - 1) - 192)
    tally.has_unfilled |= bool(seen.any())
    tally.codes += codes_by_hand(codes)


def codes_by_hand(codes: Bytes) -> npt.NDArray[np.int64]:
    nibbles = [byte >> shift & 15 for byte in codes.tolist() for shift in (0, 4)]
    return np.array([nibbles.count(code) for code in range(16)])


def tally_by_hand(codes: Bytes, scales: Bytes) -> Tally:
    """One code at a time, by the reference's values."""
    tally = Tally(codes=codes_by_hand(codes))
    for block, byte in enumerate(scales.tolist()):
        packed = codes[8 * block : 8 * block + 8].tolist()
        halves = [int(2 * e2m1.VALUES[octet >> shift & 15]) for octet in packed for shift in (0, 4)]
        tally.joint[byte] += (1, sum(half * half for half in halves), sum(halves))
        tally.has_unfilled |= 0 < max(map(abs, halves)) < 12
    return tally


def assert_same(actual: Tally, expected: Tally) -> None:
    assert actual.codes.tolist() == expected.codes.tolist()
    assert actual.joint.tolist() == expected.joint.tolist()
    assert actual.has_unfilled == expected.has_unfilled


@pytest.mark.parametrize("count", [*COUNTERS, words_counter])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_bytes_are_counted_as_by_hand(count: Counter, data: st.DataObject) -> None:
    blocks = data.draw(st.integers(0, 70))
    codes = np.frombuffer(data.draw(st.binary(min_size=8 * blocks, max_size=8 * blocks)), np.uint8)
    scales = np.frombuffer(data.draw(st.binary(min_size=blocks, max_size=blocks)), np.uint8)
    tally = Tally()
    count(codes, scales, tally)

    assert_same(tally, tally_by_hand(codes, scales))


@pytest.mark.parametrize("count", COUNTERS)
def test_every_code_meets_every_scale(count: Counter) -> None:
    scales = np.repeat(np.arange(256, dtype=np.uint8), 16)
    codes = np.repeat(np.tile(np.arange(16, dtype=np.uint8) * 17, 256), 8)
    tally = Tally()
    count(codes, scales, tally)

    assert_same(tally, tally_by_hand(codes, scales))


@pytest.mark.parametrize("blocks", [1, 31, 32, 33, 2047, 2048, 2049, 65536, 131072 + 2048 + 5])
@pytest.mark.parametrize("count", COUNTERS[1:])
def test_all_counters_agree_across_every_border_of_pieces(count: Counter, blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    codes = rng.integers(0, 256, 8 * blocks, dtype=np.uint8)
    scales = rng.integers(0, 256, blocks, dtype=np.uint8)
    plain, compiled = Tally(), Tally()
    count_with_numpy(codes, scales, plain)
    count(codes, scales, compiled)

    assert_same(compiled, plain)


@pytest.mark.parametrize("count", COUNTERS[1:])
@pytest.mark.parametrize(("code", "sign"), [(0x7, 1), (0xF, -1)])
def test_the_fullest_blocks_do_not_overflow_their_fields(
    count: Counter, code: int, sign: int
) -> None:
    blocks = 8 * 2**14 + 64
    codes = np.full(8 * blocks, 17 * code, np.uint8)
    scales = np.full(blocks, 0x7E, np.uint8)
    tally = Tally()
    count(codes, scales, tally)

    assert tally.joint[0x7E].tolist() == [blocks, 16 * 144 * blocks, sign * 16 * 12 * blocks]


@pytest.mark.parametrize("count", COUNTERS)
@pytest.mark.parametrize("place", range(64))
@pytest.mark.parametrize(("code", "unfilled"), [(0, False), (1, True), (14, True), (15, False)])
def test_a_block_without_a_six_is_seen_at_every_place(
    count: Counter, place: int, code: int, unfilled: bool
) -> None:
    codes, scales = np.full(8 * 64, 0x70, np.uint8), np.full(64, 0x38, np.uint8)
    codes[8 * place : 8 * place + 8] = 0
    codes[8 * place + place % 8] = code << 4 * (place % 2)
    tally = Tally()
    count(codes, scales, tally)

    assert tally.has_unfilled == unfilled


@pytest.mark.parametrize("count", COUNTERS)
def test_tensors_at_odd_addresses_are_counted_alike(count: Counter) -> None:
    rng = np.random.default_rng(3)
    raw = rng.integers(0, 256, 9 * 100 + 1, dtype=np.uint8)
    codes, scales = raw[1:801], raw[801:]
    tally, aligned = Tally(), Tally()
    count(codes, scales, tally)
    count(codes.copy(), scales.copy(), aligned)

    assert_same(tally, aligned)


def test_moments_of_the_largest_weights_do_not_overflow() -> None:
    tally = Tally()
    tally.joint[0xFE] = (2**33, 2**37 * 144, -(2**37) * 12)

    assert tally.moments() == (2**37, 2**37 * 12 * 448 * 512, 2**37 * (12 * 448 * 512) ** 2)


def test_moments_are_those_of_the_decoded_weight_exactly() -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 256, 8 * 300, dtype=np.uint8)
    scales = rng.integers(0, 256, 300, dtype=np.uint8)
    found = scan_bytes("w", codes, scales, 10)
    finite = [block for block in range(300) if scales[block] & 0x7F != 0x7F]
    values = [
        Fraction(e2m1.VALUES[octet >> shift & 15]) * Fraction(e4m3.VALUES[scales[block]])
        for block in finite
        for octet in codes[8 * block : 8 * block + 8].tolist()
        for shift in (0, 4)
    ]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)

    assert found.finite == len(values)
    assert found.mean == float(mean)
    # One rounding of the exact root: compare squares, the root's half ulp counting twice.
    assert abs(Fraction(found.sd) ** 2 - variance) <= variance * Fraction(2, 2**52)


def blocks_with(byte: int, code: int) -> tuple[Bytes, Bytes]:
    codes = np.full(8 * 40, 0x70, np.uint8)  # codes 0 and 7: full enough
    scales = np.full(40, 0x50, np.uint8)
    codes[8 * 17 : 8 * 18] = code * 17
    scales[17] = byte
    return codes, scales


@pytest.mark.parametrize(
    ("byte", "code", "kind"),
    [
        (0x7F, 7, "nan"),
        (0xFF, 0, "nan"),
        (0x80, 0, "negative"),
        (0xC0, 7, "negative"),
        (0x00, 1, "lost"),
        (0x00, 14, "lost"),
        (0x00, 7, "underflowed"),
        (0x00, 15, "underflowed"),
        (0x09, 6, "underfilled"),
        (0x7E, 1, "underfilled"),
    ],
)
def test_one_bad_block_is_counted_and_found(byte: int, code: int, kind: str) -> None:
    found = scan_bytes("w", *blocks_with(byte, code), 4)

    assert found.defects == BlockDefects(**{kind: Spot(1, 17)})


@pytest.mark.parametrize(
    ("byte", "code"),
    [(0x00, 0), (0x00, 8), (0x38, 0), (0x20, 8), (0x08, 0), (0x08, 3), (0x07, 1), (0x01, 4)],
)
def test_legal_blocks_of_every_producer_are_no_defect(byte: int, code: int) -> None:
    assert scan_bytes("w", *blocks_with(byte, code), 4).defects == BlockDefects()


def test_a_defect_beyond_the_first_piece_keeps_its_place() -> None:
    blocks = (1 << 16) + 9
    codes, scales = np.full(8 * blocks, 0x77, np.uint8), np.full(blocks, 0x50, np.uint8)
    scales[[1 << 16, blocks - 1]] = 0x7F

    assert locate(codes, scales).nan == Spot(2, 1 << 16)


def test_pairs_are_told_from_neighbours_across_pairs() -> None:
    rng = np.random.default_rng(5)
    scales = np.repeat(rng.integers(1, 127, (64, 8), dtype=np.uint8), 2, axis=1)
    crossing = scales[:, 1:-1:2] == scales[:, 2::2]

    assert pairs_of(scales) == Pairs(512, 512, 448, int(crossing.sum()))
    scales[3, 0] ^= 1
    assert not pairs_of(scales).all_equal


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_rows_of_few_blocks_have_few_pairs(columns: int) -> None:
    found = pairs_of(np.full((5, columns), 0x38, np.uint8))

    assert (found.even, found.odd) == (5 * (columns // 2), 5 * ((columns - 1) // 2))


@pytest.mark.parametrize("columns", [8, 12, 28, 128])
@pytest.mark.parametrize("axis", [0, 1])
def test_tiled_scales_are_told_by_effects_of_rows_or_columns(columns: int, axis: int) -> None:
    rng = np.random.default_rng(columns)
    shape = (256, 1) if axis == 0 else (1, columns)
    noise = rng.normal(0, 3, (256, columns))
    scales = np.clip(80 + rng.normal(0, 6, shape) + noise, 1, 126).astype(np.uint8)
    flat = layout.swizzle(torch.from_numpy(scales)).numpy().reshape(scales.shape)

    assert tiling_of(flat).is_tiled
    assert not tiling_of(scales).is_tiled


def explained_by_hand(scales: npt.NDArray[np.uint8]) -> Fraction:
    """The share of squares that row means and column means explain, stripe by stripe."""
    explained = everything = Fraction(0)
    for stripe in scales.reshape(-1, 128, scales.shape[1]).astype(int).tolist():
        mean = Fraction(sum(map(sum, stripe)), 128 * len(stripe[0]))
        rows = [Fraction(sum(row), len(row)) - mean for row in stripe]
        columns = [Fraction(sum(column), 128) - mean for column in zip(*stripe, strict=True)]
        explained += len(columns) * sum(row * row for row in rows)
        explained += 128 * sum(column * column for column in columns)
        everything += sum((value - mean) ** 2 for row in stripe for value in row)
    return explained / everything


@pytest.mark.parametrize("columns", [8, 20])
def test_shares_of_both_readings_are_exact(columns: int) -> None:
    rng = np.random.default_rng(columns)
    scales = rng.integers(0, 256, (256, columns), dtype=np.uint8)
    scales[:128, 1:3] = 255
    found = tiling_of(layout.swizzle(torch.from_numpy(scales)).numpy().reshape(scales.shape))

    assert found.tiled_share == float(explained_by_hand(scales))
    assert tiling_of(scales).linear_share == float(explained_by_hand(scales))


def test_scales_of_pure_noise_are_not_called_tiled() -> None:
    scores = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        found = tiling_of(rng.integers(60, 120, (128, 32), dtype=np.uint8))
        assert not found.is_tiled
        scores.append(found.score or 0.0)
    # The score is in standard deviations: a hundred of them spread by about one.
    assert 0.5 < float(np.std(scores)) < 2


@pytest.mark.parametrize("shape", [(128, 4), (64, 16), (128, 6), (192, 8), (1, 1)])
def test_shapes_that_tiles_cannot_have_are_not_judged(shape: tuple[int, int]) -> None:
    assert tiling_of(np.arange(shape[0] * shape[1], dtype=np.uint8).reshape(shape)).score is None


def test_constant_scales_are_not_judged() -> None:
    assert tiling_of(np.full((128, 16), 0x38, np.uint8)).score is None


def test_a_scan_survives_json() -> None:
    rng = np.random.default_rng(6)
    codes = rng.integers(0, 256, 8 * 128 * 16, dtype=np.uint8)
    found = scan_bytes("w", codes, rng.integers(0, 256, 128 * 16, dtype=np.uint8), 16)

    assert WeightScan.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_fingerprints_differ_where_a_code_does() -> None:
    codes, scales = blocks_with(0x50, 7)
    before = scan_bytes("w", codes, scales, 4).fingerprint
    assert scan_bytes("v", codes.copy(), scales.copy(), 4).fingerprint == before
    codes[0] = 0x71
    assert scan_bytes("w", codes, scales, 4).fingerprint != before


def test_the_compiled_counter_is_the_default() -> None:
    assert default_counter() is scan_numba.count_with_numba
