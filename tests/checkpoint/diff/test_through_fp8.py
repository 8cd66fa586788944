"""A passage through FP8 or bfloat16 explains what it does, and little else."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nvfp4check.checkpoint import bounds
from nvfp4check.checkpoint.diff.classes import WeightClass
from nvfp4check.checkpoint.diff.run import DiffOptions, diff_checkpoints
from nvfp4check.checkpoint.diff.through_fp8 import strip_is_explained
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4ref import fp8_block, nvfp4, packing
from nvfp4ref.conventions import Convention

ROWS, COLUMNS = 128, 1024
#: A global scale that makes every block scale another number.
APART = 1.17


def original(rows=ROWS):
    generator = torch.Generator().manual_seed(3)
    spread = torch.exp2(torch.randn(rows, 1, generator=generator) * 0.7)
    return (torch.randn(rows, COLUMNS, generator=generator) * spread).bfloat16()


def quantized(x, factor=1.0):
    """Codes, scale bytes and global scale."""
    scale = nvfp4.global_decode_scale(x.abs().amax(), Convention.MODELOPT) * factor
    packed, scales = nvfp4.quantize(x, scale, Convention.MODELOPT)
    return packing.unpack(packed).numpy(), scales.view(torch.uint8).numpy(), float(scale)


def intervals(made):
    """Values and half gaps."""
    codes, scales, factor = made
    spread = np.repeat(scales, 16, axis=1)
    return (
        bounds.nvfp4_units()[spread, codes] * factor,
        bounds.nvfp4_half_gaps(factor)[spread, codes],
    )


def through_fp8(x, dtype=torch.bfloat16, *, power_of_two=False):
    elements, scales = fp8_block.quantize(x.float())
    if power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
        spread = scales.repeat_interleave(128, 0)[: x.shape[0]].repeat_interleave(128, 1)
        elements = (x.float() / spread).to(torch.float8_e4m3fn)
    return fp8_block.dequantize(elements, scales, dtype)


def beyond(one, two):
    (a, gap_a), (b, gap_b) = one, two
    return np.abs(a - b) > gap_a + gap_b + bounds.ZONE * (np.abs(a) + np.abs(b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_a_passage_through_fp8_does_is_explained_in_its_direction(dtype, power_of_two):
    x = original()
    direct = intervals(quantized(x))
    through = intervals(quantized(through_fp8(x, dtype, power_of_two=power_of_two), APART))

    assert beyond(direct, through).sum() > 100
    assert strip_is_explained(*direct, *through)


def test_most_wrong_codes_beside_the_right_one_are_not_excused():
    """A sixteenth of the value excuses more than twice as many of them."""
    x = original()
    direct, made = intervals(quantized(x)), quantized(through_fp8(x), APART)
    rng = np.random.default_rng(0)
    planted = excused_by_scales = excused_by_gaps = 0
    while planted < 200:
        row, column = int(rng.integers(ROWS)), int(rng.integers(COLUMNS))
        code = int(made[0][row, column])
        size = (code & 7) + int(rng.choice([-1, 1]))
        if not 0 <= size <= 7:
            continue
        codes = made[0].copy()
        codes[row, column] = code & 8 | size
        faulty = intervals((codes, *made[1:]))
        if not beyond(direct, faulty)[row, column]:
            continue
        planted += 1
        block = np.s_[:, column // 128 * 128 : column // 128 * 128 + 128]
        parts = [side[block] for side in (*direct, *faulty)]
        excused_by_scales += strip_is_explained(*parts)
        (a, gap_a), (b, gap_b) = direct, faulty
        at = row, column
        more = max(abs(a[at]), abs(b[at])) / 16
        excused_by_gaps += abs(a[at] - b[at]) <= gap_a[at] + gap_b[at] + more

    assert excused_by_gaps > planted // 2
    assert 2 * excused_by_scales < excused_by_gaps


def test_a_few_wrong_codes_in_a_block_are_never_excused_together():
    x = original()
    direct, made = intervals(quantized(x)), quantized(through_fp8(x), APART)
    rng = np.random.default_rng(1)
    for _ in range(20):
        codes = made[0].copy()
        block = codes[:, :128]
        chosen = (rng.random(block.shape) < 0.001) & (block & 7 < 7)
        block[chosen] += 1

        faulty = intervals((codes, *made[1:]))

        if (beyond(direct, faulty) & ~beyond(direct, intervals(made))).sum() >= 4:
            assert not strip_is_explained(*direct, *faulty)


def checkpoint(golden, folder, made):
    folder.mkdir()
    shutil.copy(golden.nvfp4 / "config.json", folder)
    codes, scales, factor = made
    module = "model.layers.0.mlp.down_proj"
    save_file(
        {
            f"{module}.weight": packing.pack(torch.from_numpy(codes)),
            f"{module}.weight_scale": torch.from_numpy(scales).view(torch.float8_e4m3fn),
            f"{module}.weight_scale_2": torch.tensor(factor, dtype=torch.float32),
        },
        folder / "model.safetensors",
    )
    return open_checkpoint(folder)


def test_the_diagnosis_names_the_side_that_went_through_fp8(golden, tmp_path):
    x = original(300)
    direct = checkpoint(golden, tmp_path / "direct", quantized(x))
    made = quantized(through_fp8(x), APART)
    through = checkpoint(golden, tmp_path / "through", made)
    wrong = made[0].copy()
    wrong[200, ::7] ^= 1
    faulty = checkpoint(golden, tmp_path / "faulty", (wrong, *made[1:]))

    def found(a, b):
        return diff_checkpoints(a, b, DiffOptions()).weights[0]

    assert found(direct, through).cls is found(through, direct).cls is WeightClass.REQUANTIZED
    assert "b went through FP8 128x128" in found(direct, through).diagnosis
    assert "a went through FP8 128x128" in found(through, direct).diagnosis
    assert found(direct, through).bound_holds
    assert found(direct, faulty).cls is found(faulty, direct).cls is WeightClass.DIFFERENT


def test_a_rounding_to_bfloat16_on_the_way_is_named(golden, tmp_path):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(256, COLUMNS, generator=generator)
    exact = checkpoint(golden, tmp_path / "exact", quantized(x))
    rounded = checkpoint(golden, tmp_path / "rounded", quantized(x.bfloat16(), 1 + 2.0**-11))

    diff = diff_checkpoints(exact, rounded, DiffOptions()).weights[0]

    assert diff.cls is WeightClass.REQUANTIZED
    assert diff.beyond > 0
    assert "to bfloat16 on the way" in diff.diagnosis


def test_the_largest_rounding_to_bfloat16_is_granted(golden, tmp_path):
    """Just above a power of two half a unit is the largest part of a number, 2**-8.

    The number lies above the tie of its block, and below that of the other after it is rounded.
    """
    x = torch.full((16, COLUMNS), 1 + 2.0**-8 - 2.0**-12)
    x[:, ::16] = 2.40625  # 6 under a block scale of 1
    sides = []
    for name, values, tie in (
        ("exact", x, 1 + 2.0**-8 - 2.0**-11),
        ("rounded", x.bfloat16(), 1 + 2.0**-11),
    ):
        scale = torch.tensor(tie / 2.5)
        packed, scales = nvfp4.quantize(values, scale, Convention.MODELOPT)
        made = packing.unpack(packed).numpy(), scales.view(torch.uint8).numpy(), float(scale)
        sides.append(checkpoint(golden, tmp_path / name, made))

    diff = diff_checkpoints(*sides, DiffOptions()).weights[0]

    assert diff.beyond == 16 * COLUMNS * 15 // 16
    assert diff.cls is WeightClass.REQUANTIZED
    assert "to bfloat16 on the way" in diff.diagnosis
