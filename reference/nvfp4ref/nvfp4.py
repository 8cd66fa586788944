"""NVFP4: whole tensors to codes and block scales and back, under a named convention.

M rows, K columns, C = K/16 blocks in a row.

Contract:
    quantize    block scales and codes as `nvfp4ref.conventions` says, every step one IEEE float32
                operation rounded to nearest even; float32, bfloat16 and float16 in
    dequantize  value = code * (block scale * global decode scale); both products rounded to
                float32, the outer one then to `dtype`, nearest even; code 8 gives -0.0
    NaN         a block scale NaN makes its 16 values NaN

The global scale is given, not computed: engines and checkpoints have it stored. Where a producer
stores its reciprocal, `global_encode_scale` takes that, for the reciprocal of a rounded reciprocal
need not be the number one began with.
"""

import torch

from nvfp4ref import e2m1, e4m3, packing
from nvfp4ref.conventions import (
    RULES,
    Convention,
    ElementScaling,
    GlobalScale,
    IdealScale,
    NaNElements,
    NegativeZero,
    ReciprocalOfZero,
    ZeroScale,
)
from nvfp4ref.formats import BLOCK_SIZE, E2M1, E4M3, NVFP4

_FLOAT32_MAX = torch.finfo(torch.float32).max
_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def global_decode_scale(tensor_amax: torch.Tensor, convention: Convention) -> torch.Tensor:
    """Return the float32 global decode scale that a convention derives from a tensor's amax.

    The dtype of `tensor_amax` is that of the weight: compressed-tensors divides in it.
    """
    return _global_decode_scale(tensor_amax, RULES[convention].global_scale)


def global_encode_scale(tensor_amax: torch.Tensor, convention: Convention) -> torch.Tensor:
    """Return the float32 global encode scale that a convention derives from a tensor's amax."""
    formula = RULES[convention].global_scale
    if formula in (GlobalScale.ENCODE, GlobalScale.ENCODE_IN_WEIGHT_DTYPE):
        return _global_encode_scale(tensor_amax, formula)
    return _global_decode_scale(tensor_amax, formula).reciprocal()


def legal_global_decode_scales(
    tensor_amax: torch.Tensor, convention: Convention
) -> tuple[torch.Tensor, ...]:
    """Return every global decode scale that released versions of the producer give, usual first."""
    rules = RULES[convention]
    formulas = (rules.global_scale, *rules.other_global_scales)
    return tuple(_global_decode_scale(tensor_amax, formula) for formula in formulas)


def _global_decode_scale(tensor_amax: torch.Tensor, formula: GlobalScale) -> torch.Tensor:
    amax = tensor_amax.float()
    full_scale, six, largest_scale = _constants(amax.device)
    match formula:
        case GlobalScale.DIVIDE:
            return amax / full_scale
        case GlobalScale.DIVIDE_TWICE:
            return amax / six / largest_scale
        case GlobalScale.MULTIPLY:
            return amax * full_scale.reciprocal()
        case GlobalScale.MULTIPLY_TWICE:
            return amax * six.reciprocal() * largest_scale.reciprocal()
        case GlobalScale.ENCODE | GlobalScale.ENCODE_IN_WEIGHT_DTYPE:
            return _global_encode_scale(tensor_amax, formula).reciprocal()


def _global_encode_scale(tensor_amax: torch.Tensor, formula: GlobalScale) -> torch.Tensor:
    if formula is GlobalScale.ENCODE:
        full_scale, _, _ = _constants(tensor_amax.device)
        encode = (full_scale / tensor_amax.float()).clamp(max=_FLOAT32_MAX)
        return torch.where(encode == 0, 1.0, encode)
    amax = tensor_amax.clamp(min=torch.finfo(tensor_amax.dtype).tiny)
    # What `2688 / amax` means in torch: the reciprocal first, rounded to the dtype.
    encode = amax.reciprocal() * NVFP4.full_scale
    return torch.where(encode.isfinite(), encode, 1.0).float()


