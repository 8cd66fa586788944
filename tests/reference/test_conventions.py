"""Every convention against its formula in exact fractions, and against cases seen in producers."""

import math
import random
from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from nvfp4ref import nvfp4, packing
from nvfp4ref.conventions import RULES, Convention, GlobalScale, Rules
from nvfp4ref.formats import BLOCK_SIZE

MODELOPT, MODELOPT_0_39 = Convention.MODELOPT, Convention.MODELOPT_0_39
COMPRESSED_TENSORS, TORCHAO = Convention.COMPRESSED_TENSORS, Convention.TORCHAO
TRANSFORMER_ENGINE, ENGINE = Convention.TRANSFORMER_ENGINE, Convention.ENGINE
ENGINE_VLLM, VLLM_REFERENCE = Convention.ENGINE_VLLM, Convention.VLLM_REFERENCE
INF, NAN = math.inf, math.nan

E4M3_UNITS = [*range(8), *((8 + m) << e for e in range(15) for m in range(8))][:127]  # of 2**-9


def f32(exact: Fraction) -> Fraction:
    """Round to float32 through integers: 24 bits, or a multiple of 2**-149, ties to even."""
    if exact == 0:
        return exact
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    while Fraction(2) ** exponent > abs(exact):
        exponent -= 1
    unit = Fraction(2) ** max(exponent - 23, -149)
    return round(exact / unit) * unit


def bf16(exact: Fraction) -> Fraction:
    """Round to bfloat16 through its float32 bits, from a value that needs no float32 rounding."""
    exponent = math.floor(math.log2(exact)) if exact else 0
    unit = Fraction(2) ** (exponent - 7)
    return round(exact / unit) * unit


def e4m3(exact: Fraction) -> int:
    units = exact * 512
    above = bisect_left(E4M3_UNITS, units)
    if above in (0, len(E4M3_UNITS)):
        return min(above, 126)
    gap = 2 * units - E4M3_UNITS[above] - E4M3_UNITS[above - 1]
    return above - 1 if gap < 0 or (gap == 0 and above % 2) else above


def e2m1(exact: Fraction) -> int:
    ties = [Fraction(tie) for tie in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)]
    magnitude = abs(exact)
    code = bisect_left(ties, magnitude)
    if code < 7 and magnitude == ties[code] and code % 2:
        code += 1
    return code + 8 * (exact < 0)


SIXTH = f32(Fraction(1, 6))

#: Block scale before E4M3 from A, D, E; element from x, S, D, E. One f32() for each operation.
FORMULAS: dict[Convention, tuple[Callable[..., Fraction], Callable[..., Fraction]]] = {
    MODELOPT: (
        lambda a, d, e: max(f32(a / f32(6 * d)), Fraction(1, 512)),
        lambda x, s, d, e: f32(x / f32(s * d)),
    ),
    MODELOPT_0_39: (
        lambda a, d, e: f32(a / f32(6 * d)),
        lambda x, s, d, e: f32(x / f32(s * d)),
    ),
    COMPRESSED_TENSORS: (
        lambda a, d, e: f32(e * f32(a / 6)),
        lambda x, s, d, e: f32(x / f32(s / e)),
    ),
    TORCHAO: (
        lambda a, d, e: max(f32(f32(a / 6) / d), Fraction(1, 64)),
        lambda x, s, d, e: f32(x * f32(f32(1 / d) / s)),
    ),
    Convention.TORCHAO_0_14: (
        lambda a, d, e: max(f32(f32(a / 6) / d), Fraction(1, 64)),
        lambda x, s, d, e: f32(x / f32(s * d)),
    ),
    TRANSFORMER_ENGINE: (
        lambda a, d, e: f32(a * f32(e * SIXTH)),
        lambda x, s, d, e: f32(x * f32(1 / f32(s * f32(1 / e)))),
    ),
} | dict.fromkeys(
    [ENGINE, ENGINE_VLLM, VLLM_REFERENCE],
    (
        lambda a, d, e: f32(e * f32(a * SIXTH)),
        lambda x, s, d, e: f32(x * f32(1 / f32(s * f32(1 / e)))),
    ),
)


