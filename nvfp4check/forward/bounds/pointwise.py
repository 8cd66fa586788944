"""Errors through what stands between the linears: norm, rotation, gated product, residual.

Contract, with e the error of x, to first order:
    norm      y = x r g, r = 1 / sqrt(mean(x**2) + eps). An error common to the token leaves r x
              unchanged but for eps. Independent errors go through by (r g)**2, and change r: a new
              common error of variance sum(x**2 var) / (D (mean + eps))**2. Roundings: the sum, the
              root, two in float32, and two to the dtype, for some round before the weight
    rotation  var a' = cos**2 var a + sin**2 var b. The angle is off by up to ANGLE_ROUNDINGS
              float32 roundings of itself, for frequencies are computed in more than one order;
              cosine and sine may be rounded to the dtype, each product and the sum as well
    gated     h = silu(g) u. Both come from one input, so their errors are added as roots; silu is
              rounded to the dtype by some before the product
    residual  what was there and what a block adds, as roots; one rounding
"""

import torch

from nvfp4check.forward.bounds.arithmetic import FRESH_RANDOM, Roundings
from nvfp4check.forward.bounds.uncertain import Uncertain, minkowski, split_last
from nvfp4ref.deepseek_v3.config import RotaryConfig
from nvfp4ref.deepseek_v3.rotary import angles
from nvfp4ref.rounding import UNIT_ROUNDOFF

#: Float32 roundings in an angle: power, its exponent, division, factor, ramp and two products.
ANGLE_ROUNDINGS = 8


def norm(
    x: Uncertain, weight: torch.Tensor, eps: float, y: torch.Tensor, roundings: Roundings
) -> Uncertain:
    """Return the error of y [T, D], the norm of x scaled by weight [D]."""
    width = x.value.shape[-1]
    mean = x.value.square().mean(dim=-1)  # (T,)
    scale = weight.double() * torch.rsqrt(mean + eps).unsqueeze(-1)  # (T, D)
    of_root = (x.value.square() * x.variance).sum(-1) / (width * (mean + eps)).square()
    common = of_root + x.common * (eps / (mean + eps)).square()
    # The sum of squares has a relative error, of which the root takes half.
    ones = torch.ones_like(mean)
    common = common + roundings.of_sum(width, ones, ones) / 4 + roundings.of_functions(ones)
    value = y.double()
    local = roundings.of_output(value, 2) + roundings.of_internal(value, 2)
    return Uncertain(value, x.variance * scale.square() + local, common)


def rotated(
    x: Uncertain, positions: torch.Tensor, rotary: RotaryConfig, roundings: Roundings
) -> Uncertain:
    """Return the error of x [T, H R] rotated head by head, pairs interleaved."""
    theta = angles(positions, rotary).double().unsqueeze(1)  # (T, 1, R/2)
    factor = 1.0 if rotary.rope_scaling is None else rotary.rope_scaling.rotary_factor
    cosine, sine = theta.cos() * factor, theta.sin() * factor

    def pairs(of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        split = split_last(of, -1, rotary.qk_rope_head_dim)
        return split[..., 0::2], split[..., 1::2]

    def joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack((a, b), dim=-1).flatten(-3)

    a, b = pairs(x.value)
    value = joined(a * cosine - b * sine, a * sine + b * cosine)
    var_a, var_b = pairs(x.variance)
    c2, s2 = cosine.square(), sine.square()
    mixed = joined(c2 * var_a + s2 * var_b, s2 * var_a + c2 * var_b)
    # Products, whose two roundings are the function's and their own.
    one = joined((a * cosine).abs(), (a * sine).abs())
    two = joined((b * sine).abs(), (b * cosine).abs())
    local = roundings.of_output(value)
    for product in (one, two):
        local = local + roundings.of_output(product, 2) + roundings.of_functions(product)
    off = ANGLE_ROUNDINGS * UNIT_ROUNDOFF[torch.float32] * theta
    turned = joined(a * sine + b * cosine, a * cosine - b * sine) * joined(off, off).repeat(
        1, a.shape[-2]
    )
    local[:, FRESH_RANDOM] += turned.square() / 3
    return Uncertain(value, mixed + local, x.common)


def gated(gate: Uncertain, up: Uncertain, h: torch.Tensor, roundings: Roundings) -> Uncertain:
    """Return the error of h [T, D], which is silu(gate) * up."""
    sigmoid = gate.value.sigmoid()
    silu = gate.value * sigmoid
    slope = sigmoid * (1 + gate.value * (1 - sigmoid))
    inherited = minkowski(
        (slope * up.value).square() * gate.total,
        silu.square() * up.total,
    )
    value = h.double()
    local = (
        roundings.of_output(value, 2)
        + roundings.of_internal(value, 4)
        + roundings.of_functions(value)
    )
    return Uncertain(value, inherited + local, torch.zeros_like(gate.common))


def residual(
    x: Uncertain, block: Uncertain, total: torch.Tensor, roundings: Roundings
) -> Uncertain:
    """Return the error of the sum [T, D] of the stream and what a block adds to it."""
    value = total.double()
    inherited = minkowski(x.total, block.total)
    return Uncertain(value, inherited + roundings.of_output(value), torch.zeros_like(block.common))
