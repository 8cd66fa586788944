"""F4, F5 and F6 as stored bytes: block scales out of range, of other codes, of other blocks.

A weight is decoded to units of its global scale, in which every value is exact, and encoded again
as the fault would have it.
"""

import torch

from nvfp4check.checkpoint.faults.base import Planting, fault, is_expert, leaf
from nvfp4check.checkpoint.naming import LogicalWeight, Part
from nvfp4ref import e2m1, e4m3
from nvfp4ref.formats import BLOCK_SIZE

_NAN = 0x7F
_TOP_SCALE = 0x7E
_SATURATED = 7
#: The largest value of E4M3 with a reserved top exponent (FNUZ, IEEE), and its E4M3FN byte.
_OTHER_TOP_SCALE = 0x77


def _encode(scales: torch.Tensor, overflow: e4m3.Overflow = e4m3.Overflow.SATURATE) -> torch.Tensor:
    return e4m3.encode(scales, overflow).view(torch.uint8)


def _recode(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Encode values [N, K] under block scales [N, C], both in units of the global scale."""
    spread = e4m3.decode(scales).repeat_interleave(BLOCK_SIZE, 1)
    return e2m1.encode(torch.where(spread == 0, 0.0, values / spread))


def _has_top_scale(p: Planting) -> LogicalWeight:
    return p.nvfp4(
        lambda w: bool((p.scales(w) == _TOP_SCALE).any()), "NVFP4 weight with a block scale of 448"
    )


def _a_block(p: Planting, weight: LogicalWeight) -> tuple[int, int]:
    """Choose a live block that is not the one of the largest scale."""
    scales = p.scales(weight)
    places = ((scales > 0) & (scales < scales.max())).nonzero()
    row, column = places[int(p.rng.integers(len(places)))].tolist()
    return row, column


@fault(
    "F4a",
    "scale-overflows-to-nan",
    does="The global scale is 1.2 times too small and the cast to E4M3 does not saturate: block "
    "scales above 464 become NaN.",
    threads=(
        "NVIDIA/Model-Optimizer/issues/1633",
        "vllm-project/vllm-omni/pull/4025",
        "pytorch/pytorch/pull/178817",
    ),
    found_by=("NV201",),
    found_with_base=("NV701",),
    also=("NV501", "NV503", "NV204", "NV205"),
)
def _overflow(p: Planting) -> None:
    weight, factor = _has_top_scale(p), 1.2
    scales = e4m3.decode(p.scales(weight)) * factor
    p.set_scales(
        weight, _encode(scales, e4m3.Overflow.NAN), "block scales times 1.2, NaN above 464"
    )
    p.scale_global(weight, 1 / factor, "global scale divided by 1.2")


@fault(
    "F4b",
    "scale-clipped",
    does="The global scale is 3 times too small and the cast saturates: large blocks are clipped.",
    threads=("pytorch/pytorch/pull/178817", "pytorch/ao/issues/1912"),
    found_by=("NV204",),
    found_with_base=("NV701",),
    also=("NV401", "NV403", "NV501", "NV503"),
)
def _clip(p: Planting) -> None:
    weight, factor = _has_top_scale(p), 3.0
    values = p.in_scales(weight) * factor
    scales = _encode(e4m3.decode(p.scales(weight)) * factor)
    p.set_scales(weight, scales, "block scales times 3, at most 448")
    p.set_codes(weight, _recode(values, scales), "codes of clipped blocks saturate")
    p.scale_global(weight, 1 / factor, "global scale divided by 3")


@fault(
    "F4c",
    "scale-clamped-at-240",
    does="Block scales are clamped at 240, the largest value of another E4M3, and the codes "
    "saturate.",
    threads=("kekzl/imp/pull/94",),
    found_by=("NV205",),
    found_with_base=("NV701",),
    also=("NV401",),
)
def _clamp(p: Planting) -> None:
    weight = p.nvfp4(
        lambda w: leaf(w) in ("down_proj", "o_proj") and bool((p.scales(w) == _TOP_SCALE).any()),
        "down_proj or o_proj in NVFP4 with a block scale of 448",
    )
    values = p.in_scales(weight)
    scales = p.scales(weight).clamp(max=_OTHER_TOP_SCALE)
    p.set_scales(weight, scales, "block scales above 240 become 240")
    if not torch.equal(_recode(values, scales), p.codes(weight)):
        p.set_codes(weight, _recode(values, scales), "codes of clamped blocks saturate")


@fault(
    "F4d",
    "dead-block",
    does="A block scale below 2**-10 rounded to 0 while its codes are all +-6: the block decodes "
    "to 0.",
    threads=("NVIDIA/Model-Optimizer/pull/1382",),
    found_by=("NV209",),
    found_with_base=("NV701",),
)
def _dead_block(p: Planting) -> None:
    weight = p.nvfp4()
    row, column = _a_block(p, weight)
    scales, codes = p.scales(weight).clone(), p.codes(weight)
    scales[row, column] = 0
    codes[row, column * BLOCK_SIZE : (column + 1) * BLOCK_SIZE] |= _SATURATED
    p.set_scales(weight, scales, f"block scale [{row}, {column}] becomes 0")
    p.set_codes(weight, codes, f"codes of block [{row}, {column}] become +-6")


@fault(
    "F4e",
    "zero-block-nan",
    does="An all-zero block was given scale 1.0 before the division by the global scale, and "
    "overflowed to NaN.",
    threads=("NVIDIA/Model-Optimizer/pull/1397",),
    found_by=("NV201",),
    also=("NV701",),
)
def _zero_block_nan(p: Planting) -> None:
    weight = p.nvfp4()
    row, column = _a_block(p, weight)
    scales, codes = p.scales(weight).clone(), p.codes(weight)
    scales[row, column] = _NAN
    codes[row, column * BLOCK_SIZE : (column + 1) * BLOCK_SIZE] = 0
    p.set_scales(weight, scales, f"block scale [{row}, {column}] becomes NaN")
    p.set_codes(weight, codes, f"codes of block [{row}, {column}] become 0")


@fault(
    "F4f",
    "global-scale-folded-in",
    does="The global scale was multiplied into the block scales and is stored as 1: many block "
    "scales turn subnormal.",
    threads=("mlx-node/mlx-node/pull/120",),
    found_by=("NV205",),
    found_with_base=("NV701",),
    also=("NV203", "NV302", "NV501", "NV503"),
)
def _folded(p: Planting) -> None:
    weight = p.nvfp4(lambda w: leaf(w) in ("down_proj", "o_proj"), "down_proj or o_proj in NVFP4")
    stored = p.scalar(weight, Part.GLOBAL_SCALE)
    decode_scale = 1 / stored if weight.global_scale_is_reciprocal else stored
    scales = _encode(e4m3.decode(p.scales(weight)) * decode_scale)
    p.set_scales(weight, scales, "block scales times the global scale")
    p.set_scalar(weight, Part.GLOBAL_SCALE, 1.0, "global scale")


@fault(
    "F4g",
    "global-scale-without-6",
    does="The global scale is amax/448, not amax/2688: block scales use a sixth of their range.",
    threads=("pytorch/ao/pull/2604",),
    found_by=("NV205",),
    also=("NV501", "NV503", "NV701", "NV702", "NV705"),
)
def _without_six(p: Planting) -> None:
    weight, six = p.nvfp4(lambda w: leaf(w) in ("down_proj", "o_proj")), 6.0
    p.set_scales(weight, _encode(e4m3.decode(p.scales(weight)) / six), "block scales divided by 6")
    p.scale_global(weight, six, "global scale times 6")


@fault(
    "F5b",
    "scales-raised-to-powers-of-two",
    does="Block scales were rounded up to powers of two after the codes were made.",
    threads=("huggingface/transformers/issues/47030", "sgl-project/sglang/pull/26766"),
    found_by=("NV208",),
    found_with_base=("NV701",),
    also=("NV205",),
)
def _ceil(p: Planting) -> None:
    weight = p.nvfp4(lambda w: leaf(w) in ("down_proj", "o_proj"), "down_proj or o_proj in NVFP4")
    scales = p.scales(weight)
    raised = torch.where(scales == 0, 0, (scales.int() + 7) // 8 * 8).clamp(max=0x78)
    p.set_scales(weight, raised, "block scales rounded up to powers of two, at most 256")


@fault(
    "F5c",
    "scales-cut-to-powers-of-two",
    does="The mantissa of block scales was cut off after the codes were made.",
    threads=("sgl-project/sglang/issues/39193",),
    found_by=("NV208",),
    found_with_base=("NV701",),
    also=("NV203", "NV205"),
)
def _floor(p: Planting) -> None:
    weight = p.nvfp4(lambda w: leaf(w) in ("down_proj", "o_proj"), "down_proj or o_proj in NVFP4")
    p.set_scales(weight, p.scales(weight) & 0x78, "block scales rounded down to powers of two")


@fault(
    "F5d",
    "scale-exponent-twice",
    does="The exponent offset of -2 was applied twice: block scales are a quarter of what they "
    "should be.",
    threads=(
        "vllm-project/compressed-tensors/pull/538",
        "vllm-project/vllm/pull/35979",
    ),
    found_by=("NV205",),
    found_with_base=("NV701",),
)
def _quarter(p: Planting) -> None:
    weight = p.nvfp4(lambda w: leaf(w) in ("down_proj", "o_proj"), "down_proj or o_proj in NVFP4")
    scales = _encode(e4m3.decode(p.scales(weight)) / 4)
    p.set_scales(weight, scales, "block scales divided by 4")


@fault(
    "F6b",
    "scales-of-the-next-block",
    does="Each block has the scale of its left neighbour.",
    threads=("ml-explore/mlx/issues/3557",),
    found_with_base=("NV701",),
    also=("NV203",),
)
def _neighbour(p: Planting) -> None:
    weight = p.nvfp4()
    p.set_scales(weight, p.scales(weight).roll(1, 1), "block scales moved one block to the right")


@fault(
    "F6d",
    "blocks-of-32",
    does="One largest magnitude was taken over two adjacent blocks.",
    threads=("ml-explore/mlx/issues/3557", "ml-explore/mlx/pull/3934"),
    found_by=("NV207",),
    found_with_base=("NV701",),
    also=("NV401", "NV702"),
)
def _pairs(p: Planting) -> None:
    weight = p.nvfp4(lambda w: w.shape[1] % (2 * BLOCK_SIZE) == 0)
    values = p.in_scales(weight)
    scales = p.scales(weight).view(weight.shape[0], -1, 2).amax(2).repeat_interleave(2, 1)
    p.set_scales(weight, scales, "two adjacent blocks share the larger scale")
    p.set_codes(weight, _recode(values, scales), "codes encoded under it")


@fault(
    "F6f",
    "scales-of-another-expert",
    does="Two experts hold one another's block scales.",
    threads=("vllm-project/vllm/pull/35497",),
    found_with_base=("NV701",),
    also=("NV203",),
)
def _other_expert(p: Planting) -> None:
    weight = p.nvfp4(is_expert, "expert in NVFP4")
    other = another_expert(p, weight)
    mine, theirs = p.scales(weight).clone(), p.scales(other).clone()
    p.set_scales(weight, theirs, f"block scales of {other.module}")
    p.set_scales(other, mine, f"block scales of {weight.module}")


def another_expert(p: Planting, weight: LogicalWeight) -> LogicalWeight:
    """Choose the same projection of another expert of the layer."""
    layer, _, rest = weight.name.partition(".experts.")
    projection = rest.partition(".")[2]
    others = [
        w
        for w in p.checkpoint.weights.values()
        if w.name != weight.name
        and w.name.startswith(f"{layer}.experts.")
        and w.name.endswith(f".{projection}")
        and w.parts.keys() == weight.parts.keys()
        and w.shape == weight.shape
    ]
    return p.one_of(others, f"second expert beside {weight.module}")


FAULTS = (
    _overflow,
    _clip,
    _clamp,
    _dead_block,
    _zero_block_nan,
    _folded,
    _without_six,
    _ceil,
    _floor,
    _quarter,
    _neighbour,
    _pairs,
    _other_expert,
)
