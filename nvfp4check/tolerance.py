"""How far a correct kernel may lie from the real result, derived from what it declares.

Contract:
    y = round_out(z) with  |z - alpha P|  <=  (S + 4) u_acc |alpha| T  +  tiny
        P      the real sum, T = |A||B|^T the same sum of magnitudes
        S      roundings of the accumulator: K / chunk, rounded up
        u_acc  2**-24 for float32 rounded to nearest, 2**-23 where truncation is allowed
        4      the epilogue: alpha, its product with the accumulator, two for a split or a cast
        tiny   the smallest subnormal of the output dtype
    so y lies between the two ends of z, each rounded: about u_out |alpha P| more, with u_out half
    the distance from 1 to the next value of the output dtype, and no more than one rounding
    probabilistic  lambda sqrt(S + 4) in place of S + 4: exceeded with probability at most
                   2 exp(-lambda**2 / 2) for roundings of mean zero, so never for truncation
    bits           where T is below 2**24 quanta every partial sum of every order is a float32, and
                   with alpha a power of two nothing rounds before the output: then the result
                   must be alpha P rounded once, bit for bit, but for the sign of a zero

A kernel declares facts, never a tolerance. What it does not declare is taken as the widest that
is still correct: float32, any order, chunks down to 16, truncation allowed, reciprocals to 2 ulp.

Sources: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; Blanchard, Higham,
Lopez, Mary and Pranesh, SIAM J. Sci. Comput. 42(3), C124 (2020), for sums by blocks.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Self

import torch

from nvfp4check.findings import CheckError
from nvfp4ref.matmul import ExactProduct
from nvfp4ref.rounding import PRECISION, SMALLEST_SUBNORMAL, UNIT_ROUNDOFF, round_to


class Accumulator(StrEnum):
    """The dtype in which a kernel adds."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        """The same in torch."""
        found: torch.dtype = getattr(torch, self.value)
        return found


class Rounding(StrEnum):
    """How a kernel's accumulator rounds."""

    NEAREST = "nearest"
    TOWARD_ZERO = "toward-zero"
    #: Not declared: either.
    ANY = "any"


class Reciprocal(StrEnum):
    """How a kernel divides."""

    #: Correctly rounded, in the order of its convention.
    IEEE = "ieee"
    #: By an instruction that is right to 2 ulp.
    APPROXIMATE = "approximate"
    #: Not declared: approximate where the convention multiplies by reciprocals, else IEEE.
    ANY = "any"


class Ties(StrEnum):
    """Which of equal scores a router chooses."""

    LOWER_INDEX = "lower-index"
    #: Not declared: any of them, as torch.topk.
    ANY = "any"


#: Error of an approximate reciprocal, exponential or square root, in units of the last place.
FUNCTION_ULPS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a kernel declares about its arithmetic."""

    accumulator: Accumulator = Accumulator.FLOAT32
    accumulator_rounding: Rounding = Rounding.ANY
    #: Terms that are summed exactly before the accumulator rounds.
    accumulation_chunk: int = 16
    reciprocal: Reciprocal = Reciprocal.ANY
    #: Largest error of exp, rsqrt, sin and cos, in units of the last place of float32.
    function_ulps: float = FUNCTION_ULPS
    #: The dtype in which a fused kernel keeps its activation before it quantises.
    intermediate: Accumulator = Accumulator.FLOAT32
    #: Which of equal scores `route` chooses.
    ties: Ties = Ties.ANY
    #: Whether the sums over a row run in one order, whatever the other rows, strides and alignment.
    #: Kernels that split a sum by the size of the batch, or vectorise by alignment, do not so.
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        """Refuse a chunk or an error that is not positive."""
        if self.accumulation_chunk < 1 or self.function_ulps < 0:
            raise CheckError(
                f"accumulation_chunk {self.accumulation_chunk} must be at least 1 and "
                f"function_ulps {self.function_ulps} at least 0"
            )

    @classmethod
    def declared_by(cls, source: object) -> Self:
        """Return the facts that a kernel or a suite carries as attributes.

        Raises:
            CheckError: An attribute has a value that is not among the choices.
        """
        kinds = {
            "accumulator": Accumulator,
            "accumulator_rounding": Rounding,
            "accumulation_chunk": int,
            "reciprocal": Reciprocal,
            "function_ulps": float,
            "intermediate": Accumulator,
            "ties": Ties,
            "batch_invariant": bool,
        }
        declared: dict[str, Any] = {}
        for field in fields(cls):
            value = getattr(source, field.name, None)
            if value is None:
                continue
            try:
                declared[field.name] = kinds[field.name](value)
            except ValueError as error:
                raise CheckError(f"{field.name} = {value!r}: {error}") from error
        return cls(**declared)

    @property
    def accumulator_roundoff(self) -> float:
        """Largest relative error of one rounding of the accumulator."""
        nearest = UNIT_ROUNDOFF[self.accumulator.dtype]
        return nearest if self.accumulator_rounding is Rounding.NEAREST else 2 * nearest

    @property
    def function_error(self) -> float:
        """Largest relative error of an elementary function in float32."""
        return self.function_ulps * 2.0**-23

    def roundings(self, terms: int) -> int:
        """Return how often the accumulator rounds in a sum of so many terms."""
        return -(-terms // self.accumulation_chunk)


#: The term of the one rounding to the output dtype.
OUTPUT_ROUNDING = "output rounding"

#: Roundings allowed after the sum: alpha itself, its product, a split's sum, a cast.
EPILOGUE_ROUNDINGS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What a correct result may be, element by element, and why."""

    #: The real result in float64.
    expected: torch.Tensor
    #: Error that each cause may add, in float64, in the shape of `expected`.
    terms: Mapping[str, torch.Tensor]
    #: Where the result must be the real one rounded once, bit for bit.
    exact: torch.Tensor
    dtype: torch.dtype
    why: str

    @property
    def allowed(self) -> torch.Tensor:
        """The sum of the terms: about how far a result may lie from the real one."""
        return self._sum(self.terms)

    @property
    def unrounded(self) -> torch.Tensor:
        """How far a result may lie from the real one before it is rounded to the output dtype."""
        return self._sum(name for name in self.terms if name != OUTPUT_ROUNDING)

    def _sum(self, names: Iterable[str]) -> torch.Tensor:
        total = torch.zeros_like(self.expected)
        for name in names:
            total = total + self.terms[name]
        return total

    @property
    def rounded(self) -> torch.Tensor:
        """The real result, rounded once to the output dtype."""
        return round_to(self.expected, self.dtype)


