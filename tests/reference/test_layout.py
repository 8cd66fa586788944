"""The tiled layouts are bijections, for every small shape, and pad with zeros."""

import pytest
import torch

from nvfp4ref import layout

ROWS = [*range(1, 34), 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257]
COLUMNS = range(1, 13)


@pytest.mark.parametrize("rows", ROWS)
def test_swizzle_is_a_bijection_and_its_padding_is_zero(rows: int) -> None:
    for columns in COLUMNS:
        scales = torch.arange(rows * columns).remainder(255).add(1).to(torch.uint8)
        scales = scales.view(rows, columns)
        flat = layout.swizzle(scales)
        places = layout.offsets_128x4(rows, columns).flatten()
        padding = torch.ones(flat.numel(), dtype=torch.bool)
        padding[places] = False

        assert flat.numel() == layout.padded(rows, 128) * layout.padded(columns, 4)
        assert places.unique().numel() == rows * columns
        assert torch.equal(layout.unswizzle(flat, rows, columns), scales)
        assert not flat[padding].any()


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17])
def test_the_8x4_layout_sends_no_two_scales_to_one_place(rows: int) -> None:
    for columns in COLUMNS:
        places = layout.offsets_8x4(rows, columns)

        assert places.unique().numel() == rows * columns
        assert int(places.max()) < layout.padded(rows, 8) * layout.padded(columns, 4)


def test_a_tile_is_laid_out_as_cublas_documents() -> None:
    """CuBLAS, section 3.1.4.4.2: (outer % 32) * 16 + (outer / 32) * 4 + inner."""
    places = layout.offsets_128x4(128, 4)

    for outer in range(128):
        for inner in range(4):
            assert places[outer, inner] == (outer % 32) * 16 + (outer // 32) * 4 + inner


def test_swizzle_is_the_same_as_splitting_and_transposing_axes() -> None:
    scales = torch.randint(1, 255, (256, 12), generator=torch.manual_seed(0), dtype=torch.uint8)
    tiles = scales.view(2, 4, 32, 3, 4)  # tile row, 32s, row, tile column, column

    assert torch.equal(layout.swizzle(scales), tiles.permute(0, 3, 2, 1, 4).flatten())


def test_the_dtype_and_every_bit_are_kept() -> None:
    scales = torch.arange(256, dtype=torch.uint8).view(64, 4).view(torch.float8_e4m3fn)

    back = layout.unswizzle(layout.swizzle(scales), 64, 4)

    assert back.dtype == torch.float8_e4m3fn
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


def test_a_transposed_view_is_swizzled_as_it_reads() -> None:
    scales = torch.arange(128, dtype=torch.uint8).view(4, 32)

    assert torch.equal(layout.swizzle(scales.T), layout.swizzle(scales.T.contiguous()))


def test_scales_that_are_no_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found shape \(2, 3, 4\)"):
        layout.swizzle(torch.zeros(2, 3, 4, dtype=torch.uint8))


def test_a_flat_buffer_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="100 x 3 take 512 bytes, found 300"):
        layout.unswizzle(torch.zeros(300, dtype=torch.uint8), 100, 3)
