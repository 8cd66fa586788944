"""F5 and F6: block scales other than the payload's, or of another block.

Contract:
    payload     scales changed after the codes were formed, or codes formed under another scale
    place       the right scales of another block
"""

from functools import partial
from typing import Any

import torch

from nvfp4check.faults.base import Form, KernelFault
from nvfp4check.faults.lifting import Pair, Tensor, in_decoding, in_operands, in_quantiser
from nvfp4check.faults.scales import quantised_under
from nvfp4check.faults.scaling import ideal_scales, scaled_by, scaled_elements
from nvfp4check.ops import Kernel
from nvfp4ref import e2m1, e4m3, nvfp4, packing
from nvfp4ref.conventions import Convention
from nvfp4ref.formats import BLOCK_SIZE

_BYTES = torch.arange(256)
_RIGHT = torch.tensor(e4m3.VALUES, dtype=torch.float64)


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
    return quantised_under(raw.view(torch.float8_e4m3fn), x, decode, convention)


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
    return quantised_under(
        nvfp4.quantize_block_scales(larger, decode, convention), x, decode, convention
    )


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

FAULTS = (*PAYLOAD, *PLACE)