def quantize(
    x: torch.Tensor,
    global_decode_scale: torch.Tensor,
    convention: Convention,
    *,
    global_encode_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the packed codes uint8 [M, K/2] and block scales float8_e4m3fn [M, C] of x [M, K].

    Args:
        x: The matrix.
        global_decode_scale: Multiplies to decode.
        convention: Whose arithmetic to follow.
        global_encode_scale: The stored reciprocal, of producers that store it; otherwise it is
            1 / `global_decode_scale`, rounded.

    Raises:
        ValueError: K is not a multiple of 16, or the dtype is none of float32, bfloat16, float16.
    """
    block_scales = quantize_block_scales(
        x, global_decode_scale, convention, global_encode_scale=global_encode_scale
    )
    codes = quantize_elements(
        x, block_scales, global_decode_scale, convention, global_encode_scale=global_encode_scale
    )
    return packing.pack(codes), block_scales


def quantize_block_scales(
    x: torch.Tensor,
    global_decode_scale: torch.Tensor,
    convention: Convention,
    *,
    global_encode_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the block scales float8_e4m3fn [M, C] of x [M, K].

    Raises:
        ValueError: As `quantize`.
    """
    rules = RULES[convention]
    amax = _block_amax(x, rules.nan_elements)
    decode = global_decode_scale.float()
    encode = _encode_scale(decode, global_encode_scale, rules.element_scaling)
    ideal = _ideal_block_scales(amax, decode, encode, rules.ideal_scale)
    if rules.zero_scale is ZeroScale.ONE_BEFORE_ROUNDING:
        ideal = torch.where(ideal == 0, 1.0, ideal)
    if rules.least_scale is not None:
        ideal = ideal.clamp(min=rules.least_scale)
    ideal = torch.where(ideal.isnan(), torch.nan, ideal)  # the sign of a NaN is the platform's
    scale_bytes = e4m3.encode(ideal, e4m3.Overflow.SATURATE)
    if rules.zero_scale is ZeroScale.EIGHTH_AFTER_ROUNDING:
        eighth = e4m3.encode(torch.tensor(0.125))
        scale_bytes = torch.where(e4m3.decode(scale_bytes) == 0, eighth, scale_bytes)
    return scale_bytes.view(torch.float8_e4m3fn)


def quantize_elements(
    x: torch.Tensor,
    block_scales: torch.Tensor,
    global_decode_scale: torch.Tensor,
    convention: Convention,
    *,
    global_encode_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the codes uint8 [M, K] of x [M, K] under block scales that are given.

    Raises:
        ValueError: As `quantize`.
    """
    rules = RULES[convention]
    blocks = _blocks(x).float()  # (M, C, 16)
    scales = e4m3.decode(block_scales).unsqueeze(-1)  # (M, C, 1)
    decode = global_decode_scale.float()
    encode = _encode_scale(decode, global_encode_scale, rules.element_scaling)
    match rules.element_scaling:
        case ElementScaling.DIVIDE_BY_PRODUCT:
            scaled = blocks / (scales * decode)
        case ElementScaling.DIVIDE_BY_QUOTIENT:
            scaled = blocks / (scales / encode)
        case ElementScaling.MULTIPLY_BY_QUOTIENT:
            scaled = blocks * (decode.reciprocal() / scales)
        case ElementScaling.MULTIPLY_BY_RECIPROCAL:
            factors = (scales * encode.reciprocal()).reciprocal()
            amax = _block_amax(x, rules.nan_elements).unsqueeze(-1)
            factors = _replace_reciprocal_of_zero(factors, scales, amax, rules.reciprocal_of_zero)
            scaled = blocks * factors
        case ElementScaling.MULTIPLY_BY_CAPPED_RECIPROCAL:
            factors = (scales * encode.reciprocal()).reciprocal()
            scaled = blocks * factors.clamp(max=_FLOAT32_MAX)
    codes = e2m1.encode(torch.where(scaled.isnan(), 0.0, scaled))
    if rules.negative_zero is NegativeZero.LOSES_SIGN:
        codes = torch.where(scaled == 0, 0, codes)
    codes = torch.where(scaled.isnan(), rules.nan_code, codes)
    return codes.to(torch.uint8).view(x.shape)


def dequantize(
    packed_codes: torch.Tensor,
    block_scales: torch.Tensor,
    global_decode_scale: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the values [M, K] of packed codes [M, K/2] and block scales [M, C].

    Raises:
        ValueError: The block scales are not one for each 16 codes of a row.
    """
    codes = packing.unpack(packed_codes)
    expected = (*codes.shape[:-1], codes.shape[-1] // BLOCK_SIZE)
    if codes.shape[-1] % BLOCK_SIZE or tuple(block_scales.shape) != expected:
        raise ValueError(
            f"{tuple(packed_codes.shape)} packed codes take block scales {expected}, "
            f"found {tuple(block_scales.shape)}"
        )
    scales = e4m3.decode(block_scales) * global_decode_scale.float()  # (M, C)
    blocks = e2m1.decode(codes).view(*expected, BLOCK_SIZE)  # (M, C, 16)
    return (blocks * scales.unsqueeze(-1)).flatten(-2).to(dtype)


def _blocks(x: torch.Tensor) -> torch.Tensor:
    if x.dtype not in _INPUT_DTYPES:
        raise ValueError(f"NVFP4 takes float32, bfloat16 or float16, found {x.dtype}")
    if x.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"K must be a multiple of {BLOCK_SIZE}, found {x.shape[-1]}")
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)


def _block_amax(x: torch.Tensor, nan_elements: NaNElements) -> torch.Tensor:
    """Return the largest magnitude of each block [M, C], in the dtype of x."""
    magnitudes = _blocks(x).abs()
    if nan_elements is NaNElements.POISON_BLOCK:
        return magnitudes.amax(-1)
    largest = torch.where(magnitudes.isnan(), 0.0, magnitudes).amax(-1)
    return torch.where(magnitudes.isnan().all(-1), torch.nan, largest)


def _encode_scale(
    decode: torch.Tensor, stored: torch.Tensor | None, scaling: ElementScaling
) -> torch.Tensor:
    encode = decode.reciprocal() if stored is None else stored.float()
    if scaling is ElementScaling.MULTIPLY_BY_CAPPED_RECIPROCAL:
        return encode.clamp(max=_FLOAT32_MAX)
    return encode


def _ideal_block_scales(
    amax: torch.Tensor, decode: torch.Tensor, encode: torch.Tensor, formula: IdealScale
) -> torch.Tensor:
    _, six, _ = _constants(amax.device)
    match formula:
        case IdealScale.DIVIDE_BY_PRODUCT:
            return amax.float() / (six * decode)
        case IdealScale.DIVIDE_TWICE:
            return amax.float() / six / decode
        case IdealScale.MULTIPLY_QUOTIENT:
            return encode * (amax / six.to(amax.dtype)).float()
        case IdealScale.MULTIPLY_BY_PRODUCT:
            return amax.float() * (encode * six.reciprocal())
        case IdealScale.MULTIPLY_PRODUCT:
            return encode * (amax.float() * six.reciprocal())


def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return 2688, 6 and 448 as tensors: torch may turn division by a number into a product."""
    full_scale, six, largest_scale = torch.tensor(
        (NVFP4.full_scale, E2M1.max, E4M3.max), dtype=torch.float32, device=device
    )
    return full_scale, six, largest_scale


def _replace_reciprocal_of_zero(
    factors: torch.Tensor, scales: torch.Tensor, amax: torch.Tensor, rule: ReciprocalOfZero
) -> torch.Tensor:
    match rule:
        case ReciprocalOfZero.INFINITY:
            return factors
        case ReciprocalOfZero.ZERO_IF_BLOCK_IS_ZERO:
            return torch.where(amax == 0, 0.0, factors)
        case ReciprocalOfZero.ZERO:
            return torch.where(scales == 0, 0.0, factors)
        case ReciprocalOfZero.TINY:
            return torch.where(scales == 0, 1e-8, factors)
