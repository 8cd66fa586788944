"""Rotary embedding with YaRN, on DeepSeek's interleaved pairs.

T tokens, H heads, R = qk_rope_head_dim.

Contract:
    frequency i    f = theta**(-2i/R), i < R/2; under YaRN f/factor * ramp + f * (1 - ramp), the
                   ramp rising from 0 at the pair that turns beta_fast times within the original
                   length (rounded down) to 1 at the one that turns beta_slow times (rounded up)
    angle          position * frequency, each rounded to float32 as in DeepSeek's own code: the
                   model was trained on these angles, up to 2**-12 rad off near position 5000
    rotation       (a, b) = x[2i], x[2i+1]  ->  (a cos - b sin, a sin + b cos), in place: pairs
                   stay interleaved, where transformers puts all a before all b (equal scores)
    arithmetic     float64 after the angle, rounded once to the dtype of x
    factor         cosine and sine times m(mscale) / m(mscale_all_dim), 1.0 in DeepSeek-V3

Sources: DeepSeek-V3 inference/model.py, precompute_freqs_cis and apply_rotary_emb.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from nvfp4ref.deepseek_v3.config import RotaryConfig, YarnConfig


def frequencies(rotary: RotaryConfig) -> torch.Tensor:
    """Return the frequency of each pair in radians a token, float32 [R/2]."""
    width = rotary.qk_rope_head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain = 1.0 / rotary.rope_theta**exponents
    if rotary.rope_scaling is None:
        return plain
    ramp = _ramp(rotary, rotary.rope_scaling)
    return plain / rotary.rope_scaling.factor * ramp + plain * (1 - ramp)


def _ramp(rotary: RotaryConfig, yarn: YarnConfig) -> torch.Tensor:
    """Return 0 for the pairs that keep their frequency, 1 for those that are stretched."""
    width, base = rotary.qk_rope_head_dim, rotary.rope_theta

    def pair_that_turns(rotations: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(base))

    low = float(max(math.floor(pair_that_turns(yarn.beta_fast)), 0))
    high = float(min(math.ceil(pair_that_turns(yarn.beta_slow)), width - 1))
    if low == high:
        high += 0.001  # as published: a step instead of a division by zero
    pairs = torch.arange(width // 2, dtype=torch.float32)
    return ((pairs - low) / (high - low)).clamp(0, 1)


def angles(positions: torch.Tensor, rotary: RotaryConfig) -> torch.Tensor:
    """Return the angle of each position and pair in radians, float32 [T, R/2]."""
    pairs = frequencies(rotary).to(positions.device)
    return torch.outer(positions.to(torch.float32), pairs)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Return x [T, H, R] with each pair turned by its angle; cosine and sine are [T, R/2]."""
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)  # one for all heads
    a, b = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((a * cosine - b * sine, a * sine + b * cosine), dim=-1)
    return turned.flatten(-2)


def rope(
    x: torch.Tensor,
    positions: torch.Tensor,
    rotary: RotaryConfig | Mapping[str, Any] | object,
) -> torch.Tensor:
    """Return x [T, H, R] rotated to its positions [T], in the dtype of x.

    `rotary` is a RotaryConfig, a DeepSeek-V3 config object or a mapping of its fields.

    Raises:
        ValueError: x, the positions and the configuration do not fit together.
    """
    config = RotaryConfig.of(rotary)
    if x.ndim != 3 or x.shape[-1] != config.qk_rope_head_dim or x.shape[:1] != positions.shape:
        raise ValueError(
            f"rope takes x [T, H, {config.qk_rope_head_dim}] and positions [T], "
            f"found {tuple(x.shape)} and {tuple(positions.shape)}"
        )
    theta = angles(positions, config).double()
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.rotary_factor
    return rotate(x.double(), theta.cos() * factor, theta.sin() * factor).to(x.dtype)
