"""F1, F2 and F3 as stored bytes: codes in the wrong order or rounded wrongly, scales misspelt."""

import torch

from nvfp4check.checkpoint.faults.base import Planting, fault
from nvfp4check.checkpoint.naming import Part
from nvfp4ref import packing
from nvfp4ref.formats import BLOCK_SIZE

_MAGNITUDE = 7
_TOP_SCALE = 0x7E


@fault(
    "F1a",
    "nibbles-swapped",
    does="Element 2i lies in the high nibble of byte i, element 2i + 1 in the low one.",
    threads=(
        "triton-lang/triton/pull/5197",
        "sgl-project/sglang/pull/23625",
        "Comfy-Org/comfy-kitchen/pull/41",
    ),
    found_with_base=("NV703",),
    also=("NV705",),
)
def _nibbles_swapped(p: Planting) -> None:
    weight = p.nvfp4()
    pairs = p.codes(weight).view(weight.shape[0], -1, 2)
    p.set_codes(weight, pairs.flip(2).flatten(1), "the two codes of each byte change places")


@fault(
    "F1b",
    "block-split-in-halves",
    does="Byte i of a block holds its elements i and i + 8, as GGML packs, not 2i and 2i + 1.",
    threads=("kekzl/imp/pull/567",),
    found_with_base=("NV703",),
    also=("NV701", "NV705"),
)
def _split_half(p: Planting) -> None:
    weight = p.nvfp4()
    halves = p.codes(weight).view(weight.shape[0], -1, 2, BLOCK_SIZE // 2)
    p.set_codes(
        weight, halves.transpose(2, 3).flatten(1), "byte i of a block holds elements i and i + 8"
    )


@fault(
    "F1c",
    "codes-transposed",
    does="The codes are those of the transposed weight; the scales are not.",
    threads=(
        "unslothai/unsloth-zoo/pull/1114",
        "NVIDIA-NeMo/Megatron-Bridge/pull/3743",
    ),
    found_by=("NV103",),
    also=("NV108",),
)
def _transposed(p: Planting) -> None:
    weight = p.nvfp4(
        lambda w: w.shape[0] % BLOCK_SIZE == 0 and w.shape[0] != w.shape[1],
        "NVFP4 weight that is not square and has 16n rows",
    )
    entry = weight.parts[Part.CODES]
    codes = packing.pack(p.codes(weight).T.contiguous())
    p.editor.replace(entry.name, codes.numpy().tobytes(), shape=tuple(codes.shape))
    p.note(entry, f"codes of the transposed weight: {[*entry.shape]} becomes {[*codes.shape]}")


@fault(
    "F2c",
    "codes-truncated",
    does="Elements are rounded toward zero, so codes that rounding raises are one step too small. "
    "Which ones those are is not in the file: the seed draws half of all.",
    threads=("tile-ai/tilelang/pull/1580",),
    found_by=("NV401",),
    found_with_base=("NV701",),
)
def _truncated(p: Planting) -> None:
    weight = p.nvfp4()
    codes = p.codes(weight)
    drawn = torch.from_numpy(p.rng.integers(0, 2, tuple(codes.shape), dtype="uint8"))
    lowered = codes - drawn * ((codes & _MAGNITUDE) > 0)
    p.set_codes(weight, lowered, "half of the codes, drawn by the seed, are a step nearer to zero")


@fault(
    "F2f",
    "codes-all-zero",
    does="The quantiser returned zeros: every code of a weight is 0.",
    threads=("NVIDIA/TransformerEngine/pull/3281",),
    found_by=("NV402",),
    found_with_base=("NV701",),
    also=("NV203", "NV303", "NV401", "NV705"),
)
def _all_zero(p: Planting) -> None:
    weight = p.nvfp4()
    p.set_codes(weight, torch.zeros_like(p.codes(weight)), "every code is 0")


@fault(
    "F3d",
    "scale-bytes-as-numbers",
    does="The bytes of block scales were copied as numbers: 0x38, which is 1.0, is stored as 56.0.",
    threads=("vllm-project/vllm/pull/51946", "vllm-project/vllm/issues/43416"),
    found_by=("NV104",),
    also=("NV107", "NV108"),
)
def _scales_as_numbers(p: Planting) -> None:
    weight = p.nvfp4()
    entry = weight.parts[Part.BLOCK_SCALES]
    numbers = p.scales(weight).to(torch.bfloat16)  # whole numbers up to 255 are exact
    p.editor.replace(entry.name, numbers.view(torch.uint8).numpy().tobytes(), dtype="BF16")
    p.note(entry, "scale bytes stored as BF16 numbers: 0x38 as 56.0", count=numbers.numel())


@fault(
    "F3e",
    "scales-in-e4m3fnuz",
    does="Block scales are spelt as E4M3FNUZ: the bytes read at twice the value as E4M3FN, and its "
    "largest value 240 is the byte of NaN.",
    threads=("kekzl/imp/pull/94",),
    found_by=("NV201",),
    found_with_base=("NV701",),
    also=("NV303",),
)
def _other_fp8(p: Planting) -> None:
    weight = p.nvfp4(
        lambda w: bool((p.scales(w) == _TOP_SCALE).any()), "NVFP4 weight with a block scale of 448"
    )
    scales = p.scales(weight).int()
    # Bias 8 instead of 7: a value's byte is 8 higher, and 0x7F is 240, where the format ends.
    other = torch.where(scales == 0, 0, (scales + 8).clamp(max=0x7F))
    p.set_scales(weight, other, "block scales are spelt as E4M3FNUZ")


FAULTS = (
    _nibbles_swapped,
    _split_half,
    _transposed,
    _truncated,
    _all_zero,
    _scales_as_numbers,
    _other_fp8,
)
