"""Codes and block scales compared with what a convention allows for values known to an interval.

M rows, K columns, C = K/16.

Contract:
    exact     the values are known and the convention's arithmetic is IEEE: bits
    interval  each value is known to lie in [low, high], and the kernel's scaling to a relative
              error. A block scale must be one the convention gives for some amax in the interval;
              a code one that rounding gives for some value in it under the *stored* scale. Only
              where the interval straddles a boundary is there a choice, and those are counted
    NaN       where the stored block scale is NaN the codes decode to NaN whatever they are: free
    zero      under a stored scale of zero the codes are the convention's, or free where another
              scale was possible, or where the value, or its block, may have been flushed to zero

So an error in the last bit moves a code only next to a midpoint, and by one step.
"""

from dataclasses import dataclass

import torch

from nvfp4check import compare
from nvfp4check.compare import Comparison
from nvfp4check.properties.law import Case, Failure, Runner, failed
from nvfp4check.tolerance import Reciprocal
from nvfp4ref import e2m1, e4m3, nvfp4, packing, ties
from nvfp4ref.conventions import RULES, Convention, ElementScaling
from nvfp4ref.formats import BLOCK_SIZE, E2M1

#: Conventions that multiply by reciprocals where others divide: hardware takes an approximate one.
_BY_RECIPROCAL = (
    ElementScaling.MULTIPLY_BY_RECIPROCAL,
    ElementScaling.MULTIPLY_BY_CAPPED_RECIPROCAL,
)

#: Conventions that stand for a program in Python, whose divisions are IEEE.
_IN_PYTHON = (Convention.VLLM_REFERENCE, Convention.TRANSFORMER_ENGINE)


@dataclass(frozen=True, slots=True)
class Slack:
    """Relative errors of a kernel's scaling beside the convention's own."""

    scale: float = 0.0
    element: float = 0.0


#: Half a unit of the last place of float32: one rounding.
_ROUNDING = 2.0**-24

#: Roundings between the exact quotient and a convention's: two scales, their product, its use.
_CONVENTION_ROUNDINGS = 4


def slack_of(runner: Runner) -> Slack:
    """Return what the kernel's declared reciprocal may add to the convention's own arithmetic."""
    convention = Convention(runner.setting.convention or "")
    declared = runner.setting.facts.reciprocal
    by_reciprocal = RULES[convention].element_scaling in _BY_RECIPROCAL
    approximate = declared is Reciprocal.APPROXIMATE or (
        declared is Reciprocal.ANY and by_reciprocal and convention not in _IN_PYTHON
    )
    if not approximate:
        return Slack()
    error = runner.setting.facts.function_error
    own = _CONVENTION_ROUNDINGS * _ROUNDING
    # Two reciprocals reach an element, of the global scale and of its product with the block
    # scale; the sixth is one more for the block scale.
    return Slack(scale=2 * error + own, element=2 * error + own)


def check_values(
    runner: Runner,
    case: Case,
    actual: tuple[torch.Tensor, ...],
    expected: tuple[torch.Tensor, ...],
    values: torch.Tensor,
    error: torch.Tensor | None = None,
    note: str = "",
) -> Failure | None:
    """Compare codes and scales with the reference's, for values that a kernel knows to an error.

    Args:
        runner: The kernel and its setting.
        case: The case, whose inputs name the global scale.
        actual: The kernel's codes and block scales.
        expected: The reference's, of the values themselves.
        values: What is quantised, [M, K].
        error: How far the kernel's values may lie from them, in float64; None is not at all.
        note: Stands above the comparison.
    """
    slack = slack_of(runner)
    if error is None and slack == Slack():
        comparisons = _exact(actual, expected)
    else:
        wide = values.double()
        spread = torch.zeros_like(wide) if error is None else error
        comparisons = _interval(runner, case, actual, expected, wide, spread, slack)
    for comparison in comparisons:
        if not comparison.holds:
            causes = "" if comparison.form else _causes(runner, case, actual, expected, values)
            said = "\n".join(part for part in (note, causes) if part)
            return failed(case, comparison, actual, expected, said)
    return None


