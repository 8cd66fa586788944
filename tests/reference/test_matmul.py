"""The exact product: its certificate, its fallback and the stated orders."""

import itertools
from fractions import Fraction

import pytest
import torch

from nvfp4ref import e2m1, e4m3, packing
from nvfp4ref.matmul import (
    SEQUENTIAL,
    TENSOR_CORE,
    Accumulation,
    AccumulatorRounding,
    accumulate,
    exact,
    exact_of_elements,
    group_rows,
    grouped_matmul,
    matmul,
    operand,
    row_quantum,
)
from nvfp4ref.rounding import round_to


def random_operand(seed: int, rows: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, blocks * 8), generator=generator).to(torch.uint8)
    raw = torch.randint(1, 127, (rows, blocks), generator=generator).to(torch.uint8)
    return codes, raw.view(torch.float8_e4m3fn)


def real_product(a: torch.Tensor, b: torch.Tensor) -> list[list[Fraction]]:
    left = [[Fraction(x) for x in row] for row in a.tolist()]
    right = [[Fraction(x) for x in row] for row in b.tolist()]
    return [[sum(x * y for x, y in zip(r, s, strict=True)) for s in right] for r in left]


def test_an_operand_is_code_times_scale_exactly() -> None:
    codes = packing.pack(torch.arange(16, dtype=torch.uint8)).expand(127, -1)
    raw = torch.arange(127, dtype=torch.uint8).view(-1, 1)

    values = operand(codes, raw.view(torch.float8_e4m3fn))

    for byte, code in itertools.product(range(127), range(16)):
        expected = Fraction(e2m1.VALUES[code]) * Fraction(e4m3.VALUES[byte])
        assert Fraction(values[byte, code].item()) == expected


def test_the_certified_product_is_the_real_number() -> None:
    a, b = operand(*random_operand(0, 5, 24)), operand(*random_operand(1, 4, 24))

    product = exact_of_elements(a, b)

    assert product.exact
    real = real_product(a, b)
    for m, n in itertools.product(range(5), range(4)):
        assert Fraction(product.value[m, n].item()) == real[m][n]


def test_the_quantum_divides_every_term() -> None:
    a, b = operand(*random_operand(2, 3, 3)), operand(*random_operand(3, 3, 3))

    quantum = exact_of_elements(a, b).quantum

    terms = a.unsqueeze(1) * b.unsqueeze(0) / quantum.unsqueeze(-1)
    assert torch.equal(terms, terms.round())


def test_the_quantum_of_a_row_is_its_lowest_bit() -> None:
    rows = torch.tensor([[6.0, 0.0], [1.5, -4.0], [2.0**-10, 2688.0], [0.0, 0.0]])

    assert row_quantum(rows.double()).tolist() == [2.0, 0.5, 2.0**-10, 1.0]


def test_without_the_certificate_integers_give_the_real_number() -> None:
    """2**13 terms of 2688 * 2688 and one of 2**-20: float64 loses the small one in the sum."""
    k = 2**13
    a = torch.full((1, k), 2688.0, dtype=torch.float64)
    a[0, 0] = 2.0**-10
    b = a.clone()

    product = exact_of_elements(a, b)

    assert not product.exact
    real = Fraction(2) ** -20 + (k - 1) * Fraction(2688) ** 2
    assert product.value.item() == float(real)


def test_a_nan_scale_makes_its_row_nan_and_no_other() -> None:
    codes, scales = random_operand(4, 4, 3)
    codes[2] = 0
    scales.view(torch.uint8)[2, 1] = 0xFF

    product = exact(codes, scales, *random_operand(5, 6, 3))

    assert product.value[2].isnan().all()
    assert not product.value[[0, 1, 3]].isnan().any()
    assert product.exact


def test_orders_agree_where_every_sum_is_a_float32() -> None:
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(0, 256, (6, 128), generator=generator).to(torch.uint8)
    raw = torch.randint(0x38, 0x40, (6, 16), generator=generator).to(torch.uint8)
    a = operand(codes, raw.view(torch.float8_e4m3fn))
    truth = exact_of_elements(a, a)

    assert (truth.magnitude < 2**24 * truth.quantum).all()
    for order in (SEQUENTIAL, TENSOR_CORE, Accumulation(chunk=16, splits=3)):
        assert torch.equal(accumulate(a, a, order).double(), truth.value)


def test_truncation_rounds_toward_zero() -> None:
    a = torch.tensor([[2.0**24, 1.0, 2.0]], dtype=torch.float64)
    ones = torch.ones(1, 3, dtype=torch.float64)
    toward_zero = Accumulation(rounding=AccumulatorRounding.TOWARD_ZERO)

    assert accumulate(a, ones, toward_zero).item() == 2.0**24 + 2
    assert accumulate(-a, ones, toward_zero).item() == -(2.0**24 + 2)
    up = torch.tensor([[2.0**24, 3.0]], dtype=torch.float64)
    assert accumulate(up, ones[:, :2], SEQUENTIAL).item() == 2.0**24 + 4
    assert accumulate(up, ones[:, :2], toward_zero).item() == 2.0**24 + 2


def test_splits_are_summed_apart() -> None:
    a = torch.tensor([[2.0**24, 1.0, 1.0, 1.0]], dtype=torch.float64)
    ones = torch.ones(1, 4, dtype=torch.float64)

    assert accumulate(a, ones, SEQUENTIAL).item() == 2.0**24
    assert accumulate(a, ones, Accumulation(splits=2)).item() == 2.0**24 + 2


def test_alpha_and_the_dtype_are_one_rounding() -> None:
    a, b = random_operand(7, 9, 2), random_operand(8, 8, 2)
    alpha = torch.tensor(0.3)
    truth = exact(*a, *b).value

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = round_to(truth * alpha.double(), dtype)
        assert torch.equal(matmul(*a, *b, alpha, dtype), expected)


def test_a_grouped_product_is_the_products_of_its_groups() -> None:
    a = random_operand(9, 7, 3)
    b_codes, b_scales = random_operand(10, 15, 3)
    b = b_codes.view(3, 5, -1), b_scales.view(3, 5, -1)
    alpha = torch.tensor([1.0, 0.5, 3.0])
    offsets = torch.tensor([0, 4, 4, 7], dtype=torch.int32)

    out = grouped_matmul(*a, *b, alpha, offsets, torch.float32)

    first = matmul(a[0][:4], a[1][:4], b[0][0], b[1][0], alpha[0], torch.float32)
    last = matmul(a[0][4:], a[1][4:], b[0][2], b[1][2], alpha[2], torch.float32)
    assert torch.equal(out, torch.cat((first, last)))


@pytest.mark.parametrize("offsets", [[0, 3], [1, 2, 5], [0, 4, 3], [0, 6, 5]])
def test_offsets_that_do_not_span_the_rows_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets"):
        group_rows(torch.tensor(offsets), 2, 5)


def test_scales_of_another_shape_are_refused() -> None:
    codes, scales = random_operand(11, 2, 3)

    with pytest.raises(ValueError, match=r"need block scales \(2, 3\), found \(2, 2\)"):
        operand(codes, scales[:, :2])
