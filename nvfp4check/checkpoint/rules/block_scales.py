"""NV201 to NV209: what the scale bytes of a weight's blocks give away."""

import math
from collections.abc import Iterator

from nvfp4check.checkpoint.naming import LogicalWeight, Part
from nvfp4check.checkpoint.rules.base import Problem, Rule, RuleContext, RuleLevel, rule
from nvfp4check.checkpoint.rules.siblings import (
    fused_groups,
    nvfp4_scans,
    scales_problem,
)
from nvfp4check.findings import Severity

_GITHUB = "https://github.com/"
_NAN_THREADS = (
    f"{_GITHUB}NVIDIA/Model-Optimizer/issues/1633",
    f"{_GITHUB}NVIDIA/Model-Optimizer/pull/1397",
    f"{_GITHUB}vllm-project/vllm-omni/pull/4025",
)
_DEAD_THREADS = (f"{_GITHUB}NVIDIA/Model-Optimizer/pull/1382",)

#: Byte of 448, the largest scale, and of 416, the one below.
_LARGEST, _SECOND = 0x7E, 0x7D
#: Probability under chance at which a rule fires. A checkpoint has some hundred thousand weights,
#: so all of them together raise a false alarm with less than one in a million.
_CHANCE = 1e-12
#: Of the blocks at 448 and 416, the largest share at 448 that the amax rule gives. 0x7E then
#: holds block maxima in (432/448, 1] of the tensor's, 0x7D those in (400/448, 432/448]. Among
#: weights whose density falls with magnitude the uniform one puts the most into the upper range:
#: with 16 elements 1 - (432/448)**16 against (432/448)**16 - (400/448)**16.
_TOP_SHARE = (1 - (432 / 448) ** 16) / (1 - (400 / 448) ** 16)
#: A power of two has mantissa 000, one scale of eight: 8**-16 is below _CHANCE.
_FEWEST_SCALES = 16
_POWERS_OF_TWO = frozenset((1, 2, 4, *range(0x08, _LARGEST + 1, 8)))


@rule(
    "NV201",
    "scale-nan",
    Severity.ERROR,
    fires_when="a block scale is byte 0x7F or 0xFF",
    why="E4M3 means NaN by these bytes. One of them makes every output of its row NaN, and a "
    "served model prints one token for ever. ModelOpt wrote them where a scale above 448 was cast "
    "unclamped, and writes them for all-zero weights (0/0).",
    repair="Export again with ModelOpt 0.45 or later, which clamps block scales to [2**-9, 448]. "
    "If the weight is all zero in the base model, leave its module unquantised. Do not patch the "
    "byte to 0x7E: the codes below it were made with another scale.",
    incidents=_NAN_THREADS,
    level=RuleLevel.BYTES,
)
def scale_nan(context: RuleContext) -> Iterator[Problem]:
    """Report NaN scales."""
    for weight, scan in nvfp4_scans(context):
        if scan.defects.nan.count:
            yield scales_problem(
                weight, scan, scan.defects.nan, "scale is NaN (byte 0x7F or 0xFF), expected finite"
            )


@rule(
    "NV202",
    "scale-negative",
    Severity.ERROR,
    fires_when="a block scale has the sign bit",
    why="A block scale is a magnitude: kernels that read it as unsigned E4M3 drop the bit, others "
    "negate the block. No quantiser writes it except one that was given a negative global scale, "
    "or bytes that are no scales.",
    repair="Quantise the weight again. If all scales are affected, the tensor may hold something "
    "else: compare its bytes with the exporter's output.",
    level=RuleLevel.BYTES,
)
def scale_negative(context: RuleContext) -> Iterator[Problem]:
    """Report scales with the sign bit."""
    for weight, scan in nvfp4_scans(context):
        if scan.defects.negative.count:
            yield scales_problem(
                weight,
                scan,
                scan.defects.negative,
                "scale has the sign bit, expected 0x00 to 0x7E",
            )