def _causes(
    runner: Runner,
    case: Case,
    actual: tuple[torch.Tensor, ...],
    expected: tuple[torch.Tensor, ...],
    values: torch.Tensor,
) -> str:
    """Return how many differences are ties, near ties and neither: only the last are errors."""
    convention = Convention(runner.setting.convention or "")
    global_scale = case.inputs["global_decode_scale"]
    if tuple(actual[1].shape) != tuple(expected[1].shape) or not values.numel():
        return ""
    finite = values.double().nan_to_num(0.0, 0.0, 0.0)
    amax = finite.abs().view(*expected[1].shape, BLOCK_SIZE).amax(-1)
    ulps = runner.setting.facts.function_ulps
    causes = ties.explain_block_scales(
        actual[1],
        expected[1],
        amax,
        global_scale,
        ties.scale_error(convention, values.dtype, reciprocal_ulps=ulps),
    ).flatten()
    what = "block scales"
    if not int((causes > ties.Cause.SAME_VALUE).sum()):
        what = "codes"
        causes = ties.explain_codes(
            packing.unpack(actual[0]),
            packing.unpack(expected[0]),
            finite,
            expected[1],
            global_scale,
            ties.element_error(convention, reciprocal_ulps=ulps),
        ).flatten()
    named = {
        ties.Cause.SAME_VALUE: "of the same value",
        ties.Cause.EXACT_TIE: "at exact ties",
        ties.Cause.NEAR_TIE: "at near ties, inside the error of a reciprocal",
        ties.Cause.REAL: "real",
    }
    counts = [f"{int((causes == c).sum())} {name}" for c, name in named.items()]
    return f"{what} that differ: {', '.join(counts)}"


def _exact(
    actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]
) -> list[Comparison]:
    scales = compare.bits(actual[1], expected[1], what="block scales")
    if not scales.holds:
        return [scales]
    codes = compare.bits(actual[0], expected[0], what="packed codes")
    if codes.holds or codes.form:
        return [scales, codes]
    free = nan_scales(expected[1])
    found = torch.where(free, 0, packing.unpack(actual[0]))
    wanted = torch.where(free, 0, packing.unpack(expected[0]))
    return [scales, compare.bits(found, wanted, what="codes")]


def nan_scales(block_scales: torch.Tensor) -> torch.Tensor:
    """Return for each element [M, K] whether its block scale is NaN."""
    return e4m3.decode(block_scales).isnan().repeat_interleave(BLOCK_SIZE, dim=-1)


def _interval(
    runner: Runner,
    case: Case,
    actual: tuple[torch.Tensor, ...],
    expected: tuple[torch.Tensor, ...],
    values: torch.Tensor,
    spread: torch.Tensor,
    slack: Slack,
) -> list[Comparison]:
    for place, what in enumerate(("packed codes", "block scales")):
        whole = compare.bits(actual[place], expected[place], what=what)
        if whole.form:
            return [whole]
    convention = Convention(runner.setting.convention or "")
    global_scale = case.inputs["global_decode_scale"]
    scales = _allowed_scales(
        actual[1], expected[1], values, spread, slack, global_scale, convention
    )
    if not scales.holds:
        return [scales]
    return [
        scales,
        _allowed_codes(actual, expected, values, spread, slack, float(global_scale)),
    ]


def _allowed_scales(
    actual: torch.Tensor,
    expected: torch.Tensor,
    values: torch.Tensor,
    spread: torch.Tensor,
    slack: Slack,
    global_scale: torch.Tensor,
    convention: Convention,
) -> Comparison:
    magnitudes = values.abs()
    low = _scales_of((magnitudes - spread).clamp(min=0), 1 - slack.scale, global_scale, convention)
    high = _scales_of(magnitudes + spread, 1 + slack.scale, global_scale, convention)
    found, wanted = e4m3.decode(actual), e4m3.decode(expected)
    inside = (e4m3.decode(low) <= found) & (found <= e4m3.decode(high))
    inside |= actual.view(torch.uint8) == expected.view(torch.uint8)
    # The scale of a block that may be all zero need not lie below those of other blocks.
    inside |= actual.view(torch.uint8) == low.view(torch.uint8)
    inside |= found.isnan() & wanted.isnan()
    taken = torch.where(inside, actual.view(torch.uint8), expected.view(torch.uint8))
    return _against(actual, taken.view(actual.dtype), "block scales", expected)


