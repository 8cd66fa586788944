"""What a correct run may round, and what that adds to the error: the statistical model.

Contract:
    model       roundings are independent, and uniform within half a step of the value rounded:
                mean zero, variance h**2 / 3, with h half the distance to the next value. This is
                model 2.1 of Higham and Mary with the distribution written out; a uniform variable
                is strictly sub-Gaussian, so its variance is also its proxy
    output      every operation's result is rounded to the declared dtype, as often as software
                that is known to be correct does it; inside an operation float32 is rounded
    sums        the accumulator rounds S = K / chunk times. Terms come in an order that has nothing
                to do with their values; then the partial sum after a part f of the terms is
                f**2 y**2 + f (1 - f) (Q - y**2 / K) on the mean of squares, Q the sum of the
                terms' squares, hence  u**2 / 3 (S (y**2 / 3 + Q / 6) + 4 y**2)  for roundings to
                nearest, the 4 for alpha, its product, a split and a cast. An accumulator that
                truncates is biased: u per step on the mean and twice that at most, which adds up:
                (u S)**2 (y**2 / 3 + Q / 6), held as a bounded error
    functions   exp, rsqrt and sigmoid are uniform within the declared units of the last place
    both sides  the reference rounds as well, independently: its variance is added
    bound       DEVIATIONS times the root of the summed variances of a token's elements, and
                BOUNDED times that of its bounded errors (codes that may flip, truncation)
    risk        for errors that are sub-Gaussian with these variances, whatever the correlation of
                a token's elements: P(||e|| > L sqrt(sum of variances)) <= L exp(-(L**2 - 1) / 2),
                by Jensen's inequality on exp(s e_i**2 / v_i) and s = (1 - L**-2) / 2. So many
                tokens and points are held; their number times this is the probability that any
                correct one exceeds
    not a proof roundings are no random numbers. Where many operands repeat (a row of equal values,
                ties throughout) they are correlated, and a bound may be exceeded by a correct run

Sources: Higham and Mary, SIAM J. Sci. Comput. 41(5), A2815 (2019); Arbel, Marchal and Nguyen,
ESAIM: P&S 24 (2020), on strict sub-Gaussianity.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from nvfp4check.findings import CheckError
from nvfp4check.tolerance import EPILOGUE_ROUNDINGS, Accumulator, Facts, Probabilistic, Rounding
from nvfp4ref.rounding import PRECISION, SMALLEST_SUBNORMAL, UNIT_ROUNDOFF

#: Standard deviations that a bound allows.
DEVIATIONS = Probabilistic().factor

#: What a bounded error is multiplied with. The count of codes that may flip takes every code whose
#: threshold lies within DEVIATIONS, many times those that do flip; what it does not cover is that a
#: few errors add up in one direction: two that do are within a root of 2, four within 2.
BOUNDED = 2.0

#: Kinds of error: directed ones have been through a matrix, fresh ones not (`uncertain`).
DIRECTED_RANDOM, DIRECTED_BOUNDED, FRESH_RANDOM, FRESH_BOUNDED = range(4)
KINDS = 4

#: Arithmetic that can be declared, each also over some ranks, or attending in the direct form
#: alone: bfloat16/tp8, float32/direct, bfloat16/tp8/direct.
DECLARABLE = ("float32", "bfloat16", "float16")
DIRECT = "/direct"
_NAME = re.compile(rf"(?P<dtype>\w+?)(?:/tp(?P<ranks>[1-9]\d*))?(?:{DIRECT})?")


def risk() -> float:
    """Return the probability that one correct token exceeds its bound at one point."""
    return DEVIATIONS * math.exp(-(DEVIATIONS**2 - 1) / 2)


@dataclass(frozen=True, slots=True)
class Declared:
    """The arithmetic of one side."""

    dtype: torch.dtype
    facts: Facts
    #: Over how many ranks products are split, whose shares are added up (`parallel`).
    ranks: int = 1
    #: Whether keys and values may be left in the latent space (`absorbed`).
    absorbs: bool = True

    @classmethod
    def of_candidate(cls, name: str) -> Self:
        """Return the arithmetic of an engine whose activations are of this dtype.

        float32 is computed by units that round to nearest, one rounding a term; narrower dtypes by
        tensor cores, whose accumulators are float32 and may truncate. `/tp8` after the dtype is an
        engine of 8 ranks, `/direct` at the end one that unfolds keys and values.

        Raises:
            CheckError: The dtype is none that can be declared, or the ranks are no power of two.
        """
        dtype, ranks = split_name(name)
        if dtype not in DECLARABLE or ranks.bit_count() != 1 or "/tp1/" in f"{name}/":
            raise CheckError(
                f"--bounds {name!r}: give any of {', '.join(DECLARABLE)}, of an engine of N ranks "
                "with /tpN after it, N a power of two: bfloat16/tp8; of one that unfolds keys and "
                "values with /direct at the end"
            )
        found: torch.dtype = getattr(torch, dtype)
        facts = _CAREFUL if found == torch.float32 else Facts()
        return cls(found, facts, ranks, absorbs=not name.endswith(DIRECT))

    @classmethod
    def of_reference(cls, dtype: torch.dtype) -> Self:
        """Return the arithmetic of `nvfp4ref` with activations of this dtype."""
        return cls(dtype, _EXACT if dtype == torch.float64 else _CAREFUL)


def split_name(name: str) -> tuple[str, int]:
    """Return dtype and ranks of what a name declares; 0 ranks where it is no such name."""
    found = _NAME.fullmatch(name)
    return (found["dtype"], int(found["ranks"] or 1)) if found else (name, 0)


_CAREFUL = Facts(accumulator_rounding=Rounding.NEAREST, accumulation_chunk=1)
_EXACT = Facts(
    accumulator=Accumulator.FLOAT64,
    accumulator_rounding=Rounding.NEAREST,
    accumulation_chunk=1,
    function_ulps=0.0,
)


#: Bits of a float64's exponent.
_EXPONENT = 0x7FF << 52


def rounding_variance(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the variance of rounding float64 values to a dtype: a third of half a step squared."""
    # The exponent's bits alone: the power of two at or below the magnitude.
    power = (values.contiguous().view(torch.int64) & _EXPONENT).view(torch.float64)
    half = power * 2.0 ** -PRECISION[dtype]
    least = SMALLEST_SUBNORMAL[dtype] / 2
    return torch.where(values == 0, 0.0, half.clamp_(min=least).square_()) / 3


