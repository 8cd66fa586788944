"""Values with the error that a correct run may have in them.

T tokens, D elements, A declared arithmetics, four kinds of error: random ones by their variance,
bounded ones by the square of their bound, and of each those that have been through a matrix
(`directed`) and those made since (`fresh`: element by element, in no direction).

Contract:
    error      e = (independent part, element by element) + (common part) * value: an error that a
               norm, a router's weight or a block's scale gives to a whole token goes through any
               linear unchanged, where an independent one is mixed by the squares of the weights
    deviation  DEVIATIONS sqrt(random) + BOUNDED sqrt(bounded), with the common part in both
    sums       of errors whose correlation is unknown: roots are added, not squares (Minkowski)
"""

from dataclasses import dataclass

import torch

from nvfp4check.forward.bounds.arithmetic import (
    BOUNDED,
    DEVIATIONS,
    DIRECTED_BOUNDED,
    DIRECTED_RANDOM,
    FRESH_BOUNDED,
    FRESH_RANDOM,
    KINDS,
)


@dataclass(frozen=True, slots=True)
class Uncertain:
    """The reference's values, and what may be between them and a correct run's."""

    #: float64 [T, D]
    value: torch.Tensor
    #: Of the independent part, float64 [A, KINDS, T, D].
    variance: torch.Tensor
    #: Of the relative error that all elements of a token share, float64 [A, KINDS, T].
    common: torch.Tensor

    @classmethod
    def exactly(cls, value: torch.Tensor, arithmetics: int) -> "Uncertain":
        """Return values without error."""
        value = value.double()
        return cls(
            value,
            value.new_zeros(arithmetics, KINDS, *value.shape),
            value.new_zeros(arithmetics, KINDS, len(value)),
        )

    @property
    def total(self) -> torch.Tensor:
        """Variance of each element with the common part in it, [A, KINDS, T, D]."""
        return self.variance + self.common.unsqueeze(-1) * self.value.square()

    @property
    def reach(self) -> torch.Tensor:
        """How far each element may lie off, [A, T, D]."""
        return deviation(self.total)

    @property
    def bound(self) -> torch.Tensor:
        """How far each token may lie off, as the norm of its error, [A, T]."""
        return deviation(self.total.sum(-1))

    def rows(self, tokens: torch.Tensor | slice) -> "Uncertain":
        """Return some tokens."""
        return Uncertain(self.value[tokens], self.variance[:, :, tokens], self.common[:, :, tokens])

    def columns(self, elements: slice) -> "Uncertain":
        """Return some elements of each token."""
        return Uncertain(self.value[:, elements], self.variance[..., elements], self.common)

    def plus(self, variance: torch.Tensor) -> "Uncertain":
        """Return the same with a further, independent error."""
        return Uncertain(self.value, self.variance + variance, self.common)


def deviation(variance: torch.Tensor) -> torch.Tensor:
    """Return what errors of these variances [A, KINDS, ...] may amount to, [A, ...]."""
    random = variance[:, DIRECTED_RANDOM] + variance[:, FRESH_RANDOM]
    bounded = variance[:, DIRECTED_BOUNDED] + variance[:, FRESH_BOUNDED]
    return DEVIATIONS * random.sqrt() + BOUNDED * bounded.sqrt()


def through_matrix(variance: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Return variances [A, KINDS, ...] after a matrix, which amplifies directed ones by a gain."""
    out = torch.zeros_like(variance)
    out[:, DIRECTED_RANDOM] = variance[:, DIRECTED_RANDOM] * gain + variance[:, FRESH_RANDOM]
    out[:, DIRECTED_BOUNDED] = variance[:, DIRECTED_BOUNDED] * gain + variance[:, FRESH_BOUNDED]
    return out


def minkowski(*variances: torch.Tensor) -> torch.Tensor:
    """Return the variance of a sum of errors whose correlation is unknown."""
    total = variances[0].sqrt()
    for variance in variances[1:]:
        total = total + variance.sqrt()
    return total.square()


def split_last(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Return x with its last dimension in parts of these sizes, one of them -1."""
    return x.reshape(*x.shape[:-1], *sizes)
