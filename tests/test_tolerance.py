"""The derived tolerance: its terms, where bits are due, and what a kernel declares."""

import math

import pytest
import torch

from nvfp4check import compare
from nvfp4check.findings import CheckError
from nvfp4check.tolerance import (
    Accumulator,
    Facts,
    Probabilistic,
    Reciprocal,
    Rounding,
    bits_are_due,
    of_product,
)
from nvfp4ref.matmul import (
    Accumulation,
    AccumulatorRounding,
    ExactProduct,
    accumulate,
    exact_of_elements,
)
from nvfp4ref.rounding import round_to

ONE = torch.tensor(1.0)


def product_of(
    seed: int, rows: int, k: int, step: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor, ExactProduct]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-12, 13, (rows, k), generator=generator).double() * step
    b = torch.randint(-12, 13, (rows, k), generator=generator).double() * 0.5
    return a, b, exact_of_elements(a, b)


def test_the_bound_is_the_sum_of_its_terms() -> None:
    _, _, product = product_of(0, 4, 64)
    alpha = torch.tensor(0.3)

    allowed = of_product(product, alpha, 64, Facts(), torch.bfloat16)

    scale = abs(alpha.double())
    expected = (4 + 4) * 2.0**-23 * scale * product.magnitude
    assert torch.equal(allowed.terms["accumulation"], expected)
    assert torch.equal(allowed.terms["output rounding"], 2.0**-8 * (scale * product.value).abs())
    assert (allowed.terms["smallest subnormal"] == 2.0**-133).all()
    assert torch.allclose(allowed.allowed, sum(allowed.terms.values()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("facts", "count", "roundoff"),
    [
        (Facts(), 4, 2.0**-23),
        (Facts(accumulator_rounding=Rounding.NEAREST), 4, 2.0**-24),
        (Facts(accumulator_rounding=Rounding.TOWARD_ZERO, accumulation_chunk=64), 1, 2.0**-23),
        (Facts(accumulation_chunk=1), 64, 2.0**-23),
        (
            Facts(accumulator=Accumulator.BFLOAT16, accumulator_rounding=Rounding.NEAREST),
            4,
            2.0**-8,
        ),
    ],
)
def test_a_declared_accumulator_sets_the_count_and_the_roundoff(
    facts: Facts, count: int, roundoff: float
) -> None:
    assert facts.roundings(64) == count
    assert facts.accumulator_roundoff == roundoff


def test_the_probabilistic_bound_grows_with_the_root_and_states_its_risk() -> None:
    _, _, product = product_of(1, 4, 4096)
    nearest = Facts(accumulator_rounding=Rounding.NEAREST)

    plain = of_product(product, ONE, 4096, nearest, torch.float32)
    likely = of_product(product, ONE, 4096, nearest, torch.float32, probabilistic=Probabilistic(6))

    ratio = likely.terms["accumulation"] / plain.terms["accumulation"]
    expected = torch.full_like(ratio, 6 / math.sqrt(256 + 4))
    assert torch.allclose(ratio, expected, rtol=8 * 2**-53, atol=0)  # eight float64 roundings
    assert "3.0e-08" in likely.why


def test_truncation_has_no_probabilistic_bound() -> None:
    _, _, product = product_of(2, 2, 16)

    with pytest.raises(CheckError, match="declare accumulator_rounding = 'nearest'"):
        of_product(product, ONE, 16, Facts(), torch.float32, probabilistic=Probabilistic())


def test_bits_are_due_up_to_the_last_float32_integer_and_not_beyond() -> None:
    k = 4
    a = torch.full((1, k), 2.0**22 - 1, dtype=torch.float64) / 2**10
    below = exact_of_elements(a, torch.ones(1, k, dtype=torch.float64))
    beyond = exact_of_elements(a + 2.0**-10, torch.ones(1, k, dtype=torch.float64))

    assert below.magnitude.item() < 2**24 * below.quantum.item()
    assert bits_are_due(below, ONE, Facts()).all()
    odd = torch.tensor([[2.0**14, 2.0**-10, 2.0**-10, 2.0**-10]], dtype=torch.float64)
    lossy = exact_of_elements(odd, torch.ones(1, k, dtype=torch.float64))
    assert not bits_are_due(lossy, ONE, Facts()).any()
    assert bits_are_due(beyond, ONE, Facts()).all(), "equal steps of 2**12: a coarser quantum"


def test_where_bits_are_due_every_order_gives_them() -> None:
    for seed in range(5):
        a, b, product = product_of(seed, 6, 256, step=0.125)
        due = bits_are_due(product, ONE, Facts())
        assert due.all()
        for rounding in AccumulatorRounding:
            for chunk, splits in ((1, 1), (16, 1), (48, 3), (64, 2)):
                order = Accumulation(chunk=chunk, rounding=rounding, splits=splits)
                assert torch.equal(accumulate(a, b, order).double(), product.value)


@pytest.mark.parametrize("alpha", [0.3, 3.0, -1.0, 0.0, 2.0**-140, 2.0**125])
def test_bits_are_not_due_where_alpha_rounds_or_leaves_the_range(alpha: float) -> None:
    _, _, product = product_of(3, 3, 64)

    assert not bits_are_due(product, torch.tensor(alpha), Facts()).any()


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 1.0005), (torch.float16, 1.002), (torch.bfloat16, 1.02)],
    ids=["float32", "float16", "bfloat16"],
)
def test_every_order_is_accepted_and_an_alpha_that_is_little_off_is_not(
    dtype: torch.dtype, factor: float
) -> None:
    generator = torch.Generator().manual_seed(9)
    a = torch.randn(16, 512, generator=generator).mul(64).round().double() / 64
    b = torch.randn(16, 512, generator=generator).mul(64).round().double() / 64
    product, alpha = exact_of_elements(a, b), torch.tensor(0.7)
    allowed = of_product(product, alpha, 512, Facts(), dtype)

    for rounding in AccumulatorRounding:
        for chunk, splits in ((16, 1), (64, 1), (64, 4)):
            order = Accumulation(chunk=chunk, rounding=rounding, splits=splits)
            found = accumulate(a, b, order).float() * alpha
            assert compare.within(found.to(dtype), allowed).holds
    off = round_to(product.value * alpha.double() * factor, dtype)
    assert not compare.within(off, allowed).holds


def test_facts_are_read_from_attributes() -> None:
    class Kernel:
        accumulator = "float16"
        accumulator_rounding = "toward-zero"
        accumulation_chunk = 64
        reciprocal = "ieee"

    facts = Facts.declared_by(Kernel)

    assert facts.accumulator is Accumulator.FLOAT16
    assert facts.accumulator_rounding is Rounding.TOWARD_ZERO
    assert facts.accumulation_chunk == 64
    assert facts.reciprocal is Reciprocal.IEEE
    assert Facts.declared_by(object()) == Facts()


def test_a_fact_that_is_none_of_the_choices_is_refused() -> None:
    class Kernel:
        accumulator = "float19"

    with pytest.raises(CheckError, match="accumulator = 'float19'"):
        Facts.declared_by(Kernel)
    with pytest.raises(CheckError, match="accumulation_chunk 0"):
        Facts(accumulation_chunk=0)
