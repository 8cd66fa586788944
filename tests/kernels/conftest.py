from collections.abc import Callable

import pytest
import torch


def bits(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bit patterns, every NaN made one pattern."""
    number = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()]
    if values.is_floating_point():
        values = torch.where(values.isnan(), torch.full_like(values, float("nan")), values)
    return values.contiguous().view(number)


@pytest.fixture
def same_bits() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """Whether two tensors have one dtype, one shape and the same bits, NaN for NaN."""

    def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
        return actual.dtype == expected.dtype and torch.equal(bits(actual), bits(expected))

    return same


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20260101)
