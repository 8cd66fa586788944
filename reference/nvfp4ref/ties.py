"""Why two correct quantisers disagree: ties, and the error of their roundings.

Contract:
    Between the exact quotient q and the one that a convention computes lie n float32 roundings, so
    the computed one is q (1 + e), |e| <= n u / (1 - n u), u = 2**-24. Two conventions can choose
    different codes only if a midpoint lies between their quotients, hence within that bound of q.
    A reciprocal that is good to r ulp (rcp.approx.ftz: 1) counts 2 r roundings.

    EQUAL       the same byte or code
    SAME_VALUE  0 and -0; two NaN
    EXACT_TIE   neighbours, and q is the midpoint between them exactly
    NEAR_TIE    neighbours, and q is within the bound of the midpoint between them
    REAL        anything else

    q is |x| / (S D) for a code and A / (6 D) for a block scale, letters as in
    `nvfp4ref.conventions`. Products are formed in float64 and are exact there (31 bits at most),
    as is the difference of two numbers so near; only the last division rounds, by 2**-53.
    The bound needs S D and 1 / (S D) to be normal float32; where they are not, a difference that
    their underflow explains counts as REAL.

The exact tie can be one of the global scale as stored, or of the unrounded amax / 2688: pass
`tensor_amax` to have the second told apart from a near one.
"""

from enum import IntEnum

import torch

from nvfp4ref import e2m1, e4m3
from nvfp4ref.conventions import RULES, Convention, ElementScaling, IdealScale
from nvfp4ref.formats import BLOCK_SIZE, E2M1, NVFP4

_UNIT_ROUNDOFF = 2.0**-24


class Cause(IntEnum):
    """Why two codes or two bytes differ."""

    EQUAL = 0
    SAME_VALUE = 1
    EXACT_TIE = 2
    NEAR_TIE = 3
    REAL = 4


#: Roundings from D to the ideal block scale, those of reciprocals (E among them) counted apart.
_SCALE_STEPS = {
    IdealScale.DIVIDE_BY_PRODUCT: (2, 0),  # 6 D, A /
    IdealScale.DIVIDE_TWICE: (2, 0),  # A / 6, / D
    IdealScale.MULTIPLY_QUOTIENT: (2, 1),  # A / 6, E *; E
    IdealScale.MULTIPLY_BY_PRODUCT: (2, 2),  # E *, A *; E, 1 / 6
    IdealScale.MULTIPLY_PRODUCT: (2, 2),  # A *, E *; E, 1 / 6
}

#: Roundings from D to the scaled element.
_ELEMENT_STEPS = {
    ElementScaling.DIVIDE_BY_PRODUCT: (2, 0),  # S D, x /
    ElementScaling.DIVIDE_BY_QUOTIENT: (2, 1),  # S / E, x /; E
    ElementScaling.MULTIPLY_BY_QUOTIENT: (2, 1),  # / S, x *; 1 / D
    ElementScaling.MULTIPLY_BY_RECIPROCAL: (2, 3),  # S *, x *; E, 1 / E, 1 / ()
    ElementScaling.MULTIPLY_BY_CAPPED_RECIPROCAL: (2, 3),
}


def scale_error(
    convention: Convention, dtype: torch.dtype = torch.float32, *, reciprocal_ulps: float = 0.5
) -> float:
    """Return the bound on the relative error of the block scale before E4M3.

    Args:
        convention: Whose arithmetic.
        dtype: Of the weight: compressed-tensors divides by 6 in it.
        reciprocal_ulps: How far a reciprocal may be off; half an ulp is IEEE 754's.
    """
    formula = RULES[convention].ideal_scale
    bound = _bound(*_SCALE_STEPS[formula], reciprocal_ulps)
    if formula is IdealScale.MULTIPLY_QUOTIENT:
        bound += torch.finfo(dtype).eps
    return bound


def element_error(convention: Convention, *, reciprocal_ulps: float = 0.5) -> float:
    """Return the bound on the relative error of an element before E2M1."""
    return _bound(*_ELEMENT_STEPS[RULES[convention].element_scaling], reciprocal_ulps)