class Roundings:
    """What rounding adds, for each of A declared arithmetics together with the reference's.

    Results are variances [A, KINDS, ...].
    """

    def __init__(self, declared: Sequence[Declared], reference: Declared) -> None:
        self.declared = tuple(declared)
        self.reference = reference
        #: Which of the declared may attend in the absorbed form.
        self.absorbs = torch.tensor([side.absorbs for side in self.declared])

    def __len__(self) -> int:
        return len(self.declared)

    def of_output(self, values: torch.Tensor, times: int = 1) -> torch.Tensor:
        """Return what `times` roundings of a result add; the reference rounds once."""
        own = rounding_variance(values, self.reference.dtype)
        return self._random(
            [times * rounding_variance(values, side.dtype) + own for side in self.declared]
        )

    def of_internal(self, values: torch.Tensor, times: int) -> torch.Tensor:
        """Return what so many roundings inside an operation add, in float32 or better."""
        one = rounding_variance(values, torch.float32)
        own = one if self.reference.facts.accumulator is Accumulator.FLOAT32 else 0 * one
        return self._random([times * (one + own)] * len(self.declared))

    def of_weights(self, squares: torch.Tensor) -> torch.Tensor:
        """Return what weights rounded to the dtype add to sums of terms with these squares."""
        own = UNIT_ROUNDOFF[self.reference.dtype] ** 2 / 3
        units = [UNIT_ROUNDOFF[side.dtype] ** 2 / 3 for side in self.declared]
        return self._random([(unit + own) * squares for unit in units])

    def of_functions(self, values: torch.Tensor, times: int = 1) -> torch.Tensor:
        """Return what so many elementary functions add, each the factor of a value."""
        squares = values.square() / 3
        own = self.reference.facts.function_error**2
        return self._random(
            [times * (side.facts.function_error**2 + own) * squares for side in self.declared]
        )

    def of_sum(self, terms: int, values: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """Return what sums of `terms` terms add; `squares` are the sums of the terms' squares."""
        partial = values.square() / 3 + squares / 6
        out = self._none(values)
        for i, side in enumerate(self.declared):
            # What truncation takes off has the sign of the value.
            random, bounded = out[i, FRESH_RANDOM], out[i, DIRECTED_BOUNDED]
            for facts in (side.facts, self.reference.facts):
                unit, steps = facts.accumulator_roundoff, facts.roundings(terms)
                random += EPILOGUE_ROUNDINGS * unit**2 / 3 * values.square()
                if facts.accumulator_rounding is Rounding.NEAREST:
                    random += unit**2 / 3 * steps * partial
                else:  # accumulator_roundoff is twice the mean of a truncation
                    bounded += (unit / 2 * steps) ** 2 * partial
        return out

    def _random(self, variances: Sequence[torch.Tensor]) -> torch.Tensor:
        out = self._none(variances[0])
        out[:, FRESH_RANDOM] = torch.stack(list(variances))
        return out

    def _none(self, values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(len(self), KINDS, *values.shape)
