"""What replaces the wrong arithmetic of Triton's interpreter; `interpreter.py` installs it.

Contract:
    create_dot_scaled   products of the decoded operands summed in float64, rounded to float32
                        once, then added to the accumulator
    with_*              take what is there and return it with one thing made right, the rest left
    BF16 and E4M3       the interpreter holds them as bits: uint16 and uint8
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter as upstream

from nvfp4ref.formats import E2M1, E4M3, E8M0, ElementFormat

Array = npt.NDArray[Any]

_ScaleFormat = upstream._ir.ScaleDotElemTypeTY


def _values(element: ElementFormat) -> Array:
    """Return the float32 value of every code of a format, worked out from its fields."""
    codes = np.arange(1 << element.bits)
    field = (codes >> element.mantissa_bits) & ((1 << element.exponent_bits) - 1)
    mantissa = codes & ((1 << element.mantissa_bits) - 1)
    implicit = (field > 0) | (element.mantissa_bits == 0)
    exponent = np.where(implicit, field, 1) - element.bias - element.mantissa_bits
    significand = mantissa + np.where(implicit, 1 << element.mantissa_bits, 0)
    values = np.ldexp(significand.astype(np.float64), exponent)
    values[list(element.nan_codes)] = np.nan
    signed: Array = np.where(codes & element.sign_bit, -values, values).astype(np.float32)
    return signed


_E2M1_VALUES = _values(E2M1)
_E4M3_VALUES = _values(E4M3)
_E8M0_VALUES = _values(E8M0)

_WIDE_TYPES = (tl.float16, tl.bfloat16, tl.float32, tl.float64)


def _encode_e4m3(values: Array) -> Array:
    """Return the E4M3 byte nearest to each value, saturating."""
    exact = values.astype(np.float64)  # float16, float32 and float64 all fit
    magnitude = np.minimum(np.abs(exact), E4M3.max)
    exponent = np.frexp(np.maximum(magnitude, E4M3.smallest_normal))[1] - 1
    steps = np.rint(np.ldexp(magnitude, E4M3.mantissa_bits - exponent))  # rint: ties to even
    byte = (exponent + E4M3.bias - 1) * (1 << E4M3.mantissa_bits) + np.nan_to_num(steps)
    byte = np.where(np.isnan(exact), E4M3.nan_codes[0], byte)
    encoded: Array = (byte + E4M3.sign_bit * np.signbit(exact)).astype(np.uint8)
    return encoded


def _float32_to_bf16(values: Array) -> Array:
    """Return the bits of the BF16 nearest to each float32, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def _to_float32(values: Array, dtype: tl.dtype) -> Array:
    """Return interpreter data of a Triton float type (BF16 and E4M3 are held as bits)."""
    if dtype == tl.bfloat16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif dtype == tl.float8e4nv:
        values = _E4M3_VALUES[values]
    return values


def with_e4m3_casts(convert: Callable[..., Array]) -> Callable[..., Array]:
    """Return `convert` with the conversions from and to E4M3 replaced by correct ones."""

    def convert_float(
        values: Array, source: tl.dtype, target: tl.dtype, rounding: Any = None
    ) -> Array:
        toward_zero = rounding == upstream._ir.ROUNDING_MODE.RTZ
        if target == tl.float8e4nv and source in _WIDE_TYPES and not toward_zero:
            return _encode_e4m3(_to_float32(values, source))
        if source == tl.float8e4nv and target == tl.bfloat16:
            return _float32_to_bf16(_E4M3_VALUES[values])
        if source == tl.float8e4nv and target in _WIDE_TYPES:
            exact: Array = _E4M3_VALUES[values].astype(upstream._get_np_dtype(target))
            return exact
        return convert(values, source, target, rounding)

    return convert_float