def _scales_of(
    magnitudes: torch.Tensor,
    factor: float,
    global_scale: torch.Tensor,
    convention: Convention,
) -> torch.Tensor:
    rows, columns = magnitudes.shape
    amax = magnitudes.reshape(rows, columns // BLOCK_SIZE, BLOCK_SIZE).amax(-1) * factor
    blocks = amax.float().repeat_interleave(BLOCK_SIZE, dim=-1)
    return nvfp4.quantize_block_scales(blocks, global_scale, convention)


def _allowed_codes(
    actual: tuple[torch.Tensor, ...],
    expected: tuple[torch.Tensor, ...],
    values: torch.Tensor,
    spread: torch.Tensor,
    slack: Slack,
    global_scale: float,
) -> Comparison:
    found, wanted = packing.unpack(actual[0]), packing.unpack(expected[0])
    stored = e4m3.decode(actual[1]).double().repeat_interleave(BLOCK_SIZE, dim=-1)
    other_scale = (actual[1].view(torch.uint8) != expected[1].view(torch.uint8)).repeat_interleave(
        BLOCK_SIZE, dim=-1
    )
    step = stored * global_scale
    own = _CONVENTION_ROUNDINGS * _ROUNDING
    relative = slack.element if slack.element else own
    margin = spread + relative * (values.abs() + spread)
    low = _order(_encode((values - margin) / step))
    high = _order(_encode((values + margin) / step))
    place = _order(found)
    inside = (low <= place) & (place <= high)
    negative = found >= E2M1.sign_bit
    right_sign = torch.where(negative, values - spread <= 0, values + spread >= 0)
    inside &= (right_sign | (place != 0)) & values.isfinite()
    inside |= found == wanted
    # A tiny value that is not zero may have been flushed, alone or with its whole block.
    may_flush = values.abs() <= spread
    in_blocks = (*actual[1].shape, BLOCK_SIZE)
    flushed = may_flush.view(in_blocks).all(-1) & (values != 0).view(in_blocks).any(-1)
    flushed = flushed.repeat_interleave(BLOCK_SIZE, dim=-1)
    undecided = other_scale | flushed | (may_flush & (values != 0))
    inside |= (stored == 0) & undecided
    inside |= stored.isnan()
    inside &= (stored != 0) | (found == wanted) | undecided
    return _against(found, torch.where(inside, found, wanted), "codes", wanted)


def _encode(quotients: torch.Tensor) -> torch.Tensor:
    return e2m1.encode(quotients.nan_to_num(0.0, torch.inf, -torch.inf))


def _order(codes: torch.Tensor) -> torch.Tensor:
    """Return codes as integers in the order of their values; both zeros are 0."""
    magnitudes = (codes & 7).to(torch.int16)
    return torch.where(codes >= E2M1.sign_bit, -magnitudes, magnitudes)


def _against(
    actual: torch.Tensor, taken: torch.Tensor, what: str, nominal: torch.Tensor
) -> Comparison:
    """Compare with what is allowed, and say how often a neighbour of the nominal one was taken."""
    comparison = compare.bits(actual, taken, what=what)
    straddling = int((actual.view(torch.uint8) != nominal.view(torch.uint8)).sum())
    straddling -= comparison.count
    if comparison.holds or not straddling:
        return comparison
    return Comparison(
        what=comparison.what,
        total=comparison.total,
        count=comparison.count,
        bitwise=comparison.bitwise,
        why=f"a neighbour where the interval straddles a boundary: {straddling} others do",
        first=comparison.first,
        worst=comparison.worst,
    )
