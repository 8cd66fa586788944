"""F3 and F4: block scales decoded wrongly, or out of range.

Contract:
    decoding    elements are the reference's E2M1 values times a scale from a wrong table of 256
    range       the reference's quantiser with one step of its block scale replaced
"""

from functools import partial
from typing import Any

import torch

from nvfp4check.faults.base import Form, KernelFault
from nvfp4check.faults.lifting import (
    ALL_SIDES,
    EITHER_SIDE,
    Pair,
    Tensor,
    in_decoding,
    in_quantiser,
)
from nvfp4check.faults.scaling import ideal_scales
from nvfp4check.ops import Kernel
from nvfp4ref import e2m1, e4m3, e8m0, nvfp4, packing
from nvfp4ref.conventions import Convention
from nvfp4ref.formats import BLOCK_SIZE

_BYTES = torch.arange(256)
_EXPONENTS, _MANTISSAS = (_BYTES >> 3) & 15, _BYTES & 7
_SIGNS = torch.where(_BYTES < 128, 1.0, -1.0).double()
_RIGHT = torch.tensor(e4m3.VALUES, dtype=torch.float64)
_POWERS = torch.exp2(_EXPONENTS.double() - 7)


def _with_table(table: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return elements whose scales are decoded by a table of 256 values."""
    raw = scales.contiguous().view(torch.uint8).long()
    elements = e2m1.decode(packing.unpack(codes.contiguous())).double()
    return elements * table[raw].repeat_interleave(BLOCK_SIZE, -1)


def _finite_nan(value: float) -> Tensor:
    table = _RIGHT.clone()
    table[0x7F], table[0xFF] = value, -value
    return table


def _half_value() -> Tensor:
    """Return the values of E4M3FNUZ: exponent bias 8, 0x80 is its only NaN."""
    fields = (8 + _MANTISSAS) * torch.exp2(_EXPONENTS.double() - 11)
    subnormal = _MANTISSAS * 2.0**-10
    table = _SIGNS * torch.where(_EXPONENTS == 0, subnormal, fields)
    table[0x80] = torch.nan
    return table


_E5M2 = torch.arange(256).to(torch.uint8).view(torch.float8_e5m2).double()
_E8M0 = e8m0.decode(torch.arange(256).to(torch.uint8)).double()
_NORMAL_ONLY = torch.where(_EXPONENTS == 0, _SIGNS * (8 + _MANTISSAS) * 2.0**-10, _RIGHT)
_NO_MANTISSA = torch.where(_RIGHT.isnan(), _RIGHT, _SIGNS * _POWERS)

#: The bits of an FP16 (bias 15) in a BF16 (bias 127); E4M3 to FP16 is compensated elsewhere.
_NOT_REBIASED = _RIGHT * 2.0**-112


def _without_saturation(x: Tensor, decode: Tensor, convention: Convention) -> Pair:
    packed, scales = nvfp4.quantize(x, decode, convention)
    beyond = ideal_scales(x, decode) > 464
    raw = torch.where(beyond, 0x7F, scales.view(torch.uint8))
    return packed, raw.to(torch.uint8).view(torch.float8_e4m3fn)


def quantised_under(scales: Tensor, x: Tensor, decode: Tensor, convention: Convention) -> Pair:
    """Quantise under block scales that are given."""
    codes = nvfp4.quantize_elements(x, scales, decode, convention)
    return packing.pack(codes), scales


def _clamped(highest: int, x: Tensor, decode: Tensor, convention: Convention) -> Pair:
    scales = nvfp4.quantize_block_scales(x, decode, convention)
    raw = scales.view(torch.uint8)
    lower = torch.where((raw & 0x7F) == 0x7F, raw, raw.clamp(max=highest))
    return quantised_under(lower.view(torch.float8_e4m3fn), x, decode, convention)


def _dead_blocks(x: Tensor, decode: Tensor, convention: Convention) -> Pair:
    packed, scales = nvfp4.quantize(x, decode, convention)
    amax = ideal_scales(x, decode)
    dead = ((amax > 0) & (amax <= 2.0**-10)).unsqueeze(-1)
    blocks = x.reshape(*scales.shape, BLOCK_SIZE).float()
    largest = torch.where(blocks == 0, 0, 7 + 8 * blocks.signbit())
    codes = packing.unpack(packed).view(*scales.shape, BLOCK_SIZE)
    codes = torch.where(dead, largest, codes).to(torch.uint8).flatten(-2)
    raw = torch.where(dead.squeeze(-1), 0, scales.view(torch.uint8)).to(torch.uint8)
    return packing.pack(codes), raw.view(torch.float8_e4m3fn)


def _zero_block_of_one(x: Tensor, decode: Tensor, convention: Convention) -> Pair:
    packed, scales = nvfp4.quantize(x, decode, convention)
    one = e4m3.encode(decode.float().reciprocal(), e4m3.Overflow.NAN)
    live = x.reshape(*scales.shape, BLOCK_SIZE).float().abs().nan_to_num(1.0).amax(-1) != 0
    raw = torch.where(live, scales.view(torch.uint8), one)
    return packed, raw.view(torch.float8_e4m3fn)


def _folded(kernel: Kernel, codes: Tensor, scales: Tensor, decode: Tensor, dtype: Any) -> Any:
    folded = e4m3.encode(e4m3.decode(scales.contiguous()) * decode.float())
    return kernel(codes, folded.view(torch.float8_e4m3fn), torch.ones_like(decode), dtype)


def _folded_product(kernel: Kernel, *arguments: Any) -> Any:
    a_codes, a_scales, b_codes, b_scales, alpha, *rest = arguments
    factor = alpha.float().view(*alpha.shape, *(1 for _ in b_scales.shape[alpha.ndim :]))
    folded = e4m3.encode(e4m3.decode(b_scales.contiguous()) * factor)
    kept = folded.view(torch.float8_e4m3fn)
    return kernel(a_codes, a_scales, b_codes, kept, torch.ones_like(alpha), *rest)


def _table(table: Tensor, label: str = "", sides: tuple[str, ...] = ALL_SIDES) -> tuple[Form, ...]:
    return in_decoding(partial(_with_table, table), label, sides)


#: For a scale wrong by one factor, which a product cannot say the operand of.
_EITHER_SIDE = (*EITHER_SIDE, "both")


DECODING = (
    KernelFault(
        id="F3a",
        name="subnormal scales decoded as normal",
        does="a scale byte below 8 decoded as (8 + m) 2**-10 instead of m 2**-9",
        needs="scale bytes 1 to 7, in rows without larger ones",
        threads=(
            "tile-ai/tilelang/issues/2702",
            "tile-ai/tilelang/pull/2710",
            "local-inference-lab/b12x/pull/388",
            "1bit-MONSTER/1bit-MONSTER/issues/300",
        ),
        forms=_table(_NORMAL_ONLY),
    ),
    KernelFault(
        id="F3b",
        name="mantissa of the scale dropped",
        does="scales decoded as 2**(e - 7)",
        needs="scales that are no powers of two",
        threads=(),
        forms=_table(_NO_MANTISSA),
    ),
    KernelFault(
        id="F3c",
        name="NaN scale read as a number",
        does="scale bytes 0x7F and 0xFF decoded as 480, or as 0",
        needs="a NaN scale",
        threads=(
            "tile-ai/tilelang/issues/2702",
            "tile-ai/tilelang/pull/2710",
            "ml-explore/mlx/pull/4164",
            "ml-explore/mlx/issues/4135",
        ),
        forms=(*_table(_finite_nan(480.0), "as 480"), *_table(_finite_nan(0.0), "as 0")),
    ),
    KernelFault(
        id="F3d",
        name="scale byte used as a number",
        does="0x38 taken for 56.0 instead of 1.0",
        needs="any scales",
        threads=(
            "ml-explore/mlx/issues/3762",
            "vllm-project/vllm/pull/51946",
            "vllm-project/vllm/issues/43416",
        ),
        forms=_table(_BYTES.double()),
    ),
    KernelFault(
        id="F3e",
        name="scale read in another 8-bit format",
        does="E4M3 scale bytes decoded as E8M0, E5M2 or E4M3FNUZ",
        needs="any scales",
        threads=(
            "deepseek-ai/DeepGEMM/issues/417",
            "vllm-project/vllm/pull/53680",
            "vllm-project/vllm/pull/47315",
        ),
        forms=(
            *_table(_E8M0, "as E8M0"),
            *_table(_E5M2, "as E5M2"),
            *_table(_half_value(), "as E4M3FNUZ", _EITHER_SIDE),
        ),
    ),
    KernelFault(
        id="F3f",
        name="scale widened without a new bias",
        does="scale bits shifted into a BF16: 2**-112 too small",
        needs="any scales",
        threads=(
            "vllm-project/vllm/pull/47315",
            "vllm-project/vllm/pull/34577",
            "vllm-project/vllm/pull/37464",
        ),
        forms=_table(_NOT_REBIASED, sides=_EITHER_SIDE),
    ),
)

RANGE = (
    KernelFault(
        id="F4a",
        name="overflow of the scale to NaN",
        does="a block scale above 464 cast without saturation to 0x7F",
        needs="a block larger than the global scale allows",
        threads=(
            "NVIDIA/Model-Optimizer/issues/1633",
            "vllm-project/vllm-omni/pull/4025",
            "pytorch/pytorch/pull/178817",
        ),
        forms=in_quantiser(_without_saturation)[:1],
    ),
    KernelFault(
        id="F4c",
        name="scales clamped at 240",
        does="the largest block scale is 0x77, the limit of another format",
        needs="a block near the maximum of its tensor",
        threads=("kekzl/imp/pull/94",),
        forms=in_quantiser(partial(_clamped, 0x77)),
    ),
    KernelFault(
        id="F4d",
        name="dead blocks",
        does="a scale that underflows is stored as 0 under codes of +-6",
        needs="blocks a million times smaller than the largest",
        threads=("NVIDIA/Model-Optimizer/pull/1382",),
        forms=in_quantiser(_dead_blocks, conventions=("modelopt",))[:1],
    ),
    KernelFault(
        id="F4e",
        name="scale of a zero block overflows",
        does="a block of zeros gets 1 / g as its scale, unclamped: NaN where amax < 6",
        needs="a block of zeros under a small global scale",
        threads=("NVIDIA/Model-Optimizer/pull/1397",),
        forms=in_quantiser(_zero_block_of_one),
    ),
    KernelFault(
        id="F4f",
        name="global scale folded into block scales",
        does="E4M3(S g) in place of S and g: most scales become subnormal",
        needs="a global scale far below one",
        threads=("mlx-node/mlx-node/pull/120",),
        forms=(
            Form(operation="dequantize", wrong=_folded, around=True),
            Form(operation="matmul", wrong=_folded_product, around=True),
            Form(operation="grouped_matmul", wrong=_folded_product, around=True),
        ),
    ),
)

FAULTS = (*DECODING, *RANGE)
