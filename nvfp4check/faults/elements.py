"""F1 and F2: the order of elements and nibbles, and the rounding and decoding of E2M1.

Contract:
    nibbles   of a byte exchanged, or a block's halves taken for its low and high nibbles
    rounding  the reference's quantiser under its convention, but for the one step named; elements
              that its convention decides otherwise (a scale of zero, NaN) stay the convention's
"""

from collections.abc import Callable
from functools import partial

import torch

from nvfp4check.faults.base import KernelFault
from nvfp4check.faults.lifting import (
    EITHER_SIDE,
    ONE_SIDE,
    in_decoding,
    in_operands,
    in_quantiser,
    on_codes,
)
from nvfp4check.faults.scaling import scaled_elements
from nvfp4ref import e2m1, e4m3, nvfp4, packing
from nvfp4ref.conventions import Convention
from nvfp4ref.formats import BLOCK_SIZE

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]


def swapped_nibbles(codes: Tensor) -> Tensor:
    """Return packed codes with the two elements of each byte exchanged."""
    return (codes >> 4) | (codes << 4)


def _split_halves(codes: Tensor) -> Tensor:
    """Return packed codes read as if byte i of a block held elements i and i + 8."""
    nibbles = packing.unpack(codes.contiguous())
    blocks = nibbles.shape[-1] // BLOCK_SIZE
    pairs = nibbles.view(*nibbles.shape[:-1], blocks, BLOCK_SIZE // 2, 2)
    return packing.pack(pairs.transpose(-1, -2).flatten(-3))


def _transposed_if_square(codes: Tensor, scales: Tensor) -> Pair:
    elements = packing.unpack(codes.contiguous())
    if elements.shape[-1] != elements.shape[-2]:
        return codes, scales
    return packing.pack(elements.transpose(-1, -2).contiguous()), scales


def _requantised(
    encode: Callable[[Tensor], Tensor], x: Tensor, decode: Tensor, convention: Convention
) -> Pair:
    """Quantise with another encoder of scaled elements; what is not finite is the reference's."""
    packed, scales = nvfp4.quantize(x, decode, convention)
    scaled = scaled_elements(x, scales, decode, convention)
    codes = packing.unpack(packed)
    live = scaled.isfinite() & (scaled != 0)
    wrong = encode(torch.where(live, scaled, 0.0))
    return packing.pack(torch.where(live, wrong, codes)), scales


def _ties_away(scaled: Tensor) -> Tensor:
    midpoints = torch.tensor(e2m1.MIDPOINTS)
    raised = torch.searchsorted(midpoints, scaled.abs().contiguous(), right=True)
    return (raised + 8 * scaled.signbit()).to(torch.uint8)


def _through_bfloat16(scaled: Tensor) -> Tensor:
    return e2m1.encode(scaled.to(torch.bfloat16))


def _truncated(scaled: Tensor) -> Tensor:
    magnitudes = torch.tensor(e2m1.MAGNITUDES)
    lowered = torch.searchsorted(magnitudes, scaled.abs().contiguous(), right=True) - 1
    return (lowered + 8 * scaled.signbit()).to(torch.uint8)


def _nonfinite_to_zero(x: Tensor, decode: Tensor, convention: Convention) -> Pair:
    packed, scales = nvfp4.quantize(x, decode, convention)
    codes = torch.where(x.isfinite(), packing.unpack(packed), 0)
    return packing.pack(codes), scales


def _without_subnormal(codes: Tensor, scales: Tensor) -> Tensor:
    """Decode as if every code were normal: 0 and 8 to +-0.5, 1 and 9 to +-0.75."""
    values = torch.tensor(e2m1.VALUES, dtype=torch.float64)
    values[torch.tensor([0, 1, 8, 9])] = torch.tensor([0.5, 0.75, -0.5, -0.75]).double()
    elements = values[packing.unpack(codes.contiguous()).long()]
    return elements * e4m3.decode(scales.contiguous()).double().repeat_interleave(BLOCK_SIZE, -1)


FAULTS = (
    KernelFault(
        id="F1a",
        name="nibbles exchanged",
        does="element 2i taken from, or put into, the high nibble of byte i",
        needs="two codes of a byte that differ",
        threads=("triton-lang/triton/pull/5197", "Comfy-Org/comfy-kitchen/pull/41"),
        forms=(
            *in_operands(lambda c, s: (swapped_nibbles(c), s), sides=EITHER_SIDE),
            *on_codes(swapped_nibbles),
        ),
    ),
    KernelFault(
        id="F1b",
        name="halves of a block for its nibbles",
        does="byte i of a block read as elements i and i + 8",
        needs="codes of a block that differ",
        threads=("kekzl/imp/pull/567",),
        forms=(
            *in_operands(lambda c, s: (_split_halves(c), s), sides=ONE_SIDE),
            *on_codes(_split_halves),
        ),
    ),
    KernelFault(
        id="F1c",
        name="a square matrix transposed",
        does="codes of a matrix with as many rows as columns read transposed, scales left",
        needs="a square matrix",
        threads=(
            "unslothai/unsloth-zoo/pull/1114",
            "NVIDIA-NeMo/Megatron-Bridge/pull/3743",
            "NVIDIA-NeMo/Megatron-Bridge/pull/3753",
        ),
        forms=in_operands(_transposed_if_square, sides=ONE_SIDE),
    ),
    KernelFault(
        id="F2a",
        name="ties away from zero",
        does="0.25, 1.25, 2.5 and 5 rounded up instead of to the even code",
        needs="exact ties, and a kernel that declares IEEE divisions; random values have none",
        threads=("ROCm/aiter/pull/3992", "ROCm/aiter/issues/2247"),
        forms=in_quantiser(partial(_requantised, _ties_away))[:1],
    ),
    KernelFault(
        id="F2b",
        name="rounded to BF16 first",
        does="scaled elements rounded to bfloat16, then to E2M1: 2.500004 gives 2",
        needs="float32 values next to a midpoint",
        threads=(
            "vllm-project/compressed-tensors/pull/824",
            "vllm-project/compressed-tensors/pull/822",
            "vllm-project/compressed-tensors/pull/774",
            "vllm-project/compressed-tensors/pull/781",
        ),
        forms=in_quantiser(partial(_requantised, _through_bfloat16)),
    ),
    KernelFault(
        id="F2c",
        name="elements truncated",
        does="elements rounded toward zero",
        needs="any values",
        threads=("tile-ai/tilelang/pull/1580",),
        forms=in_quantiser(partial(_requantised, _truncated)),
    ),
    KernelFault(
        id="F2d",
        name="NaN and infinity to code 0",
        does="elements that are not finite become zero",
        needs="NaN or infinity in the input",
        threads=(
            "vllm-project/compressed-tensors/pull/824",
            "vllm-project/compressed-tensors/pull/822",
            "vllm-project/compressed-tensors/pull/774",
        ),
        forms=in_quantiser(_nonfinite_to_zero)[:1],
    ),
    KernelFault(
        id="F2e",
        name="no subnormal branch of E2M1",
        does="codes 0, 1, 8, 9 decoded as 0.5, 0.75, -0.5, -0.75",
        needs="codes 0 or 1",
        threads=("tile-ai/tilelang/issues/2704",),
        forms=in_decoding(_without_subnormal),
    ),
    KernelFault(
        id="F2f",
        name="every code zero",
        does="a rounding function that returns zero on this device",
        needs="a value that is not zero",
        threads=("NVIDIA/TransformerEngine/pull/3281",),
        forms=on_codes(torch.zeros_like),
    ),
)
