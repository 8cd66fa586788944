"""Rotary embedding with YaRN on DeepSeek's interleaved pairs.

T tokens, H heads, R = qk_rope_head_dim.

Contract:
    frequency  theta**(-2i/R) in float32, stretched by YaRN where the configuration says so
    angle      position * frequency, rounded to float32; cosine and sine of it in float64, times
               the rotary factor, rounded to float32: a table of [T, R/2] beside x of [T, H, R]
    rotation   (a, b) = x[2i], x[2i+1]  ->  (a cos - b sin, a sin + b cos) in float32, rounded to
               the dtype of x; pairs stay interleaved

A GPU's fast sine is right near zero only, and positions go to 160,000 radians: hence the table.
Sources: DeepSeek-V3 inference/model.py, precompute_freqs_cis and apply_rotary_emb.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from nvfp4check.kernels.arch import INTERPRETER, Architecture, architecture_of
from nvfp4check.kernels.launch import (
    INPUT_DTYPES,
    ceil_div,
    check_device,
    check_dtype,
    check_shape,
    launch,
    power_of_two,
)


@triton.jit
def _rope_kernel(
    x_ptr,
    cosine_ptr,
    sine_ptr,
    out_ptr,
    ROWS,
    H,
    R,
    stride_xt,
    stride_xh,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    token, head = (row // H).to(tl.int64), (row % H).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    offs_pair = tl.arange(0, BLOCK_R // 2)[None, :]
    inside = (row < ROWS) & (offs_r < R)
    in_pairs = (row < ROWS) & (offs_pair < R // 2)
    x = tl.load(x_ptr + token * stride_xt + head * stride_xh + offs_r, mask=inside, other=0.0)
    a, b = tl.split(tl.reshape(x.to(tl.float32), (BLOCK, BLOCK_R // 2, 2)))
    cosine = tl.load(cosine_ptr + token * (R // 2) + offs_pair, mask=in_pairs, other=0.0)
    sine = tl.load(sine_ptr + token * (R // 2) + offs_pair, mask=in_pairs, other=0.0)
    turned = tl.join(a * cosine - b * sine, a * sine + b * cosine)
    turned = tl.reshape(turned, (BLOCK, BLOCK_R)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * R + offs_r, turned, mask=inside)


def rotary_table(
    positions: torch.Tensor, config: Mapping[str, Any] | object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of each position and pair, float32 [T, R/2].

    `config` is a DeepSeek-V3 configuration, as an object or as a mapping of its fields.

    Raises:
        ValueError: A field is missing, or the scaling is of a type other than yarn.
    """
    width = _field(config, "qk_rope_head_dim")
    if width is None:
        raise ValueError("config: qk_rope_head_dim is missing, the width of the rotary part")
    scaling = _field(config, "rope_parameters") or _field(config, "rope_scaling") or {}
    theta = _field(scaling, "rope_theta") or _field(config, "rope_theta") or 10000.0
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequencies = 1.0 / theta**exponents
    kind = _field(scaling, "rope_type") or _field(scaling, "type")
    # A RotaryConfig's own scaling object names no type: it is yarn if it has a factor.
    stretched = kind == "yarn" or (kind is None and _field(scaling, "factor") is not None)
    factor = 1.0
    if stretched:
        ramp = _ramp(int(width), float(theta), scaling)
        stretch = float(_field(scaling, "factor"))
        frequencies = frequencies / stretch * ramp + frequencies * (1 - ramp)
        factor = _rotary_factor(stretch, scaling)
    elif kind not in (None, "default"):
        raise ValueError(f"config: rope_scaling of type {kind!r}, expected yarn or none")
    pairs = frequencies.to(positions.device)
    angles = torch.outer(positions.to(torch.float32), pairs).double()
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def _field(source: Any, name: str) -> Any:
    return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)


def _ramp(width: int, theta: float, scaling: Any) -> torch.Tensor:
    """Return 0 for the pairs that keep their frequency, 1 for those that are stretched."""
    original = _field(scaling, "original_max_position_embeddings")
    if original is None:
        raise ValueError("config: yarn needs original_max_position_embeddings")

    def pair_that_turns(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    fast, slow = _field(scaling, "beta_fast") or 32.0, _field(scaling, "beta_slow") or 1.0
    low = float(max(math.floor(pair_that_turns(fast)), 0))
    high = float(min(math.ceil(pair_that_turns(slow)), width - 1))
    span = high - low or 0.001  # as published: a step where the two coincide
    return ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)


def _rotary_factor(stretch: float, scaling: Any) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(stretch) + 1.0 if stretch > 1 else 1.0

    own, all_dim = _field(scaling, "mscale"), _field(scaling, "mscale_all_dim")
    return mscale(own) / mscale(all_dim) if own and all_dim else mscale(1.0)


def rope_tile(arch: Architecture, rows: int, width: int) -> tuple[int, int]:
    """Return how many rows (token and head) a program turns, and their padded width."""
    block_r = power_of_two(width, least=2, most=1 << 12)
    elements = 1 << 16 if arch is INTERPRETER else 1 << 12
    return power_of_two(rows, most=max(1, elements // block_r)), block_r


def rope(
    x: torch.Tensor, positions: torch.Tensor, config: Mapping[str, Any] | object
) -> torch.Tensor:
    """Return x [T, H, R] rotated to its positions [T], in the dtype of x.

    Raises:
        ValueError: x, the positions and the configuration do not fit together.
    """
    check_dtype("x", x, *INPUT_DTYPES)
    width = _field(config, "qk_rope_head_dim")
    check_shape("x", x, None, None, width)
    check_dtype("positions", positions, torch.int64, torch.int32)
    check_shape("positions", positions, x.shape[0])
    check_device(x=x, positions=positions)
    T, H, R = x.shape
    cosine, sine = rotary_table(positions, config)
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(T, H, R, dtype=x.dtype, device=x.device)
    block, block_r = rope_tile(architecture_of(x), T * H, R)
    launch(
        _rope_kernel,
        (ceil_div(T * H, block),),
        x,
        cosine,
        sine,
        out,
        T * H,
        H,
        R,
        x.stride(0),
        x.stride(1),
        on=x,
        BLOCK=block,
        BLOCK_R=block_r,
    )
    return out
