"""The operands that projects' tests draw, quantised by the reference as the engine does.

Contract:
    an operand is its codes and block scales, its global scale, and its values before quantisation
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nvfp4ref import e2m1, nvfp4, packing
from nvfp4ref.conventions import Convention
from nvfp4ref.formats import BLOCK_SIZE, NVFP4

Tensor = torch.Tensor

#: Side of the squares in which triton_kernels plants maxima.
_SQUARE = 32


@dataclass(frozen=True, slots=True)
class Operand:
    """One side of a product."""

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    #: The values that were quantised.
    original: Tensor

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the values that the codes stand for, rounded to a dtype."""
        return nvfp4.dequantize(self.codes, self.scales, self.global_scale, dtype)


#: Draws an operand of so many rows, each of so many values.
Draw = Callable[[torch.Generator, int, int], Operand]


def quantised(values: Tensor, largest: Tensor | None = None) -> Operand:
    """Quantise with the global scale amax / 2688, of magnitudes unless a `largest` is given."""
    amax = values.abs().max() if largest is None else largest
    scale = amax.float() / NVFP4.full_scale
    codes, scales = nvfp4.quantize(values, scale, Convention.ENGINE)
    return Operand(codes, scales, scale, values)


def normal(generator: torch.Generator, rows: int, width: int, deviation: float = 1.0) -> Operand:
    """Draw bfloat16 of a normal distribution."""
    return quantised(_normal(generator, rows, width, deviation).to(torch.bfloat16))


def normal_by_largest_value(generator: torch.Generator, rows: int, width: int) -> Operand:
    """Draw the same, with the global scale of the largest value: its magnitude is not taken."""
    values = _normal(generator, rows, width).to(torch.bfloat16)
    return quantised(values, values.max())


def normal_float16(generator: torch.Generator, rows: int, width: int) -> Operand:
    """Draw float16 of a normal distribution."""
    return quantised(_normal(generator, rows, width).to(torch.float16))


def uniform(generator: torch.Generator, rows: int, width: int) -> Operand:
    """Draw bfloat16 between 0 and 1."""
    return quantised(torch.rand(rows, width, generator=generator).to(torch.bfloat16))


def normal_on_the_grid(
    generator: torch.Generator, rows: int, width: int, deviation: float = 1.0
) -> Operand:
    """Draw normal values, quantise, decode, and quantise again."""
    return quantised(normal(generator, rows, width, deviation).decoded(torch.bfloat16))


def sparse_on_the_grid(generator: torch.Generator, rows: int, width: int) -> Operand:
    """Draw values of which three of four are zero, quantise, decode, and quantise again."""
    kept = torch.rand(rows, width, generator=generator) >= 0.75
    values = (_normal(generator, rows, width) * kept).to(torch.bfloat16)
    return quantised(quantised(values).decoded(torch.bfloat16))


def planted_maxima(generator: torch.Generator, rows: int, width: int) -> Operand:
    """Draw normal values; the diagonal of each 32x32 square gets its maximum, of any sign."""
    values = _normal(generator, rows, width)
    for square in _squares(values):
        diagonal = square.diagonal()
        signs = 2 * torch.randint(0, 2, diagonal.shape, generator=generator) - 1
        diagonal.copy_(signs * square.abs().max())
    return quantised(values.to(torch.bfloat16))


def _squares(values: Tensor) -> list[Tensor]:
    starts = [range(0, size, _SQUARE) for size in values.shape]
    return [values[i : i + _SQUARE, j : j + _SQUARE] for i, j in itertools.product(*starts)]


def small_integers(generator: torch.Generator, rows: int, width: int) -> Operand:
    """Draw codes of -2 to 2 and block scales of 0 and 1."""
    values = torch.randint(-2, 3, (rows, width), generator=generator).float()
    ones = torch.randint(0, 2, (rows, width // BLOCK_SIZE), generator=generator).float()
    scales = ones.to(torch.float8_e4m3fn)
    codes = packing.pack(e2m1.encode(values))
    original = values * ones.repeat_interleave(BLOCK_SIZE, dim=1)
    return Operand(codes, scales, torch.tensor(1.0), original)


def _normal(generator: torch.Generator, rows: int, width: int, deviation: float = 1.0) -> Tensor:
    return deviation * torch.randn(rows, width, generator=generator)
