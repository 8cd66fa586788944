"""Boundary tables and families: what they promise to reach."""

import pytest
import torch

from nvfp4check import inputs
from nvfp4ref import e2m1, e4m3, nvfp4, packing
from nvfp4ref.conventions import Convention
from nvfp4ref.formats import BLOCK_SIZE


def test_float32_boundaries_reach_every_tie_of_every_scale_and_its_neighbours() -> None:
    blocks = inputs.element_boundaries(torch.float32).double()
    present = set(blocks.flatten().tolist())

    for byte in inputs.SCALE_BYTES:
        for midpoint in e2m1.MIDPOINTS:
            tie = torch.tensor(midpoint * e4m3.VALUES[byte])
            for value in inputs.neighbours(tie).tolist():
                assert value in present
                assert -value in present


@pytest.mark.parametrize("dtype", inputs.INPUT_DTYPES)
def test_a_quantiser_gives_the_blocks_the_scales_they_were_made_for(dtype: torch.dtype) -> None:
    blocks = inputs.element_boundaries(dtype)

    scales = nvfp4.quantize_block_scales(blocks, torch.tensor(1.0), Convention.MODELOPT)

    assert torch.equal(e4m3.decode(scales).flatten(), blocks[:, 0].float() / 6)
    if dtype == torch.float32:
        assert set(scales.view(torch.uint8).flatten().tolist()) == set(inputs.SCALE_BYTES)


def test_scale_boundaries_reach_underflow_overflow_and_every_scale() -> None:
    blocks = inputs.scale_boundaries(torch.float32)

    scales = nvfp4.quantize_block_scales(blocks, torch.tensor(1.0), Convention.MODELOPT_0_39)

    assert set(scales.view(torch.uint8).flatten().tolist()) == {0, *inputs.SCALE_BYTES}
    amax = blocks.abs().amax(-1)
    for midpoint in e4m3.MIDPOINTS:
        assert (amax == 6 * midpoint).any()


def test_amax_stands_at_every_place_of_a_block() -> None:
    blocks = inputs.scale_boundaries(torch.float32).abs()

    assert set(blocks.argmax(-1).tolist()) == set(range(BLOCK_SIZE))


@pytest.mark.parametrize("dtype", inputs.INPUT_DTYPES)
def test_neighbours_are_next_to_each_other(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 448.0, -0.75]).to(dtype)

    near = inputs.neighbours(values)

    kinds = {2: torch.int16, 4: torch.int32}
    raw = near.view(kinds[dtype.itemsize]).long()
    assert (raw.diff(dim=-1).abs() == 1).all()
    assert torch.equal(near[:, 1], values)


@pytest.mark.parametrize("name", inputs.FAMILIES)
def test_a_family_is_the_same_from_the_same_seed(name: str) -> None:
    family = inputs.FAMILIES[name]
    first, again, other = (family(torch.Generator().manual_seed(seed), 4, 64) for seed in (1, 1, 2))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_neighbouring_blocks_differ_in_amax_by_eight() -> None:
    values = inputs.uneven_neighbours(torch.Generator().manual_seed(0), 200, 64)
    amax = values.view(200, 4, 16).abs().amax(-1).mean(0)

    assert 6 < amax[1] / amax[0] < 10


def test_coarse_values_are_held_by_every_dtype() -> None:
    values = inputs.coarse(torch.Generator().manual_seed(0), 8, 64)

    for dtype in inputs.INPUT_DTYPES:
        assert torch.equal(values.to(dtype).float(), values)


def test_two_planes_tell_every_place_of_a_tile_apart() -> None:
    planes = [inputs.scale_ids(128, 4, plane).view(torch.uint8).flatten() for plane in (0, 1)]

    pairs = set(zip(planes[0].tolist(), planes[1].tolist(), strict=True))
    assert len(pairs) == 512
    assert {byte for plane in planes for byte in plane.tolist()} <= set(inputs.SCALE_BYTES)


def test_shapes_use_every_row_count_and_every_block_count() -> None:
    pairs = list(inputs.shapes())

    assert {rows for rows, _ in pairs} == set(inputs.ROWS)
    assert {blocks for _, blocks in pairs} == set(inputs.BLOCKS)


def test_views_hold_the_same_values_and_no_plain_layout() -> None:
    values = torch.arange(48.0).view(4, 12)

    for name, view in inputs.views(values):
        assert torch.equal(view, values), name
        plain = view.is_contiguous() and view.data_ptr() % 16 == 0
        assert not plain, name


def test_poison_surrounds_the_rows() -> None:
    values = torch.ones(3, 4, dtype=torch.uint8)

    view = inputs.among_poison(values, 0x7F, rows=5)

    assert torch.equal(view, values)
    whole = torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage())
    assert int((whole == 0x7F).sum()) == 2 * 5 * 4


def test_random_codes_hold_every_code() -> None:
    codes = packing.unpack(inputs.random_codes(torch.Generator().manual_seed(0), 16, 64))

    assert set(codes.flatten().tolist()) == set(range(16))
