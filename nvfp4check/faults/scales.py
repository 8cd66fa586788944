"""F3 to F6: block scales decoded wrongly, out of range, other than the payload's, or misplaced.

Contract:
    decoding    elements are the reference's E2M1 values times a scale from a wrong table of 256
    range       the reference's quantiser with one step of its block scale replaced
    payload     scales changed after the codes were formed, or codes formed under another scale
    place       the right scales of another block
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
    in_operands,
    in_quantiser,
)
from nvfp4check.faults.scaling import ideal_scales, scaled_by, scaled_elements
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


def _under(scales: Tensor, x: Tensor, decode: Tensor, convention: Convention) -> Pair:
    """Quantise under block scales that are given."""
    codes = nvfp4.quantize_elements(x, scales, decode, convention)
    return packing.pack(codes), scales


def _clamped(highest: int, x: Tensor, decode: Tensor, convention: Convention) -> Pair:
    scales = nvfp4.quantize_block_scales(x, decode, convention)
    raw = scales.view(torch.uint8)
    lower = torch.where((raw & 0x7F) == 0x7F, raw, raw.clamp(max=highest))
    return _under(lower.view(torch.float8_e4m3fn), x, decode, convention)


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


def _by_unrounded_scale(x: Tensor, decode: Tensor, convention: Convention) -> Pair:
    packed, scales = nvfp4.quantize(x, decode, convention)
    ideal = ideal_scales(x, decode).clamp(max=448.0).unsqueeze(-1)
    blocks = x.reshape(*scales.shape, BLOCK_SIZE).float()
    scaled = scaled_by(blocks, ideal, decode.float(), convention).flatten(-2)
    live = scaled.isfinite() & (scaled != 0)
    codes = torch.where(live, e2m1.encode(torch.where(live, scaled, 0.0)), packing.unpack(packed))
    return packing.pack(codes), scales


def _afterwards(table: Tensor, x: Tensor, decode: Tensor, convention: Convention) -> Pair:
    """Change the scale bytes by a table once the codes are formed."""
    packed, scales = nvfp4.quantize(x, decode, convention)
    raw = table[scales.view(torch.uint8).long()]
    return packed, raw.to(torch.uint8).view(torch.float8_e4m3fn)


def _power_table(*, up: bool) -> Tensor:
    values = _RIGHT[:0x7F].clamp(min=2.0**-9)
    exponents = values.log2().ceil() if up else values.log2().floor()
    table = _BYTES.clone()
    table[1:0x7F] = e4m3.encode(torch.exp2(exponents)[1:]).long()
    return table


_QUARTER = torch.where((_BYTES & 0x7F) < 0x7F, e4m3.encode(_RIGHT.nan_to_num(0.0) / 4).long(), 0x7F)


def _nearest_power(x: Tensor, decode: Tensor, convention: Convention) -> Pair:
    ideal = ideal_scales(x, decode).clamp(2.0**-9, 448.0).nan_to_num(448.0)
    nearest = torch.exp2(ideal.log2().round()).clamp(max=256.0)
    scales = nvfp4.quantize_block_scales(x, decode, convention)
    keep = (x.reshape(*scales.shape, BLOCK_SIZE).float().nan_to_num(0.0) == 0).all(-1)
    raw = torch.where(keep, scales.view(torch.uint8), e4m3.encode(nearest))
    return _under(raw.view(torch.float8_e4m3fn), x, decode, convention)


def _by_reciprocal(x: Tensor, decode: Tensor, convention: Convention) -> Pair:
    packed, scales = nvfp4.quantize(x, decode, convention)
    factor = (e4m3.decode(scales) * decode.float()).reciprocal().unsqueeze(-1)
    scaled = (x.reshape(*scales.shape, BLOCK_SIZE).float() * factor).flatten(-2)
    right = scaled_elements(x, scales, decode, convention)
    live = scaled.isfinite() & (scaled != 0) & right.isfinite()
    codes = torch.where(live, e2m1.encode(torch.where(live, scaled, 0.0)), packing.unpack(packed))
    return packing.pack(codes), scales


def _picked(places: Tensor, scales: Tensor) -> Tensor:
    raw = scales.contiguous().view(torch.uint8)
    return raw[..., places].contiguous().view(torch.float8_e4m3fn)


def _of_32(codes: Tensor, scales: Tensor) -> Pair:
    return codes, _picked(torch.arange(scales.shape[-1]) // 2, scales)


def _of_neighbour(step: int, codes: Tensor, scales: Tensor) -> Pair:
    """Take the scale one place on or back in memory, across the ends of rows."""
    raw = scales.contiguous().view(torch.uint8)
    moved = raw.flatten().roll(-step).view(raw.shape)
    return codes, moved.view(torch.float8_e4m3fn)


def _of_pair(codes: Tensor, scales: Tensor) -> Pair:
    """Take the scale of the other block of an even pair; one without a partner keeps its own."""
    columns = torch.arange(scales.shape[-1])
    other = columns ^ 1
    return codes, _picked(torch.where(other < len(columns), other, columns), scales)


def _along_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """Decode as if a scale covered 16 rows of one column, in the same memory."""
    elements = e2m1.decode(packing.unpack(codes.contiguous())).double()
    rows, columns = elements.shape[-2:]
    flat = e4m3.decode(scales.contiguous()).double().flatten(-2)
    places = (torch.arange(rows).unsqueeze(1) // 16) * columns + torch.arange(columns)
    if flat.shape[-1] == 0:
        return elements
    return elements * flat[..., places % flat.shape[-1]]


def _pair_amax(x: Tensor, decode: Tensor, convention: Convention) -> Pair:
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)
    columns = torch.arange(blocks.shape[-2])
    other = torch.where((columns ^ 1) < len(columns), columns ^ 1, columns)
    larger = torch.maximum(blocks.abs(), blocks[..., other, :].abs()).flatten(-2)
    return _under(nvfp4.quantize_block_scales(larger, decode, convention), x, decode, convention)


def _uneven_tiles(w: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """Take the tile size from the sizes of weight and scales instead of 128."""
    spread = scale_inv.float()
    for dim in (0, 1):
        size = -(-w.shape[dim] // max(scale_inv.shape[dim], 1))
        spread = spread.index_select(dim, torch.arange(w.shape[dim]) // max(size, 1))
    return (e4m3.decode(w.contiguous()) * spread).to(dtype)


def _next_expert(kernel: Kernel, *arguments: Any) -> Any:
    a_codes, a_scales, b_codes, b_scales, *rest = arguments
    raw = b_scales.contiguous().view(torch.uint8).roll(-1, 0)
    moved = raw.view(torch.float8_e4m3fn)
    return kernel(a_codes, a_scales, b_codes, moved, *rest)


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

PAYLOAD = (
    KernelFault(
        id="F5a",
        name="codes under the unrounded scale",
        does="elements divided by amax / 6, though the stored scale is its E4M3 rounding",
        needs="any values",
        threads=("NVIDIA/Model-Optimizer/pull/2243", "sgl-project/sglang/pull/26766"),
        forms=in_quantiser(_by_unrounded_scale),
    ),
    KernelFault(
        id="F5b",
        name="scale raised to a power of two afterwards",
        does="scales rounded up to 2**k once the codes are formed",
        needs="scales that are no powers of two",
        threads=("huggingface/transformers/issues/47030", "sgl-project/sglang/pull/13960"),
        forms=in_quantiser(partial(_afterwards, _power_table(up=True))),
    ),
    KernelFault(
        id="F5c",
        name="mantissa of the scale truncated afterwards",
        does="scales rounded down to 2**k once the codes are formed",
        needs="scales that are no powers of two",
        threads=("sgl-project/sglang/issues/39193",),
        forms=in_quantiser(partial(_afterwards, _power_table(up=False))),
    ),
    KernelFault(
        id="F5d",
        name="exponent offset applied twice",
        does="stored scales four times too small",
        needs="any values",
        threads=(
            "vllm-project/compressed-tensors/pull/538",
            "vllm-project/compressed-tensors/pull/541",
        ),
        forms=in_quantiser(partial(_afterwards, _QUARTER)),
    ),
    KernelFault(
        id="F5e",
        name="scale rounded to the nearest power of two",
        does="codes formed and clipped under the power of two nearest to amax / 6",
        needs="any values",
        threads=(
            "ml-explore/mlx/pull/4353",
            "Pushkinist/rMLX/issues/463",
            "vllm-project/vllm/pull/43557",
        ),
        forms=in_quantiser(_nearest_power),
    ),
    KernelFault(
        id="F5f",
        name="reciprocal for a division",
        does="elements multiplied by the rounded 1 / (S g)",
        needs="elements at or next to ties, in a convention that divides",
        threads=("NVIDIA/TransformerEngine/pull/2639",),
        forms=in_quantiser(_by_reciprocal, conventions=("modelopt",))[:1],
    ),
)

PLACE = (
    KernelFault(
        id="F6a",
        name="blocks of 32",
        does="block j takes the scale of block j // 2",
        needs="adjacent blocks of different scale",
        threads=("ml-explore/mlx/issues/3557", "ml-explore/mlx/pull/3934"),
        forms=in_operands(_of_32),
    ),
    KernelFault(
        id="F6b",
        name="the neighbour's scale",
        does="block j takes the scale beside its own",
        needs="adjacent blocks of different scale",
        threads=("ml-explore/mlx/pull/3854", "aosama/astronomical/issues/151"),
        forms=(
            *in_operands(_of_pair, "the other of a pair"),
            *in_operands(partial(_of_neighbour, 1), "the next"),
            *in_operands(partial(_of_neighbour, -1), "the one before"),
        ),
    ),
    KernelFault(
        id="F6c",
        name="blocks along the rows",
        does="a scale covers 16 rows of one column",
        needs="scales that differ",
        threads=(
            "unslothai/unsloth-zoo/pull/1114",
            "NVIDIA-NeMo/Megatron-Bridge/pull/3743",
            "NVIDIA-NeMo/Megatron-Bridge/pull/3753",
        ),
        forms=in_decoding(_along_rows),
    ),
    KernelFault(
        id="F6d",
        name="one amax for two blocks",
        does="the larger amax of two adjacent blocks makes the scales of both",
        needs="adjacent blocks of different size",
        threads=("ml-explore/mlx/issues/3557", "ml-explore/mlx/pull/3934"),
        forms=in_quantiser(_pair_amax),
    ),
    KernelFault(
        id="F6e",
        name="tile size from the sizes of the tensors",
        does="FP8 tiles of ceil(rows / scale rows) in place of 128: 576 rows give 116",
        needs="a dimension that is no multiple of 128",
        threads=("NVIDIA/TensorRT-LLM/pull/14793",),
        forms=(Form(operation="dequantize_fp8_block", wrong=_uneven_tiles),),
    ),
    KernelFault(
        id="F6f",
        name="the next expert's scales",
        does="codes of expert e under the block scales of expert e + 1",
        needs="experts whose scales differ",
        threads=(),
        forms=(Form(operation="grouped_matmul", wrong=_next_expert, around=True),),
    ),
)

FAULTS = (*DECODING, *RANGE, *PAYLOAD, *PLACE)
