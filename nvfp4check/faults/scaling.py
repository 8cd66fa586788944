"""What elements are before they are rounded to E2M1, under each convention.

Contract:
    float32, every operation rounded to nearest even, in the order that
    `nvfp4ref.conventions` gives for the convention; where a block scale is zero, NaN or infinite
"""

import torch

from nvfp4ref import e4m3
from nvfp4ref.conventions import RULES, Convention, ElementScaling
from nvfp4ref.formats import BLOCK_SIZE, E2M1

Tensor = torch.Tensor


def blocks_of(x: Tensor) -> Tensor:
    """Return x [..., K] as float32 blocks [..., C, 16]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE).float()


def scaled_elements(
    x: Tensor, block_scales: Tensor, decode: Tensor, convention: Convention
) -> Tensor:
    """Return the elements [M, K] of x in units of their scales, as the convention forms them."""
    scales = e4m3.decode(block_scales).unsqueeze(-1)
    return scaled_by(blocks_of(x), scales, decode.float(), convention).reshape(x.shape)


def scaled_by(blocks: Tensor, scales: Tensor, decode: Tensor, convention: Convention) -> Tensor:
    """Return blocks [M, C, 16] in units of scales [M, C, 1], which need not be E4M3 values."""
    encode = decode.reciprocal()
    match RULES[convention].element_scaling:
        case ElementScaling.DIVIDE_BY_PRODUCT:
            return blocks / (scales * decode)
        case ElementScaling.DIVIDE_BY_QUOTIENT:
            return blocks / (scales / encode)
        case ElementScaling.MULTIPLY_BY_QUOTIENT:
            return blocks * (encode / scales)
        case _:
            return blocks * (scales * encode.reciprocal()).reciprocal()


def ideal_scales(x: Tensor, decode: Tensor) -> Tensor:
    """Return amax / (6 g) of each block [M, C] in float32, before any rounding to E4M3."""
    amax = blocks_of(x).nan_to_num(0.0).abs().amax(-1)
    return amax / (E2M1.max * decode.float())
