"""What distinguishes two producers of one original is named, with how often it shows."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from nvfp4check.checkpoint.diff.classes import WeightClass
from nvfp4check.checkpoint.diff.run import DiffOptions, diff_checkpoints
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4ref import e4m3, nvfp4, packing
from nvfp4ref.conventions import Convention

ROWS, COLUMNS = 96, 512


def original(spread=1.0):
    generator = torch.Generator().manual_seed(7)
    rows = torch.exp2(torch.randn(ROWS, 1, generator=generator) * spread)
    return torch.randn(ROWS, COLUMNS, generator=generator) * rows


def quantized(x, convention=Convention.MODELOPT, factor=1.0):
    """Packed codes, block scales and global scale."""
    scale = nvfp4.global_decode_scale(x.abs().amax(), convention) * factor
    return *nvfp4.quantize(x, scale, convention), scale


def under(x, scales, scale):
    """Codes of x under given block scales."""
    codes = nvfp4.quantize_elements(x, scales, scale, Convention.MODELOPT)
    return packing.pack(codes), scales, scale


def diff(golden, tmp_path, one, two):
    sides = []
    for name, (packed, scales, scale) in (("a", one), ("b", two)):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(golden.nvfp4 / "config.json", folder)
        module = "model.layers.0.mlp.down_proj"
        tensors = {"weight": packed, "weight_scale": scales, "weight_scale_2": scale}
        tensors = {f"{module}.{part}": tensor.clone() for part, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors")
        sides.append(open_checkpoint(folder))
    (found,) = diff_checkpoints(*sides, DiffOptions(journal=tmp_path / "journal")).weights
    assert found.cls is WeightClass.REQUANTIZED
    return found


def best_of_two(x, scale):
    """Four over six: the scale of 4 where its error is smaller."""
    _, scales, _ = quantized(x)
    larger = e4m3.encode((e4m3.decode(scales) * 1.5).clamp(max=448.0))
    made = [under(x, side, scale) for side in (scales, larger)]
    errors = [(nvfp4.dequantize(*one) - x).square().view(ROWS, -1, 16).sum(-1) for one in made]
    takes = errors[1] < errors[0]
    chosen = torch.where(takes, larger.view(torch.uint8), scales.view(torch.uint8))
    return under(x, chosen.view(torch.float8_e4m3fn), scale)


def test_four_over_six_is_named_and_counted(golden, tmp_path):
    x = original(0.0)
    one = quantized(x)
    two = best_of_two(x, one[2])
    has_six = (packing.unpack(two[0]) % 8 == 7).view(ROWS, -1, 16).any(-1)
    fours = int((~has_six).sum())

    found = diff(golden, tmp_path, one, two)

    assert fours > 100
    assert f"{fours:,} of {has_six.numel():,} blocks of b are scaled to a largest code of 4" in (
        found.diagnosis
    )


def test_searched_scales_are_told_from_those_of_the_largest_element(golden, tmp_path):
    x = original(0.0)
    one = quantized(x)
    generator = torch.Generator().manual_seed(2)
    steps = torch.randint(0, 4, one[1].shape, generator=generator, dtype=torch.uint8)
    searched = (one[1].view(torch.uint8) + steps).clamp(max=0x7E).view(torch.float8_e4m3fn)

    found = diff(golden, tmp_path, under(x, searched, one[2]), one)

    assert "blocks of a hold no code of 6: its scales were searched" in found.diagnosis


def test_the_least_scale_of_torchao_is_named_and_counted(golden, tmp_path):
    x = original(0.0)
    x[0] *= 2.0**-12
    x[5, 0] = 40.0
    one = quantized(x)
    two = quantized(x, Convention.TORCHAO)
    small = one[1].view(torch.uint8) < 8
    assert small.any()

    found = diff(golden, tmp_path, one, two)

    assert f"{int(small.sum()):,} block scales of b stand at 2**-6" in found.diagnosis


@pytest.mark.parametrize("factor", [1.17, 3.0])
def test_another_global_scale_that_is_made_up_for_is_no_constant_factor(golden, tmp_path, factor):
    x = original(0.0)

    found = diff(golden, tmp_path, quantized(x), quantized(x, factor=factor))

    said = f"global scale of b is a's times {factor:g}, made up for by the block scales"
    assert found.diagnosis == said


def test_a_code_beside_a_tie_is_a_matter_of_float32_roundings(golden, tmp_path):
    x = original()
    one = quantized(x)
    codes = packing.unpack(one[0])
    codes[3, 100] = codes[3, 100] & 8 | 3
    one = (packing.pack(codes), *one[1:])
    codes[3, 100] += 1

    found = diff(golden, tmp_path, one, (packing.pack(codes), *one[1:]))

    assert found.max_ulp == 1
    assert "1 of 49,152 codes differ by one step" in found.diagnosis
    assert "reciprocal" in found.diagnosis


def test_other_codes_under_equal_scales_are_more_than_roundings(golden, tmp_path):
    x = original()
    one = quantized(x)
    codes = packing.unpack(one[0])
    generator = torch.Generator().manual_seed(1)
    up = (torch.rand(codes.shape, generator=generator) < 0.01) & (codes % 8 < 6)
    down = (torch.rand(codes.shape, generator=generator) < 0.01) & (codes % 8 > 1) & ~up
    moved = codes + up.to(torch.uint8) - down.to(torch.uint8)

    found = diff(golden, tmp_path, one, (packing.pack(moved), *one[1:]))

    assert found.diagnosis.startswith(f"{int((up | down).sum()):,} codes differ by one step")
    assert "more than the" in found.diagnosis
