"""Linears that tell what they computed, while their bytes are at hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from nvfp4check.forward.bounds.linear import SquaringLinear
from nvfp4ref.deepseek_v3.linear import Linear

#: Hears of a product: its role, the linear, what was multiplied and what came of it.
Tell = Callable[[str, SquaringLinear, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Watched:
    """A linear that tells of its products."""

    inner: Linear
    tell: Tell
    role: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [M, K] times the transposed weight, and tell of it."""
        inner = cast(SquaringLinear, self.inner)
        with inner.held():
            y = inner(x)
            self.tell(self.role, inner, x, y)
        return y

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [N, K]."""
        return self.inner.dequantized(dtype)
