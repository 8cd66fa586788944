"""Errors of elementary functions in float32, as relative and absolute bounds in float64.

Contract, with F the declared error of exp, rsqrt, sin and cos (2 ulp: 2 * 2**-23) and u = 2**-24:
    exp(x)      F + |x| 2**-23, relative: hardware forms 2**(x log2 e), whose argument has log2 e
                off by u/2 and a product off by u
    sigmoid(x)  1 / (1 + exp(-x)): the error of exp times (1 - sigmoid), u for the sum, F + u for
                the reciprocal; below 2**-126 a kernel may have flushed to zero
    silu(x)     sigmoid's, u for the product with x
    rms         (S + 4) u_acc for the mean of squares, halved by the root; F + u for rsqrt; 2 u for
                the products with x and the weight
    stored      u of the dtype in which a fused kernel keeps the value before it quantises
"""

import torch

from nvfp4check.tolerance import EPILOGUE_ROUNDINGS, Facts
from nvfp4ref.rounding import UNIT_ROUNDOFF

#: One rounding of float32.
ROUNDING = UNIT_ROUNDOFF[torch.float32]

#: Magnitudes below this may be flushed to zero.
FLUSH = torch.finfo(torch.float32).tiny


def exponential(exponent: torch.Tensor, facts: Facts) -> torch.Tensor:
    """Return the relative error of exp."""
    return facts.function_error + exponent.abs() * 2 * ROUNDING


def sigmoid(x: torch.Tensor, facts: Facts) -> torch.Tensor:
    """Return the relative error of the logistic function."""
    complement = (-x).sigmoid()
    return complement * exponential(x, facts) + facts.function_error + 2 * ROUNDING


def silu_mul(gate: torch.Tensor, up: torch.Tensor, facts: Facts) -> torch.Tensor:
    """Return the absolute error of silu(gate) * up, of float64 inputs."""
    value = (gate * gate.sigmoid() * up).abs()
    relative = sigmoid(gate, facts) + 2 * ROUNDING + stored(facts)
    return relative * value + 2 * FLUSH * (1 + gate.abs()) * up.abs()


def rms_norm(value: torch.Tensor, terms: int, facts: Facts) -> torch.Tensor:
    """Return the absolute error of a normed value whose mean ran over so many terms."""
    mean = (facts.roundings(terms) + EPILOGUE_ROUNDINGS) * facts.accumulator_roundoff
    relative = mean / 2 + facts.function_error + 3 * ROUNDING + 2 * stored(facts)
    return relative * value.abs()


def stored(facts: Facts) -> float:
    """Return the relative error of keeping a value in the declared intermediate dtype."""
    return UNIT_ROUNDOFF[facts.intermediate.dtype]
