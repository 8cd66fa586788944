"""Errors through a linear layer, by the format of its weight and of its input.

M rows, K input features, N output features; W the weight dequantised.

Contract, y = x W^T:
    independent  var y = (W o W) var x, by the squares of the weights. Directed errors, those that
                 have been through a matrix, lie in the same directions as the values that have,
                 and what reads those directions amplifies both: they are taken to be amplified,
                 beyond independence, as the token's value is: gain = max(1, ||y||**2 / sum Q)
    common       goes through unchanged, and through scales of FP8 that are not rounded; of any
                 other quantised input only the codes matter
    own          the sum's roundings (`arithmetic`), with Q = (W o W) x**2; one to the dtype; and
                 for weights dequantised to a dtype that does not hold them, Q u**2 / 3
    quantised    x becomes codes, so its error becomes steps (`straddles`), bounded errors; what
                 was random is gone but for the scale of an FP8 block, which is held both as
                 independent and as common, for its 128 elements are neither

`squares` is computed in float32 with each row scaled to 1, which is good to K 2**-24.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch

from nvfp4check.forward.bounds import straddles
from nvfp4check.forward.bounds.arithmetic import Roundings
from nvfp4check.forward.bounds.uncertain import Uncertain, through_matrix
from nvfp4ref.formats import E4M3
from nvfp4ref.fp8 import SMALLEST_SCALE


class InputForm(StrEnum):
    """What a linear makes of its input."""

    PLAIN = "plain"
    NVFP4 = "nvfp4"
    FP8 = "fp8"
    FP8_POWER_OF_TWO = "fp8-power-of-two"
    #: One stored scale.
    FP8_STATIC = "fp8-static"
    #: One scale a token, at run time.
    FP8_PER_TOKEN = "fp8-per-token"


@dataclass(frozen=True, slots=True)
class Input:
    """How a linear takes its input."""

    form: InputForm
    #: Of NVFP4 and FP8_STATIC: the reciprocal of the scale that decodes, float32 [].
    encode: torch.Tensor | None = None
    #: AWQ: what the input is multiplied with first, [K].
    pre_quant_scale: torch.Tensor | None = None
    #: Whether the dequantised weight is rounded to the dtype of the activations.
    weight_rounds: bool = False


class SquaringLinear(Protocol):
    """A linear that can say what it makes of its input, and multiply with its weight's squares."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [M, K] times the transposed weight, [M, N]."""
        ...

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [N, K]."""
        ...

    def held(self) -> AbstractContextManager[None]:
        """Keep the weight's bytes as long as the context is open."""
        ...

    def input(self) -> Input:
        """Return how the input is taken."""
        ...

    def squares(self, rows: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return float32 rows [R, K] of so many tokens times the weight's squares, [R, N]."""
        ...

    def plain(self, rows: torch.Tensor) -> torch.Tensor:
        """Return float32 rows [R, K] times the transposed weight; nothing is quantised."""
        ...

    def squares_by_part(self, x: torch.Tensor, parts: int) -> torch.Tensor:
        """Return, of float32 x [M, K] in so many parts, the sum of their products' squares."""
        ...


@dataclass(frozen=True, slots=True)
class Passed:
    """The error of a product, and of its input how many codes were counted as flipped."""

    output: Uncertain
    #: [A, M], on the processor.
    straddles: torch.Tensor
    #: Sum of the squares of what each input feature adds, [M, N].
    squares: torch.Tensor


class Operands:
    """What linears make of their input; the last is kept, for gate and up take the same."""

    def __init__(self) -> None:
        self._last: tuple[Uncertain, Input, straddles.Quantised] | None = None

    def of(self, x: Uncertain, form: Input) -> straddles.Quantised | None:
        """Return the operand, None where a linear takes x itself."""
        if form.form is InputForm.PLAIN:
            return None
        if self._last is not None:
            last, its_form, found = self._last
            ours, theirs = form.encode, its_form.encode
            same = ours is None or (theirs is not None and torch.equal(ours, theirs))
            if last is x and form.form is its_form.form and same:
                return found
        found = _quantised(x, form)
        self._last = x, form, found
        return found


def through(
    linear: SquaringLinear,
    x: Uncertain,
    y: torch.Tensor,
    roundings: Roundings,
    operands: Operands,
    form: Input | None = None,
) -> Passed:
    """Return the error of y [M, N], the product of x with the linear's weight.

    `form` is how the input is taken where that is not the linear's own way.
    """
    form = form or linear.input()
    if form.pre_quant_scale is not None:
        scale = form.pre_quant_scale.double()
        scaled = Uncertain(x.value * scale, x.variance * scale.square(), x.common)
        x = scaled.plus(roundings.of_output(scaled.value))
    quantised = operands.of(x, form)
    taken = quantised.value if quantised is not None else x
    rows = torch.cat((taken.variance.flatten(0, 2), taken.value.square()))
    products = _scaled_squares(linear, rows, len(x.value))
    inherited = products[: -len(x.value)].reshape(*taken.variance.shape[:3], -1)
    own_squares = products[-len(x.value) :]
    value = y.double()
    inherited = through_matrix(inherited, gain(value, own_squares))
    local = roundings.of_sum(x.value.shape[-1], value, own_squares) + roundings.of_output(value)
    if form.weight_rounds:
        local = local + roundings.of_weights(own_squares)
    none = torch.zeros(len(roundings), len(value), dtype=torch.int64)
    counted = none if quantised is None else quantised.straddles
    return Passed(Uncertain(value, inherited + local, taken.common), counted, own_squares)


def _quantised(x: Uncertain, form: Input) -> straddles.Quantised:
    if form.encode is not None:
        if form.form is InputForm.FP8_STATIC:
            return straddles.e4m3(x, 1 / float(form.encode))
        return straddles.nvfp4(x, form.encode)
    if form.form is InputForm.FP8_PER_TOKEN:
        floor = SMALLEST_SCALE * E4M3.max
        return straddles.fp8(x, width=x.value.shape[-1], floor=floor)
    return straddles.fp8(x, power_of_two_scales=form.form is InputForm.FP8_POWER_OF_TWO)


def gain(value: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Return how much more than independent terms a product of [M, N] amplifies, [M, 1]."""
    independent = squares.sum(-1, keepdim=True)
    coherent = value.square().sum(-1, keepdim=True)
    return torch.where(coherent > independent, coherent / independent, 1.0)


def _scaled_squares(linear: SquaringLinear, rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return rows [R, K] of float64 times the squares of a weight, each row scaled to 1."""
    largest = rows.amax(-1, keepdim=True)
    live = largest.squeeze(-1) > 0
    scaled = (rows[live] / largest[live]).float()
    product = linear.squares(scaled, tokens).double() * largest[live]
    out = product.new_zeros(len(rows), product.shape[-1])
    out[live] = product
    return out