@dataclass(frozen=True, slots=True)
class Probabilistic:
    """Grow the bound with the root of the number of roundings, and state the risk."""

    factor: float = 6.0

    @property
    def risk(self) -> float:
        """Probability that one correct element exceeds the bound."""
        return 2.0 * math.exp(-(self.factor**2) / 2)


def of_product(
    product: ExactProduct,
    alpha: torch.Tensor,
    terms: int,
    facts: Facts,
    dtype: torch.dtype,
    *,
    probabilistic: Probabilistic | None = None,
) -> Tolerance:
    """Return what alpha times a product of `terms` terms a sum may be.

    Raises:
        CheckError: A probabilistic bound is asked of an accumulator that may truncate.
    """
    if probabilistic and facts.accumulator_rounding is not Rounding.NEAREST:
        raise CheckError(
            "the probabilistic bound holds for roundings of mean zero: declare "
            "accumulator_rounding = 'nearest', or use the deterministic bound"
        )
    count: float = facts.roundings(terms) + EPILOGUE_ROUNDINGS
    if probabilistic:
        count = probabilistic.factor * math.sqrt(count)
    scale = alpha.double()
    expected = scale * product.value
    why = (
        f"{facts.roundings(terms)} roundings of a {facts.accumulator} accumulator "
        f"({facts.accumulator_rounding}, chunks of {facts.accumulation_chunk}) "
        f"+ {EPILOGUE_ROUNDINGS} after it, then one to {_name(dtype)}"
    )
    if probabilistic:
        why += f"; each element is exceeded with probability <= {probabilistic.risk:.1e}"
    return Tolerance(
        expected=expected,
        terms={
            "accumulation": count * facts.accumulator_roundoff * scale.abs() * product.magnitude,
            **output_terms(expected, dtype),
        },
        exact=bits_are_due(product, alpha, facts),
        dtype=dtype,
        why=why,
    )


def of_roundings(
    expected: torch.Tensor,
    count: int,
    dtype: torch.dtype,
    exact: torch.Tensor,
    why: str,
) -> Tolerance:
    """Return what a result may be that float32 rounds `count` times before the output dtype.

    `exact` says where none of these roundings has anything to round.
    """
    return Tolerance(
        expected=expected,
        terms={
            "float32 roundings": count * UNIT_ROUNDOFF[torch.float32] * expected.abs(),
            **output_terms(expected, dtype),
        },
        exact=exact,
        dtype=dtype,
        why=f"{why}, then one rounding to {_name(dtype)}",
    )


def output_terms(expected: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what the one rounding to the output dtype may add."""
    return {
        OUTPUT_ROUNDING: UNIT_ROUNDOFF[dtype] * expected.abs(),
        "smallest subnormal": torch.full_like(expected, SMALLEST_SUBNORMAL[dtype]),
    }


def bits_are_due(product: ExactProduct, alpha: torch.Tensor, facts: Facts) -> torch.Tensor:
    """Return where every order of accumulation gives the real sum, and alpha rounds nothing."""
    dtype = facts.accumulator.dtype
    integers = 2.0 ** PRECISION[dtype]
    largest = torch.finfo(dtype).max
    scale = alpha.double().abs()
    mantissas, _ = torch.frexp(scale)
    is_power = (mantissas == 0.5) & (alpha > 0)
    ordinary = torch.finfo(torch.float32)
    in_range = (scale * product.magnitude < ordinary.max) & (
        scale * product.quantum >= ordinary.tiny
    )
    sums = (product.magnitude < integers * product.quantum) & (product.magnitude < largest)
    return sums & in_range & is_power & ~product.value.isnan()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