def with_bf16_casts(convert: Callable[..., Array]) -> Callable[..., Array]:
    """Return `convert` with float32 to BF16 and back replaced by correct ones."""

    def convert_float(
        values: Array, source: tl.dtype, target: tl.dtype, rounding: Any = None
    ) -> Array:
        toward_zero = rounding == upstream._ir.ROUNDING_MODE.RTZ
        if source == tl.float32 and target == tl.bfloat16 and not toward_zero:
            return _float32_to_bf16(values)
        if source == tl.bfloat16 and target == tl.float32:
            return _to_float32(values, source)
        return convert(values, source, target, rounding)

    return convert_float


def _decode_operand(handle: Any, element: Any, packed_axis: int) -> Array:
    """Return the float64 values of a `dot_scaled` operand."""
    values: Array
    if element == _ScaleFormat.E2M1:
        codes = np.moveaxis(handle.data.view(np.uint8), packed_axis, -1)
        pairs = np.stack((codes & 15, codes >> 4), axis=-1)
        unpacked = _E2M1_VALUES[pairs].reshape(*codes.shape[:-1], -1)
        values = np.moveaxis(unpacked, -1, packed_axis)
    elif element == _ScaleFormat.E4M3:
        values = _E4M3_VALUES[handle.data.view(np.uint8)]
    elif element == _ScaleFormat.BF16:
        values = _to_float32(handle.data.view(np.uint16), tl.bfloat16)
    elif element == _ScaleFormat.FP16:
        values = handle.data
    else:
        raise NotImplementedError(f"dot_scaled of {element} is not interpreted")
    return values.astype(np.float64)


def _decode_scales(handle: Any, length: int) -> Array:
    """Return scales [outer, groups] as float64 [outer, length]."""
    table = _E4M3_VALUES if handle.dtype.scalar == tl.float8e4nv else _E8M0_VALUES
    scales = table[handle.data.view(np.uint8)].astype(np.float64)
    return np.repeat(scales, length // scales.shape[-1], axis=-1)


def create_dot_scaled(
    builder: Any,
    lhs: Any,
    lhs_scale: Any,
    lhs_format: Any,
    rhs: Any,
    rhs_scale: Any,
    rhs_format: Any,
    fast_math: bool,
    lhs_k_pack: bool,
    rhs_k_pack: bool,
    accumulator: Any,
) -> Any:
    """Compute what `tl.dot_scaled` means; replaces the interpreter's method."""
    left = _decode_operand(lhs, lhs_format, -1 if lhs_k_pack else -2)
    right = _decode_operand(rhs, rhs_format, -2 if rhs_k_pack else -1)
    if lhs_scale is not None:
        left = left * _decode_scales(lhs_scale, left.shape[-1])
    if rhs_scale is not None:
        right = right * np.swapaxes(_decode_scales(rhs_scale, right.shape[-2]), -1, -2)
    product = (left @ right).astype(np.float32)
    return upstream.TensorHandle(product + accumulator.data, tl.float32)


class _FormatName(str):
    """A format's name, also where the semantics expect it wrapped (up to 3.7)."""

    @property
    def value(self) -> str:
        """The name."""
        return self


def with_plain_format_names(dot_scaled: Callable[..., Any]) -> Callable[..., Any]:
    """Return the semantics of `dot_scaled` that take a format's name as a plain string."""

    def named(semantics: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_FormatName(arg) if isinstance(arg, str) else arg for arg in args)
        return dot_scaled(semantics, *args, **kwargs)

    return named


def with_bf16_dot(create_dot: Callable[..., Any]) -> Callable[..., Any]:
    """Return `create_dot` with BF16 operands taken by value."""

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return upstream.TensorHandle(_to_float32(handle.data, tl.bfloat16), tl.float32)

    def dot(builder: Any, lhs: Any, rhs: Any, *rest: Any) -> Any:
        return create_dot(builder, widened(lhs), widened(rhs), *rest)

    return dot


def with_loop_bounds(patch_tensor: Callable[..., None]) -> Callable[..., None]:
    """Return `patch_tensor` with a conversion to int that takes an array of one element."""

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched
