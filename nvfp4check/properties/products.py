"""What the two products have in common: operands that tell, and the comparison with the truth.

Contract:
    certified  operands whose every float32 sum is exact in any order: bits are due
    bounded    operands of all scales: the derived bound, and bits where the certificate holds
"""

from typing import Any

import torch

from nvfp4check import compare, inputs, tolerance
from nvfp4check.properties.law import Case, Failure, Runner, failed
from nvfp4check.tolerance import Tolerance
from nvfp4ref import packing
from nvfp4ref.formats import BLOCK_SIZE
from nvfp4ref.matmul import ExactProduct, exact

ONE = torch.tensor(1.0)

#: A factor whose product with almost any float32 rounds.
ODD_ALPHA = torch.tensor(0.7123456)

#: E4M3 bytes of 1 and 448.
ONE_BYTE, LARGEST_BYTE = 0x38, 0x7E


def operand(
    generator: torch.Generator, rows: int, blocks: int, *, certified: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed codes [rows, 8 blocks] and block scales [rows, blocks] with every code."""
    codes = inputs.random_codes(generator, rows, blocks * BLOCK_SIZE // 2)
    low, high = inputs.EXACT_SCALES if certified else (1, 126)
    return codes, inputs.random_scales(generator, rows, blocks, lowest=low, highest=high)


def constant_scales(rows: int, blocks: int, byte: int = ONE_BYTE) -> torch.Tensor:
    """Return one block scale everywhere."""
    return inputs.scales_from_bytes(torch.full((rows, blocks), byte))


def codes_at(rows: int, blocks: int, places: torch.Tensor, code: int = 2) -> torch.Tensor:
    """Return packed codes of zeros, with one code at place `places[row]` of each row."""
    codes = torch.zeros(rows, blocks * BLOCK_SIZE, dtype=torch.uint8)
    codes[torch.arange(rows), places] = code
    return packing.pack(codes)


def case(
    label: str,
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    alpha: torch.Tensor = ONE,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Return one product as a case."""
    return Case(
        label,
        {
            "a_codes": a[0],
            "a_scales": a[1],
            "b_codes": b[0],
            "b_scales": b[1],
            "alpha": alpha,
            "dtype": dtype,
        },
    )


def truth(runner: Runner, taken: dict[str, Any]) -> Tolerance:
    """Return the real product of one pair of operands, with what a correct kernel may add."""
    product: ExactProduct = exact(
        taken["a_codes"], taken["a_scales"], taken["b_codes"], taken["b_scales"]
    )
    terms = 2 * taken["a_codes"].shape[1]
    facts = runner.setting.facts
    return tolerance.of_product(product, taken["alpha"], terms, facts, taken["dtype"])


def check_product(runner: Runner, tried: Case) -> Failure | None:
    """Hold a product against the truth."""
    actual = runner(tried.inputs)
    allowed = truth(runner, dict(tried.inputs))
    comparison = compare.within(actual[0], allowed, what="product")
    return failed(tried, comparison, actual, (allowed.rounded,))


def check_bits(runner: Runner, tried: Case) -> Failure | None:
    """Hold a product of certified operands against the reference, every bit but a zero's sign."""
    actual, expected = runner(tried.inputs), runner.reference(tried.inputs)
    comparison = compare.bits(actual[0], expected[0], what="product", zeros=compare.Zeros.UNSIGNED)
    return failed(tried, comparison, actual, expected)
