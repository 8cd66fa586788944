"""Values with the error that a correct run may have in them.

T tokens, D elements, A declared arithmetics. Two kinds of error are carried: 0 is random, by its
variance; 1 is bounded, by the square of its bound.

Contract:
    error      e = (independent part, element by element) + (common part) * value: an error that a
               norm, a router's weight or a block's scale gives to a whole token goes through any
               linear unchanged, where an independent one is mixed by the squares of the weights
    deviation  DEVIATIONS sqrt(random) + BOUNDED sqrt(bounded), with the common part in both
    sums       of errors whose correlation is unknown: roots are added, not squares (Minkowski)
"""

from dataclasses import dataclass

import torch

from nvfp4check.forward.bounds.arithmetic import BOUNDED, DEVIATIONS

RANDOM, BOUNDED_KIND = 0, 1


@dataclass(frozen=True, slots=True)
class Uncertain:
    """The reference's values, and what may be between them and a correct run's."""

    #: float64 [T, D]
    value: torch.Tensor
    #: Of the independent part, float64 [A, 2, T, D].
    variance: torch.Tensor
    #: Of the relative error that all elements of a token share, float64 [A, 2, T].
    common: torch.Tensor

    @classmethod
    def exactly(cls, value: torch.Tensor, arithmetics: int) -> "Uncertain":
        """Return values without error."""
        value = value.double()
        return cls(
            value,
            value.new_zeros(arithmetics, 2, *value.shape),
            value.new_zeros(arithmetics, 2, len(value)),
        )

    @property
    def total(self) -> torch.Tensor:
        """Variance of each element with the common part in it, [A, 2, T, D]."""
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
    """Return what errors of these variances [A, 2, ...] may amount to, [A, ...]."""
    roots = variance.sqrt()
    return DEVIATIONS * roots[:, RANDOM] + BOUNDED * roots[:, BOUNDED_KIND]


def split_last(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Return x with its last dimension in parts of these sizes, one of them -1."""
    return x.reshape(*x.shape[:-1], *sizes)


def minkowski(*variances: torch.Tensor) -> torch.Tensor:
    """Return the variance of a sum of errors whose correlation is unknown."""
    total = variances[0].sqrt()
    for variance in variances[1:]:
        total = total + variance.sqrt()
    return total.square()