def blocks(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of one block each, magnitudes over 2**-6 to 1, some of them on ties."""
    generator = random.Random(seed)
    rows = []
    for _ in range(60):
        amplitude = 2.0 ** generator.uniform(-6, 0)
        rows.append([generator.gauss(0, 0.3) * amplitude for _ in range(BLOCK_SIZE)])
    for tie in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0):
        rows.append([tie / 8, -tie / 8, 6 / 8, *([tie / 16] * 13)])
    return torch.tensor(rows).to(dtype)


def test_every_convention_has_rules_and_a_formula() -> None:
    assert set(RULES) == set(Convention) == set(FORMULAS)
    for rules in RULES.values():
        assert rules.source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("convention", Convention)
def test_scales_and_codes_follow_the_formula_rounding_by_rounding(
    convention: Convention, dtype: torch.dtype
) -> None:
    ideal, element = FORMULAS[convention]
    x = blocks(list(Convention).index(convention), dtype)
    decode = nvfp4.global_decode_scale(x.abs().amax(), convention)
    encode = decode.reciprocal()
    d, e = Fraction(decode.item()), Fraction(encode.item())
    expected_scales, expected_codes = [], []
    for row in x.float().tolist():
        amax = max(map(abs, map(Fraction, row)))
        if convention is COMPRESSED_TENSORS and dtype is torch.bfloat16:
            scale = e4m3(f32(e * bf16(amax / 6)))
        else:
            scale = e4m3(ideal(amax, d, e))
        s = Fraction(E4M3_UNITS[scale], 512)
        expected_scales.append(scale)
        expected_codes.append([e2m1(element(Fraction(value), s, d, e)) for value in row])

    packed, scales = nvfp4.quantize(x, decode, convention)

    assert scales.view(torch.uint8).flatten().tolist() == expected_scales
    assert packing.unpack(packed).tolist() == expected_codes


def test_the_conventions_are_told_apart_by_the_blocks_of_this_file() -> None:
    """Two conventions that never differ here would make the test above say less than it seems."""
    x = blocks(0, torch.float32)
    x[:8] *= 2.0**-14  # scales below 2**-6
    x[8:16] *= 2.0**-24  # scales below 2**-10
    x[16:20] = -0.0
    decode = nvfp4.global_decode_scale(x.abs().amax(), MODELOPT)
    seen = {}
    for convention in Convention:
        packed, scales = nvfp4.quantize(x, decode, convention)
        seen[convention] = (packed.numpy().tobytes(), scales.view(torch.uint8).numpy().tobytes())

    assert len(set(seen.values())) == len(Convention)


# Cases recorded from the producers themselves: tensor amax, elements -> block scale, codes.

ZEROS = [0.0] * 4
NEGATIVE_ZEROS = [-0.0] * 4
LOST = [7e-13, -1.0e-11, 3e-12, 5e-12]
HALF_LOST = [-1.259e-6, 4.351e-6, -1e-7, 3e-6]


@pytest.mark.parametrize(
    ("convention", "amax", "elements", "scale", "codes"),
    [
        (MODELOPT, 4.84375, ZEROS, 0x38, "0000"),
        (MODELOPT_0_39, 4.84375, ZEROS, 0x38, "0000"),
        (TRANSFORMER_ENGINE, 4.84375, ZEROS, 0x00, "0000"),
        (VLLM_REFERENCE, 4.84375, ZEROS, 0x00, "0000"),
        (ENGINE, 4.84375, ZEROS, 0x00, "0000"),
        (ENGINE_VLLM, 4.84375, ZEROS, 0x00, "0000"),
        (COMPRESSED_TENSORS, 4.84375, ZEROS, 0x20, "0000"),
        (TORCHAO, 4.84375, ZEROS, 0x08, "0000"),
        (MODELOPT, 4.84375, NEGATIVE_ZEROS, 0x38, "0000"),
        (TORCHAO, 4.84375, NEGATIVE_ZEROS, 0x08, "8888"),
        (COMPRESSED_TENSORS, 4.84375, NEGATIVE_ZEROS, 0x20, "0000"),
        (ENGINE, 4.84375, NEGATIVE_ZEROS, 0x00, "8888"),
        (MODELOPT_0_39, 4.0625, LOST, 0x00, "7f77"),
        (TRANSFORMER_ENGINE, 4.0625, LOST, 0x00, "7f77"),
        (ENGINE, 4.0625, LOST, 0x00, "7f77"),
        (MODELOPT, 4.0625, LOST, 0x01, "0800"),
        (COMPRESSED_TENSORS, 4.0625, LOST, 0x20, "0800"),
        (TORCHAO, 4.0625, LOST, 0x08, "0800"),
        (VLLM_REFERENCE, 4.0625, LOST, 0x00, "0800"),
        (ENGINE_VLLM, 4.0625, LOST, 0x00, "0800"),
        (MODELOPT_0_39, 4.0625, HALF_LOST, 0x00, "f7f7"),
        (MODELOPT, 4.0625, HALF_LOST, 0x01, "9382"),
    ],
)
def test_a_recorded_edge_case_comes_out_as_recorded(
    convention: Convention, amax: float, elements: list[float], scale: int, codes: str
) -> None:
    x = torch.tensor([elements * 4])
    decode = nvfp4.global_decode_scale(torch.tensor(amax), convention)

    packed, scales = nvfp4.quantize(x, decode, convention)

    assert scales.view(torch.uint8).tolist() == [[scale]]
    assert packing.unpack(packed).tolist() == [[int(code, 16) for code in codes] * 4]


@pytest.mark.parametrize(
    ("convention", "scale", "code"),
    [
        (MODELOPT, 0x7F, 7),
        (MODELOPT_0_39, 0x7F, 7),
        (TORCHAO, 0x7F, 3),
        (COMPRESSED_TENSORS, 0x20, 0),
        (TRANSFORMER_ENGINE, 0x00, 0),
    ],
)
def test_a_tensor_of_zeros_comes_out_as_recorded(
    convention: Convention, scale: int, code: int
) -> None:
    x = torch.zeros(2, 32)
    decode = nvfp4.global_decode_scale(x.amax(), convention)
    encode = nvfp4.global_encode_scale(x.amax(), convention)

    packed, scales = nvfp4.quantize(x, decode, convention, global_encode_scale=encode)

    assert scales.view(torch.uint8).unique().tolist() == [scale]
    assert packing.unpack(packed).unique().tolist() == [code]


@pytest.mark.parametrize("convention", Convention)
def test_a_nan_poisons_its_block_only_and_not_that_of_an_engine(convention: Convention) -> None:
    x = torch.ones(1, 32)
    x[0, 3] = NAN
    decode = torch.tensor(1 / 448)

    packed, scales = nvfp4.quantize(x, decode, convention)

    codes, rules = packing.unpack(packed), RULES[convention]
    first, second = scales.view(torch.uint8)[0].tolist()
    assert codes[0, 3] == rules.nan_code
    assert codes[0, 16:].unique().numel() == 1
    if convention in (ENGINE, ENGINE_VLLM):
        assert first == second
        assert codes[0, :3].tolist() == codes[0, 16:19].tolist()
    else:
        assert (first, second != 0x7F) == (0x7F, True)
        assert codes[0, :16].unique().tolist() == [rules.nan_code]


@pytest.mark.parametrize("convention", Convention)
def test_an_infinity_takes_the_largest_scale_and_the_largest_code(convention: Convention) -> None:
    x = torch.full((1, 16), 6.0)
    x[0, :2] = torch.tensor([INF, -INF])

    packed, scales = nvfp4.quantize(x, torch.tensor(1 / 448), convention)

    assert scales.view(torch.uint8).item() == 0x7E
    assert packing.unpack(packed)[0].tolist() == [7, 15] + [7] * 14


@pytest.mark.parametrize("convention", Convention)
def test_a_block_beyond_the_global_scale_is_clipped(convention: Convention) -> None:
    x = torch.tensor([[1.0, -2.0, 8.0, -32.0] * 4])  # four times what the global scale expects

    packed, scales = nvfp4.quantize(x, torch.tensor(8.0 / 2688), convention)

    assert scales.view(torch.uint8).item() == 0x7E
    assert packing.unpack(packed)[0, :4].tolist() == [2, 11, 7, 15]


def test_the_two_engines_differ_only_where_the_scale_is_lost() -> None:
    x = torch.tensor([[1.0] * 16 + [1e-9, -1e-9, 0.0, -0.0] * 4])
    decode = torch.tensor(1 / 2688)
    theirs, scales = nvfp4.quantize(x, decode, ENGINE)
    vllms, vllm_scales = nvfp4.quantize(x, decode, ENGINE_VLLM)

    assert torch.equal(scales.view(torch.uint8), vllm_scales.view(torch.uint8))
    assert packing.unpack(theirs)[0, 16:20].tolist() == [7, 15, 7, 7]  # 0 * infinity is NaN: +6
    assert packing.unpack(vllms)[0, 16:20].tolist() == [0, 8, 0, 8]
    assert torch.equal(theirs[:, :8], vllms[:, :8])


def test_an_engine_with_a_global_scale_of_infinity_gives_six_everywhere() -> None:
    """Recorded by NVIDIA: an encode scale of zero makes every scale 0 and every code +6."""
    packed, scales = nvfp4.quantize(torch.ones(1, 16), torch.tensor(INF), ENGINE)

    assert scales.view(torch.uint8).item() == 0
    assert packing.unpack(packed).unique().tolist() == [7]


def test_a_negative_global_scale_gives_engines_negative_block_scales() -> None:
    _, scales = nvfp4.quantize(torch.ones(1, 16), torch.tensor(-1 / 2688), ENGINE)

    assert scales.view(torch.uint8).item() == 0xFE


def test_the_legal_global_scales_of_modelopt_lie_within_two_ulp() -> None:
    bits = torch.arange(0x2000, 0x7F80, dtype=torch.int16)  # bfloat16 from 2**-63 to the largest
    amax = bits.view(torch.bfloat16)
    once, twice, times, times_twice = nvfp4.legal_global_decode_scales(amax, MODELOPT_0_39)

    def ulps(scale: torch.Tensor) -> torch.Tensor:
        return (scale.view(torch.int32) - once.view(torch.int32)).abs()

    assert torch.equal(once, (amax.double() / 2688).float())
    assert ulps(twice).unique().tolist() == [0, 1]
    assert ulps(times).unique().tolist() == [0, 1]
    assert ulps(times_twice).unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("convention", [MODELOPT, TORCHAO, ENGINE])
def test_a_decode_scale_is_amax_over_2688(convention: Convention) -> None:
    amax = torch.tensor([2688.0, 1.0, 4.84375, 0.0])
    expected = [f32(Fraction(value) / 2688) for value in amax.tolist()]

    assert nvfp4.global_decode_scale(amax, convention).tolist() == [float(e) for e in expected]


def test_compressed_tensors_computes_its_global_scale_in_the_dtype_of_the_weight() -> None:
    """Recorded: a bfloat16 weight with amax 4.84375 has 552, a float32 one 554.94195..."""
    in_bfloat16 = nvfp4.global_encode_scale(
        torch.tensor(4.84375, dtype=torch.bfloat16), COMPRESSED_TENSORS
    )
    in_float32 = nvfp4.global_encode_scale(torch.tensor(4.84375), COMPRESSED_TENSORS)

    assert in_bfloat16.item() == 552.0
    assert in_float32.item() == 554.9419555664062
    assert in_bfloat16.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_puts_one_for_an_encode_scale_that_is_not_finite(
    dtype: torch.dtype,
) -> None:
    amax = torch.tensor([0.0, 1e-45, NAN, INF], dtype=dtype)

    assert nvfp4.global_encode_scale(amax, COMPRESSED_TENSORS).tolist() == [1.0, 1.0, 1.0, 0.0]


def test_transformer_engine_caps_its_encode_scale() -> None:
    scales = nvfp4.global_encode_scale(torch.tensor([0.0, INF]), TRANSFORMER_ENGINE)

    assert scales.tolist() == [torch.finfo(torch.float32).max, 1.0]


def test_rules_name_only_formulas_that_exist() -> None:
    for rules in RULES.values():
        assert isinstance(rules, Rules)
        assert rules.global_scale not in rules.other_global_scales
        assert set(rules.other_global_scales) <= set(GlobalScale)
