"""F11 and F12: halves of a fused weight mispaired, and the ends and tiles of K and M.

Contract:
    halves   gate and up as a kernel sees them that holds both in one buffer and cuts it wrongly
    tails    blocks at the end of K dropped, counted twice, or under another scale
    tiles    rows from the second tile on see what the first tile left behind
"""

from functools import partial
from typing import Any

import torch

from nvfp4check.faults.base import Form, KernelFault
from nvfp4check.faults.lifting import (
    Pair,
    Tensor,
    by_group,
    in_operands,
    product_of,
)
from nvfp4check.ops import Kernel
from nvfp4ref import e4m3
from nvfp4ref import matmul as reference
from nvfp4ref.formats import BLOCK_SIZE, SCALE_TILE_ROWS

_ONE = 0x38  # the E4M3 byte of 1.0


def _exchanged(kernel: Kernel, gate: Tensor, up: Tensor, decode: Tensor) -> Any:
    return kernel(up, gate, decode)


def _padded_at_the_end(kernel: Kernel, gate: Tensor, up: Tensor, decode: Tensor) -> Any:
    """Cut [gate; up; padding to a multiple of 128] at half of its padded size."""
    width = gate.shape[1]
    fused = torch.cat((gate, up), dim=1)
    whole = -(-2 * width // 128) * 128
    fused = torch.nn.functional.pad(fused, (0, whole - 2 * width))
    second = fused[:, whole // 2 : whole // 2 + width]
    return kernel(gate, torch.nn.functional.pad(second, (0, width - second.shape[1])), decode)


def _halves_as_interleaved(kernel: Kernel, gate: Tensor, up: Tensor, decode: Tensor) -> Any:
    fused = torch.cat((gate, up), dim=1)
    return kernel(fused[:, 0::2].contiguous(), fused[:, 1::2].contiguous(), decode)


def _padded_expert_offset(kernel: Kernel, *arguments: Any) -> Any:
    """Find the scales of expert e at e rows-rounded-up-to-128 in unpadded scales."""
    a_codes, a_scales, b_codes, b_scales, *rest = arguments
    experts, rows, columns = b_scales.shape
    raw = b_scales.contiguous().view(torch.uint8).flatten()
    if not raw.numel():
        return kernel(*arguments)
    stride = -(-rows // SCALE_TILE_ROWS) * SCALE_TILE_ROWS * columns
    places = torch.arange(experts).unsqueeze(1) * stride + torch.arange(rows * columns)
    moved = raw[places % len(raw)].view(experts, rows, columns).view(torch.float8_e4m3fn)
    return kernel(a_codes, a_scales, b_codes, moved, *rest)


def _without_last(blocks: int, codes: Tensor, scales: Tensor) -> Pair:
    """Zero the last blocks that do not fill a tile of so many; with 0, the very last block."""
    count = scales.shape[-1]
    kept = count // blocks * blocks if blocks else max(count - 1, 0)
    cut = codes.clone()
    cut[..., kept * BLOCK_SIZE // 2 :] = 0
    raw = scales.contiguous().view(torch.uint8).clone()
    raw[..., kept:] = _ONE  # nothing of the tail is read, its NaNs neither
    return cut, raw.view(torch.float8_e4m3fn)


def _last_scale(byte: int | None, codes: Tensor, scales: Tensor) -> Pair:
    """Give the last block a scale of this byte, or of the block before it."""
    raw = scales.contiguous().view(torch.uint8).clone()
    if byte is not None:
        raw[..., -1:] = byte
    elif raw.shape[-1] > 1:
        raw[..., -1] = raw[..., -2]
    return codes, raw.view(torch.float8_e4m3fn)


def _overlapping_splits(
    a_codes: Tensor,
    a_scales: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    alpha: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Let each split of one block sum a tile of two: its own and the block behind it."""
    a = reference.operand(a_codes, a_scales)
    b = reference.operand(b_codes, b_scales)
    twice = torch.cat((a, a[:, BLOCK_SIZE:]), dim=1), torch.cat((b, b[:, BLOCK_SIZE:]), dim=1)
    return product_of(*twice, alpha, dtype)


def _scales_applied_in_place(
    a_codes: Tensor,
    a_scales: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    alpha: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply the elements of B once more by their scales for rows from 128 on."""
    a = reference.operand(a_codes, a_scales)
    b = reference.operand(b_codes, b_scales)
    again = b * e4m3.decode(b_scales.contiguous()).double().repeat_interleave(BLOCK_SIZE, -1)
    first = product_of(a[:SCALE_TILE_ROWS], b, alpha, dtype)
    return torch.cat((first, product_of(a[SCALE_TILE_ROWS:], again, alpha, dtype)))


FAULTS = (
    KernelFault(
        id="F11a",
        name="gate and up exchanged",
        does="silu(up) * gate",
        needs="gate and up that differ",
        threads=(
            "sgl-project/sglang/pull/32430",
            "PaddlePaddle/FastDeploy/pull/6963",
            "NVIDIA/Megatron-LM/pull/6045",
            "vllm-project/vllm/pull/40082",
        ),
        forms=(Form(operation="silu_mul_quantize", wrong=_exchanged, around=True),),
    ),
    KernelFault(
        id="F11b",
        name="fused halves padded at the end",
        does="[gate; up] padded to a multiple of 128 and cut in half",
        needs="a width that is no multiple of 64",
        threads=(
            "NVIDIA/TensorRT-LLM/pull/18520",
            "vllm-project/vllm/issues/55649",
            "vllm-project/vllm/pull/48624",
            "sgl-project/sglang/issues/30887",
            "sgl-project/sglang/pull/30888",
        ),
        forms=(Form(operation="silu_mul_quantize", wrong=_padded_at_the_end, around=True),),
    ),
    KernelFault(
        id="F11c",
        name="padded offset of an expert",
        does="scales of expert e looked for at e times the rows rounded up to 128",
        needs="several experts whose rows are no multiple of 128",
        threads=("vllm-project/vllm/pull/35497",),
        forms=(Form(operation="grouped_matmul", wrong=_padded_expert_offset, around=True),),
    ),
    KernelFault(
        id="F11d",
        name="halves taken as interleaved",
        does="gate and up read from even and odd places of [gate; up]",
        needs="any values",
        threads=(),
        forms=(Form(operation="silu_mul_quantize", wrong=_halves_as_interleaved, around=True),),
    ),
    KernelFault(
        id="F12a",
        name="last block of K dropped",
        does="the last 16 elements of every row are not summed",
        needs="a last block that is not zero",
        threads=("NVIDIA/cutlass/pull/2155", "pytorch/FBGEMM/issues/6159"),
        forms=in_operands(partial(_without_last, 0), sides=("both",), dequantize=False),
    ),
    KernelFault(
        id="F12b",
        name="last scale of K not applied",
        does="the last block takes a scale of 1, or that of the block before",
        needs="a last scale other than those",
        threads=("pytorch/FBGEMM/issues/6159", "triton-lang/triton/pull/10190"),
        forms=(
            *in_operands(partial(_last_scale, _ONE), "1.0 for the last scale"),
            *in_operands(partial(_last_scale, None), "the scale before the last"),
        ),
    ),
    KernelFault(
        id="F12c",
        name="tail of K dropped",
        does="K // tile tiles in place of their number rounded up",
        needs="K no multiple of the tile",
        threads=(
            "NVIDIA/cutlass/pull/2155",
            "triton-lang/triton/pull/10190",
            "triton-lang/triton/pull/10343",
            "triton-lang/triton/pull/10385",
        ),
        forms=tuple(
            form
            for tile in (32, 64, 128, 256)
            for form in in_operands(
                partial(_without_last, tile // BLOCK_SIZE),
                f"tiles of {tile}",
                ("both",),
                dequantize=False,
            )
        ),
    ),
    KernelFault(
        id="F12d",
        name="splits of K narrower than their tile",
        does="each split of 16 sums a tile of 32: its neighbour's block too",
        needs="more than one block",
        threads=("ml-explore/mlx/pull/3854", "aosama/astronomical/issues/151"),
        forms=(
            Form(operation="matmul", wrong=_overlapping_splits),
            Form(operation="grouped_matmul", wrong=partial(by_group, _overlapping_splits)),
        ),
    ),
    KernelFault(
        id="F12e",
        name="scales multiplied in place",
        does="rows from 128 on see B already multiplied by its scales",
        needs="more than 128 rows",
        threads=("NVIDIA/cutlass/issues/3596",),
        forms=(Form(operation="matmul", wrong=_scales_applied_in_place),),
    ),
)