@rule(
    "NV203",
    "scale-lost",
    Severity.ERROR,
    fires_when="a block scale is 0x00 over codes that are neither all zero nor all +-6",
    why="The block decodes to zero although its codes hold weights: the scale was lost after the "
    "codes were made. Underflow in the quantiser looks otherwise, for x / 0 saturates every code "
    "(NV209).",
    repair="Write the scales again from the exporter's output; if they are zero there, quantise "
    "the weight again.",
    incidents=_DEAD_THREADS,
    level=RuleLevel.BYTES,
)
def scale_lost(context: RuleContext) -> Iterator[Problem]:
    """Report zero scales over ordinary codes."""
    for weight, scan in nvfp4_scans(context):
        if scan.defects.lost.count:
            yield scales_problem(
                weight, scan, scan.defects.lost, "scale 0x00 over codes that are not zero"
            )


@rule(
    "NV204",
    "scale-saturated",
    Severity.WARNING,
    fires_when="so many blocks are at the largest scale, 0x7E, that their amax must lie above it: "
    "the global scale is too small and codes are clipped",
    why="With global scale = amax/2688 only blocks within 4 % of the tensor's amax get 0x7E. More "
    "of them, against those at the next lower scale, than even uniformly distributed weights give "
    "means that larger blocks were clipped to 448. Legal for weights of one magnitude (binary, "
    "ternary). A clip of less than about half the amax of a Gaussian weight leaves no such trace.",
    repair="Compute the global scale from this weight's own amax (or its fusion group's) and "
    "quantise again. A stale amax, of one tensor-parallel rank or of another revision, is the "
    "usual cause.",
    incidents=(f"{_GITHUB}NVIDIA/Model-Optimizer/issues/1633",),
    level=RuleLevel.BYTES,
)
def scale_saturated(context: RuleContext) -> Iterator[Problem]:
    """Compare the blocks at the two largest scales."""
    for weight, scan in nvfp4_scans(context):
        top, second = scan.scale_count(_LARGEST), scan.scale_count(_SECOND)
        # The block of the amax itself is at the top whatever the distribution.
        if top < 2 or tail_bound(top - 1, top - 1 + second, _TOP_SHARE) >= _CHANCE:
            continue
        entry = weight.parts[Part.BLOCK_SCALES]
        yield Problem(
            f"{top:,} of {scan.blocks:,} blocks at the largest scale (0x7E) and {second:,} at the "
            "next (0x7D): the global scale is too small, and blocks are clipped",
            tensor=entry.name,
            shard=entry.shard,
            count=top,
            observed={"at_0x7e": top, "at_0x7d": second},
            expected=f"at most {_TOP_SHARE:.0%} of the two at 0x7E",
        )


def tail_bound(successes: int, trials: int, probability: float) -> float:
    """Bound the chance of so many successes or more from above (Chernoff), 1 below the mean."""
    if not trials or successes <= probability * trials:
        return 1.0
    share = successes / trials
    divergence = share * math.log(share / probability)
    if share < 1.0:
        divergence += (1 - share) * math.log((1 - share) / (1 - probability))
    return math.exp(-trials * divergence)