def _bound(roundings: int, reciprocals: int, reciprocal_ulps: float) -> float:
    error = (roundings + 2 * reciprocal_ulps * reciprocals) * _UNIT_ROUNDOFF
    return error / (1 - error)


def explain_codes(
    actual: torch.Tensor,
    expected: torch.Tensor,
    x: torch.Tensor,
    block_scales: torch.Tensor,
    global_decode_scale: torch.Tensor,
    error: float,
    tensor_amax: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the `Cause` of each pair of codes [M, K], as uint8.

    Args:
        actual: Codes of one side, unpacked.
        expected: Codes of the other, under the same block scales.
        x: What both quantised.
        block_scales: float8_e4m3fn [M, C].
        global_decode_scale: As stored.
        error: The larger `element_error` of the two sides.
        tensor_amax: What the global scale was derived from.
    """
    midpoints = _midpoints(e2m1.MIDPOINTS, actual % 8, expected % 8)
    scales = e4m3.decode(block_scales).double().repeat_interleave(BLOCK_SIZE, -1)
    units = midpoints * scales
    decoded = e2m1.decode(actual), e2m1.decode(expected)
    return _explain(actual, expected, decoded, x, units, global_decode_scale, error, tensor_amax)


def explain_block_scales(
    actual: torch.Tensor,
    expected: torch.Tensor,
    block_amax: torch.Tensor,
    global_decode_scale: torch.Tensor,
    error: float,
    tensor_amax: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the `Cause` of each pair of block scales, float8_e4m3fn [M, C], as uint8.

    Args:
        actual: Block scales of one side.
        expected: Block scales of the other.
        block_amax: Largest magnitude of each block [M, C].
        global_decode_scale: As stored.
        error: The larger `scale_error` of the two sides.
        tensor_amax: What the global scale was derived from.
    """
    actual_bytes, expected_bytes = actual.view(torch.uint8), expected.view(torch.uint8)
    units = E2M1.max * _midpoints(e4m3.MIDPOINTS, actual_bytes % 128, expected_bytes % 128)
    decoded = e4m3.decode(actual), e4m3.decode(expected)
    return _explain(
        actual_bytes,
        expected_bytes,
        decoded,
        block_amax,
        units,
        global_decode_scale,
        error,
        tensor_amax,
    )


def _midpoints(
    table: tuple[float, ...], actual: torch.Tensor, expected: torch.Tensor
) -> torch.Tensor:
    """Return the midpoint between neighbouring magnitudes, NaN where they are not neighbours."""
    lower = torch.minimum(actual, expected).long()
    neighbours = (actual.long() - expected.long()).abs() == 1
    midpoints = torch.tensor(table, dtype=torch.float64, device=actual.device)
    return torch.where(neighbours, midpoints[lower.clamp(max=len(table) - 1)], torch.nan)


def _explain(
    actual: torch.Tensor,
    expected: torch.Tensor,
    decoded: tuple[torch.Tensor, torch.Tensor],
    numerator: torch.Tensor,
    units: torch.Tensor,
    global_decode_scale: torch.Tensor,
    error: float,
    tensor_amax: torch.Tensor | None,
) -> torch.Tensor:
    """Compare a numerator with the tie `units * D`."""
    magnitudes = numerator.double().abs()
    ties = units * global_decode_scale.double()
    same_sign = decoded[0].signbit() == decoded[1].signbit()
    near = (magnitudes - ties).abs() <= error * ties
    exact = magnitudes == ties
    if tensor_amax is not None:
        exact |= near & (magnitudes * NVFP4.full_scale == units * tensor_amax.double())
    same_value = (decoded[0] == decoded[1]) | (decoded[0].isnan() & decoded[1].isnan())
    causes = torch.full_like(actual, Cause.REAL)
    causes[same_sign & near] = Cause.NEAR_TIE
    causes[same_sign & exact] = Cause.EXACT_TIE
    causes[same_value] = Cause.SAME_VALUE
    causes[actual == expected] = Cause.EQUAL
    return causes
