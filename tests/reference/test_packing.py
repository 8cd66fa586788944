"""Two codes to a byte."""

import pytest
import torch

from nvfp4ref import packing

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def test_the_first_code_is_the_low_nibble() -> None:
    """ModelOpt packs (6, -3) to 0xD7."""
    six, minus_three = 7, 13

    assert packing.pack(torch.tensor([six, minus_three], dtype=torch.uint8)).tolist() == [0xD7]


def test_every_byte_survives_unpack_then_pack() -> None:
    assert torch.equal(packing.pack(packing.unpack(ALL_BYTES)), ALL_BYTES)


def test_every_pair_of_codes_survives_pack_then_unpack() -> None:
    pairs = torch.cartesian_prod(*[torch.arange(16, dtype=torch.uint8)] * 2)  # (256, 2)

    assert packing.pack(pairs).unique().numel() == 256
    assert torch.equal(packing.unpack(packing.pack(pairs)), pairs)


def test_leading_dimensions_are_kept() -> None:
    codes = torch.arange(2 * 3 * 8, dtype=torch.uint8).view(2, 3, 8) % 16

    packed = packing.pack(codes)

    assert packed.shape == (2, 3, 4)
    assert torch.equal(packing.unpack(packed), codes)


def test_a_transposed_view_is_packed_where_it_stands() -> None:
    codes = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)

    assert packing.pack(codes.T).tolist() == [[0x31], [0x42]]


def test_an_odd_number_of_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="K must be even"):
        packing.pack(torch.zeros(2, 3, dtype=torch.uint8))


def test_a_code_of_five_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lies in 0\.\.15, found 16"):
        packing.pack(torch.tensor([0, 16], dtype=torch.uint8))