@rule(
    "NV205",
    "scale-underused",
    Severity.WARNING,
    fires_when="no block of the fusion group reaches 0x7E",
    why="With global scale = amax/2688 the block that holds the amax gets scale 448 exactly, in "
    "one member of a fused group at least. If none does, the global scale is not the amax's: "
    "taken over more than this group, divided by 448 alone (top byte near 0x69), clamped at 240 "
    "(top byte 0x77) or searched. Legal for scales searched by squared error; the dynamic range "
    "above the top byte is unused either way.",
    repair="If scales were searched (MSE, 4-over-6 with a smaller maximum), --ignore NV205. Else "
    "compute the global scale as amax/(6 * 448) over the fused group and quantise again.",
    incidents=(f"{_GITHUB}kekzl/imp/pull/94", f"{_GITHUB}pytorch/ao/pull/2604"),
    level=RuleLevel.BYTES,
)
def scale_underused(context: RuleContext) -> Iterator[Problem]:
    """Look for the largest scale in each fusion group."""
    for family in _families(context):
        scans = [context.scans[weight.name] for weight in family]
        live = [max(scan.live_scales) for scan in scans if scan.live_scales]
        if not live or any(scan.scale_count(_LARGEST) for scan in scans):
            continue
        top = max(byte for byte in live)
        if top > _LARGEST:
            continue  # NaN or signed: NV201, NV202
        entry = family[0].parts[Part.BLOCK_SCALES]
        names = "" if len(family) == 1 else f" in any of the {len(family)} fused members"
        yield Problem(
            f"no block reaches scale 0x7E{names}, the largest is 0x{top:02X}: the global scale is "
            "not amax/2688 (legal for searched scales)",
            tensor=entry.name,
            shard=entry.shard,
            observed=f"0x{top:02X}",
            expected="0x7E",
        )


def _families(context: RuleContext) -> list[tuple[LogicalWeight, ...]]:
    """Gather the scanned weights that share an amax: fused groups, and every other weight alone.

    A group that was scanned in part is left out: the top block may be in the part that was not.
    """
    scanned = [weight for weight, _ in nvfp4_scans(context)]
    groups = fused_groups(
        weight
        for weight in context.checkpoint.weights.values()
        if Part.BLOCK_SCALES in weight.parts
    )
    fused = {weight.name for group in groups for weight in group.members}
    families = [(weight,) for weight in scanned if weight.name not in fused]
    whole = (
        group.members
        for group in groups
        if all(weight.name in context.scans for weight in group.members)
    )
    return [*families, *whole]


@rule(
    "NV206",
    "scale-swizzled",
    Severity.WARNING,
    fires_when="the scale bytes look tiled (128x4), not row-major",
    why="Files hold block scales row-major, [N, K/16]; engines tile them when they load. Bytes "
    "that are tiled already get tiled twice, every block is decoded with another's scale, and no "
    "loader notices, for shape and size are right. Told from the rows and columns that explain "
    "more of the scales once taken out of the tiles; random weights cannot be told.",
    repair="Undo the tiling before saving (nvfp4ref.layout.unswizzle), or export without it.",
    incidents=(
        f"{_GITHUB}modular/modular/issues/6600",
        f"{_GITHUB}NVIDIA/Model-Optimizer/pull/2038",
        f"{_GITHUB}flashinfer-ai/flashinfer/issues/4087",
    ),
    level=RuleLevel.BYTES,
)
def scale_swizzled(context: RuleContext) -> Iterator[Problem]:
    """Report scales that make more sense as tiles."""
    for weight, scan in nvfp4_scans(context):
        tiling = scan.tiling
        if not tiling.is_tiled:
            continue
        entry = weight.parts[Part.BLOCK_SCALES]
        yield Problem(
            f"rows and columns explain {tiling.tiled_share or 0:.1%} of the scales' variation when "
            f"the bytes are read as 128x4 tiles, {tiling.linear_share or 0:.1%} as they lie "
            f"({tiling.score or 0:.0f} standard deviations): stored swizzled",
            tensor=entry.name,
            shard=entry.shard,
            observed=tiling.score,
        )


