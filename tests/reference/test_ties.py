"""What explains a difference is a tie or a rounding, and nothing else is explained."""

import itertools

import pytest
import torch

from nvfp4ref import e2m1, e4m3, nvfp4, packing, ties
from nvfp4ref.conventions import Convention
from nvfp4ref.formats import BLOCK_SIZE
from nvfp4ref.ties import Cause

#: Global scales whose products with E4M3 round in many ways.
DECODES = torch.linspace(0.0005, 0.001, 24)
ONE = torch.full((1, 1), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
ERROR = 2 * 2.0**-24


def explain_one(actual: int, expected: int, value: float, scale: float = 1.0) -> Cause:
    """Explain one code of a block whose scale is one."""
    x, codes = torch.zeros(1, BLOCK_SIZE), torch.zeros(1, BLOCK_SIZE, dtype=torch.uint8)
    x[0, 0] = value
    mine, theirs = codes.clone(), codes.clone()
    mine[0, 0], theirs[0, 0] = actual, expected
    causes = ties.explain_codes(mine, theirs, x, ONE, torch.tensor(scale), ERROR)
    assert causes[0, 1:].eq(Cause.EQUAL).all()
    return Cause(int(causes[0, 0]))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("lower", range(7))
def test_neighbours_at_their_midpoint_are_an_exact_tie(lower: int, sign: int) -> None:
    value = sign * e2m1.MIDPOINTS[lower]
    sign_bit = 8 * (sign < 0)

    assert explain_one(lower + sign_bit, lower + 1 + sign_bit, value) is Cause.EXACT_TIE
    assert explain_one(lower + 1 + sign_bit, lower + sign_bit, value) is Cause.EXACT_TIE


@pytest.mark.parametrize("lower", range(7))
def test_neighbours_one_ulp_from_their_midpoint_are_a_near_tie(lower: int) -> None:
    tie = torch.tensor(e2m1.MIDPOINTS[lower])
    beside = tie.nextafter(torch.tensor(0.0)).item()

    assert explain_one(lower, lower + 1, beside) is Cause.NEAR_TIE


@pytest.mark.parametrize("lower", range(7))
def test_neighbours_farther_from_their_midpoint_differ_really(lower: int) -> None:
    farther = e2m1.MIDPOINTS[lower] * (1 + 2.0**-21)

    assert explain_one(lower, lower + 1, farther) is Cause.REAL


@pytest.mark.parametrize(
    ("actual", "expected", "value"),
    [
        (0, 2, 0.25),  # two steps
        (1, 10, 0.75),  # the other sign
        (9, 2, 0.75),
        (6, 7, 3.5),  # the midpoint of another pair
        (3, 5, 0.0),
    ],
)
def test_a_planted_fault_is_real(actual: int, expected: int, value: float) -> None:
    assert explain_one(actual, expected, value) is Cause.REAL


def test_the_two_zeros_are_the_same_value() -> None:
    assert explain_one(0, 8, -0.0) is Cause.SAME_VALUE


def test_a_tie_of_the_unrounded_global_scale_is_exact_when_the_amax_is_known() -> None:
    amax, value, scale = 4.84375, 0.0023651123046875, 1.75
    assert value * 2688 == 0.75 * scale * amax  # exact in float64
    x = torch.full((1, BLOCK_SIZE), value)
    mine = torch.full((1, BLOCK_SIZE), 1, dtype=torch.uint8)
    scales = torch.tensor([[scale]]).to(torch.float8_e4m3fn)
    stored = torch.tensor(amax) / 2688

    without = ties.explain_codes(mine, mine + 1, x, scales, stored, ERROR)
    knowing = ties.explain_codes(mine, mine + 1, x, scales, stored, ERROR, torch.tensor(amax))

    assert without.eq(Cause.NEAR_TIE).all()
    assert knowing.eq(Cause.EXACT_TIE).all()


@pytest.mark.parametrize("lower", range(126))
def test_a_block_scale_on_a_midpoint_is_an_exact_tie(lower: int) -> None:
    pair = torch.tensor([[lower, lower + 1]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    amax = torch.tensor([[6 * e4m3.MIDPOINTS[lower]]])

    exact = ties.explain_block_scales(pair[:, :1], pair[:, 1:], amax, torch.tensor(1.0), ERROR)
    near = ties.explain_block_scales(
        pair[:, :1], pair[:, 1:], amax.nextafter(2 * amax), torch.tensor(1.0), ERROR
    )
    far = ties.explain_block_scales(
        pair[:, :1], pair[:, 1:], amax * (1 + 2.0**-20), torch.tensor(1.0), ERROR
    )

    assert [exact.item(), near.item(), far.item()] == [
        Cause.EXACT_TIE,
        Cause.NEAR_TIE,
        Cause.REAL,
    ]


@pytest.mark.parametrize(
    ("actual", "expected", "cause"),
    [
        (0x7F, 0xFF, Cause.SAME_VALUE),
        (0x00, 0x80, Cause.SAME_VALUE),
        (0x38, 0x38, Cause.EQUAL),
        (0x38, 0x3A, Cause.REAL),
        (0x7E, 0x7F, Cause.REAL),
        (0x00, 0x38, Cause.REAL),
        (0x38, 0xB9, Cause.REAL),
    ],
)
def test_block_scales_that_no_rounding_explains_are_real(
    actual: int, expected: int, cause: Cause
) -> None:
    pair = torch.tensor([[actual, expected]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    causes = ties.explain_block_scales(
        pair[:, :1], pair[:, 1:], torch.tensor([[6.0]]), torch.tensor(1.0), ERROR
    )

    assert causes.item() == cause


def beside_ties(decode: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks of elements up to `reach` ulp from a midpoint, and their block scales."""
    generator = torch.manual_seed(0)
    bytes_ = torch.randint(0x08, 0x7F, (4096, 1), generator=generator, dtype=torch.uint8)
    scales = bytes_.view(torch.float8_e4m3fn)
    middles = torch.tensor(e2m1.MIDPOINTS).double()
    picked = middles[torch.randint(0, 7, (4096, BLOCK_SIZE), generator=generator)]
    exact = picked * scales.double() * decode.double()
    ulps = torch.randint(-reach, reach + 1, exact.shape, generator=generator).double()
    return (exact * (1 + ulps * 2.0**-24)).float(), scales


@pytest.mark.parametrize(("left", "right"), list(itertools.combinations(Convention, 2)))
def test_between_two_conventions_only_ties_and_roundings_differ(
    left: Convention, right: Convention
) -> None:
    decode = torch.tensor(1 / 1170.2857)
    x, scales = beside_ties(decode, reach=8)
    codes = [nvfp4.quantize_elements(x, scales, decode, side) for side in (left, right)]
    error = max(ties.element_error(left), ties.element_error(right))

    causes = ties.explain_codes(codes[0], codes[1], x, scales, decode, error)

    assert not causes.eq(Cause.REAL).any()


@pytest.mark.parametrize("convention", Convention)
def test_the_bound_of_a_convention_holds_and_is_not_idle(convention: Convention) -> None:
    """Against exact rounding, wrong codes lie within the bound, and some beyond a third of it."""
    bound = ties.element_error(convention)
    explained, with_a_third = [], []
    for decode in DECODES:
        x, scales = beside_ties(decode, reach=10)
        quotients = x.double() / (scales.double() * decode.double())  # no float32 is so near a tie
        exact = e2m1.encode(quotients)
        codes = nvfp4.quantize_elements(x, scales, decode, convention)
        explained.append(ties.explain_codes(codes, exact, x, scales, decode, bound))
        with_a_third.append(ties.explain_codes(codes, exact, x, scales, decode, bound / 3))

    assert not torch.stack(explained).eq(Cause.REAL).any()
    assert torch.stack(with_a_third).eq(Cause.REAL).any()


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_scales_beside_midpoints_differ_from_exact_ones_within_the_bound(
    convention: Convention, dtype: torch.dtype
) -> None:
    middles = torch.tensor(e4m3.MIDPOINTS[8:126]).double()
    ulps = torch.arange(-12, 13).double() * torch.finfo(dtype).eps / 2
    bound = ties.scale_error(convention, dtype)
    causes = []
    for decode in DECODES:
        amax = ((6 * middles * decode.double()).unsqueeze(1) * (1 + ulps)).flatten()
        amax = amax.to(dtype).unsqueeze(1)
        exact = e4m3.encode(amax.double() / (6 * decode.double())).view(torch.float8_e4m3fn)
        scales = nvfp4.quantize_block_scales(amax.expand(-1, BLOCK_SIZE), decode, convention)
        causes.append(ties.explain_block_scales(scales, exact, amax, decode, bound))

    assert not torch.stack(causes).eq(Cause.REAL).any()
    # a bfloat16 amax comes no nearer to a midpoint than 2**-9, where float32 steps do not reach
    narrow = dtype is torch.bfloat16 and convention is not Convention.COMPRESSED_TENSORS
    assert torch.stack(causes).eq(Cause.NEAR_TIE).any() != narrow


def test_an_approximate_reciprocal_widens_the_bound() -> None:
    engine = Convention.ENGINE
    exact, approximate = ties.element_error(engine), ties.element_error(engine, reciprocal_ulps=2)

    assert exact == pytest.approx(5 * 2.0**-24, rel=1e-6)
    assert approximate == pytest.approx((2 + 3 * 4) * 2.0**-24, rel=1e-6)
    assert ties.element_error(Convention.MODELOPT) == ties.element_error(
        Convention.MODELOPT, reciprocal_ulps=2
    )


def test_a_swapped_pair_of_codes_is_real() -> None:
    x = torch.randn(16, 64, generator=torch.manual_seed(3))
    decode = nvfp4.global_decode_scale(x.abs().amax(), Convention.MODELOPT)
    packed, scales = nvfp4.quantize(x, decode, Convention.MODELOPT)
    swapped = packing.unpack((packed << 4) | (packed >> 4))

    causes = ties.explain_codes(swapped, packing.unpack(packed), x, scales, decode, ERROR)

    assert causes.eq(Cause.REAL).sum() > causes.numel() / 2
