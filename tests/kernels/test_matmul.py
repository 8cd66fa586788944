import pytest
import torch

from nvfp4check.kernels import matmul as kernels
from nvfp4check.kernels.swizzle import swizzle
from nvfp4ref import matmul as reference

SHAPES = [
    (0, 16, 32),
    (1, 16, 16),
    (7, 33, 48),
    (8, 129, 64),
    (65, 130, 96),
    (129, 257, 320),
    (3, 5, 1056),
]


def operands(rows: tuple[int, int], k: int, generator, lowest: int, highest: int):
    """Codes and scales of A and B, scale bytes from lowest to highest."""
    made = []
    for count in rows:
        codes = torch.randint(0, 256, (count, k // 2), generator=generator).to(torch.uint8)
        raw = torch.randint(lowest, highest + 1, (count, k // 16), generator=generator)
        made += [codes, raw.to(torch.uint8).view(torch.float8_e4m3fn)]
    return made


def within_the_bound(found, a_codes, a_scales, b_codes, b_scales, alpha) -> bool:
    """|y - alpha A B^T| <= (S + 4) u alpha |A||B|^T + u_out |alpha A B^T|, S = K/16 additions.

    u = 2**-23: a float32 addition that truncates; u_out = half an ulp of the output's dtype. What
    the output cannot hold above its largest subnormal step is added.
    """
    exact = reference.exact(a_codes, a_scales, b_codes, b_scales)
    want = exact.value * alpha.double()
    u_out = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    steps = a_codes.shape[1] * 2 / 16
    bound = (steps + 4) * 2.0**-23 * alpha.double().abs() * exact.magnitude
    bound = bound * (1 + u_out[found.dtype]) + u_out[found.dtype] * want.abs() + 2.0**-24
    return bool(((found.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", [kernels.matmul, kernels._matmul_pointer])
def test_the_product_is_within_the_derived_bound(path, shape, dtype, generator):
    m, n, k = shape
    given = operands((m, n), k, generator, 0x28, 0x40)
    alpha = torch.tensor(0.37)

    found = path(*given, alpha, dtype)

    assert found.shape == (m, n)
    assert found.dtype == dtype
    assert within_the_bound(found, *given, alpha)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", [kernels.matmul, kernels._matmul_pointer])
def test_where_no_order_rounds_the_product_is_exact(path, shape, generator):
    # Scales of 1: products of at most 36 in steps of 1/4, so 24 bits hold every sum of 1056.
    m, n, k = shape
    given = operands((m, n), k, generator, 0x38, 0x38)
    alpha = torch.tensor(0.5)

    found = path(*given, alpha, torch.float32)

    assert torch.equal(found, reference.matmul(*given, alpha, torch.float32))


@pytest.mark.parametrize("path", [kernels.matmul, kernels._matmul_pointer])
def test_each_block_meets_its_own_scale(path, generator):
    # Row i of A has one element; it returns column i of B, whose blocks all differ in scale.
    k = 96
    a_codes = torch.zeros(k, k // 2, dtype=torch.uint8)
    for i in range(k):
        a_codes[i, i // 2] = 0x2 << (4 * (i % 2))  # 1.0
    one = torch.full((k, k // 16), 1.0).to(torch.float8_e4m3fn)
    b_codes, b_scales = operands((33,), k, generator, 0, 0x7E)

    found = path(a_codes, one, b_codes, b_scales, torch.tensor(1.0), torch.float32)

    assert torch.equal(found, reference.operand(b_codes, b_scales).T.float())


@pytest.mark.parametrize("rows", [3, 130])
def test_swizzled_scales_give_the_same_product(rows, generator):
    a_codes, a_scales, b_codes, b_scales = operands((rows, 140), 192, generator, 0x38, 0x38)
    alpha = torch.tensor(1.5)

    found = kernels.matmul_swizzled(
        a_codes, swizzle(a_scales), b_codes, swizzle(b_scales), alpha, torch.float32
    )

    expected = reference.matmul(a_codes, a_scales, b_codes, b_scales, alpha, torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("path", [kernels.matmul, kernels._matmul_pointer])
def test_a_nan_scale_reaches_its_row_and_no_other(path, generator):
    a_codes, a_scales, b_codes, b_scales = operands((70, 20), 64, generator, 0x38, 0x38)
    a_scales.view(torch.uint8)[5, 2] = 0x7F

    found = path(a_codes, a_scales, b_codes, b_scales, torch.tensor(1.0), torch.float32)

    assert bool(found[5].isnan().all())
    assert int(found.isnan().sum()) == 20


def test_codes_that_tma_cannot_read_take_the_other_path(generator):
    a_codes, a_scales, b_codes, b_scales = operands((9, 17), 96, generator, 0x38, 0x38)
    wide = torch.zeros(9, 60, dtype=torch.uint8)
    wide[:, 5:53] = a_codes
    shifted = wide[:, 5:53]

    assert not kernels.tma_reads(shifted)
    found = kernels.matmul(shifted, a_scales, b_codes, b_scales, torch.tensor(1.0), torch.float32)

    expected = reference.matmul(
        a_codes, a_scales, b_codes, b_scales, torch.tensor(1.0), torch.float32
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_codes": torch.zeros(4, 24, dtype=torch.uint8)}, r"b_codes: shape \(4, 24\)"),
        ({"a_scales": torch.zeros(2, 3).to(torch.float8_e4m3fn)}, r"a_scales: shape \(2, 3\)"),
        ({"b_scales": torch.zeros(4, 2)}, "b_scales: dtype torch.float32"),
        ({"alpha": torch.ones(2)}, r"alpha: shape \(2,\)"),
        ({"dtype": torch.int32}, "dtype torch.int32"),
    ],
)
def test_operands_that_do_not_fit_are_refused_in_words(change, message):
    scales = torch.zeros(4, 2).to(torch.float8_e4m3fn)
    given = {
        "a_codes": torch.zeros(2, 16, dtype=torch.uint8),
        "a_scales": scales[:2],
        "b_codes": torch.zeros(4, 16, dtype=torch.uint8),
        "b_scales": scales,
        "alpha": torch.tensor(1.0),
        "dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        kernels.matmul(**{**given, **change})


def test_swizzled_scales_with_padding_along_k_are_refused():
    codes = torch.zeros(128, 48, dtype=torch.uint8)
    scales = torch.zeros(1024).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="K = 96: swizzled scales"):
        kernels.matmul_swizzled(codes, scales, codes, scales, torch.tensor(1.0))