@rule(
    "NV207",
    "scale-pairs-equal",
    Severity.ERROR,
    fires_when="S[:, 0::2] equals S[:, 1::2] throughout, beyond what the scales' own likeness "
    "explains",
    why="Two neighbouring blocks of 16 always share one scale: the amax was taken over 32 "
    "elements, as for MXFP4, and every second block is quantised too coarsely.",
    repair="Quantise again with block size 16; look for a group_size of 32 in the recipe, or a "
    "kernel that takes the maximum over a pair of lanes too many.",
    incidents=(f"{_GITHUB}ml-explore/mlx/issues/3557", f"{_GITHUB}ml-explore/mlx/pull/3934"),
    level=RuleLevel.BYTES,
)
def scale_pairs_equal(context: RuleContext) -> Iterator[Problem]:
    """Compare neighbours within pairs with neighbours across pairs."""
    for weight, scan in nvfp4_scans(context):
        pairs = scan.pairs
        if not pairs.all_equal:
            continue
        # How likely neighbours are equal anyhow, from those that no block of 32 joins.
        anyhow = (pairs.odd_equal + 1) / (pairs.odd + 2)
        if pairs.even * math.log(anyhow) >= math.log(_CHANCE):
            continue
        entry = weight.parts[Part.BLOCK_SCALES]
        yield Problem(
            f"all {pairs.even:,} pairs of scales at columns 2j and 2j+1 are equal, of those at "
            f"2j+1 and 2j+2 only {pairs.odd_equal:,} of {pairs.odd:,}: the true block size is 32",
            tensor=entry.name,
            shard=entry.shard,
            count=pairs.even,
            observed=32,
            expected=16,
        )


@rule(
    "NV208",
    "scale-power-of-two",
    Severity.WARNING,
    fires_when="every scale of a live block is a power of two",
    why="One E4M3 scale of eight is a power of two. If all are, scales were made for E8M0 (MXFP4, "
    "or UE8M0 kernels) and stored as E4M3. If only the scales were rounded and not the codes, "
    "values are off by up to 2; if both, the format's three mantissa bits are given away.",
    repair="Quantise again with E4M3 scales. A checkpoint that was converted from MXFP4 loses "
    "nothing by this: then --ignore NV208.",
    incidents=(
        f"{_GITHUB}huggingface/transformers/issues/47030",
        f"{_GITHUB}vllm-project/vllm/pull/58157",
    ),
    level=RuleLevel.BYTES,
)
def scale_power_of_two(context: RuleContext) -> Iterator[Problem]:
    """Look at the mantissas of the scales in use."""
    for weight, scan in nvfp4_scans(context):
        count = sum(scan.scale_count(byte) for byte in scan.live_scales)
        if count < _FEWEST_SCALES or not _POWERS_OF_TWO.issuperset(scan.live_scales):
            continue
        entry = weight.parts[Part.BLOCK_SCALES]
        yield Problem(
            f"all scales of the {count:,} live blocks are powers of two: E8M0 scales in E4M3",
            tensor=entry.name,
            shard=entry.shard,
            count=count,
        )


@rule(
    "NV209",
    "block-underflowed",
    Severity.WARNING,
    fires_when="a block scale is 0x00 over codes that are all +-6",
    why="ModelOpt before 0.45 writes such blocks where the block's amax is at most 2**-18.8 of the "
    "tensor's: the scale rounds to zero, x / 0 saturates. They decode to 0, which is nearly "
    "right; the codes are noise, and a loader that clamps scales from below turns it loud.",
    repair="Export again with ModelOpt 0.45 or later, which clamps scales to 2**-9 from below; or "
    "set the codes of these blocks to 0.",
    incidents=_DEAD_THREADS,
    level=RuleLevel.BYTES,
)
def block_underflowed(context: RuleContext) -> Iterator[Problem]:
    """Report zero scales over saturated codes."""
    for weight, scan in nvfp4_scans(context):
        if scan.defects.underflowed.count:
            yield scales_problem(
                weight,
                scan,
                scan.defects.underflowed,
                "scale 0x00 over codes that are all +-6: the block underflowed and decodes to 0",
            )


RULES: tuple[Rule, ...] = (
    scale_nan,
    scale_negative,
    scale_lost,
    scale_saturated,
    scale_underused,
    scale_swizzled,
    scale_pairs_equal,
    scale_power_of_two,
    block_underflowed,
)
