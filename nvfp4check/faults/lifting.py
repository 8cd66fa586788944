"""From one wrong step to the operations that take it.

Contract:
    operand step     (packed codes [..., K/2], block scales [..., C]) -> the same, changed; planted
                     around dequantize, matmul and grouped_matmul
    decoding step    the same -> elements float64 [..., K] without their global scale; in place of
                     the reference's decoding in those operations
    quantising step  (x, global decode scale, convention) -> packed codes, block scales; in place
                     of the reference's quantiser in quantize, silu_mul_quantize, rms_norm_quantize

A product has two operands. A step that permutes K shows only where it is done to one of them; any
other is planted in B, in A, and in both. Where the product is the same whichever it is done to, it
is planted in one, B.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nvfp4check.faults.base import Form
from nvfp4check.ops import Kernel
from nvfp4ref import matmul as reference
from nvfp4ref.conventions import Convention
from nvfp4ref.fused import add_residual, rms_norm, silu_mul
from nvfp4ref.rounding import round_to

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]
OperandStep = Callable[[Tensor, Tensor], Pair]
DecodingStep = Callable[[Tensor, Tensor], Tensor]
QuantisingStep = Callable[[Tensor, Tensor, Convention], Pair]

#: Where in a product a step is planted.
ONE_SIDE = ("B", "A")
EITHER_SIDE = ("either",)
ALL_SIDES = ("B", "A", "both")


def in_operands(
    step: OperandStep,
    label: str = "",
    sides: tuple[str, ...] = ALL_SIDES,
    *,
    dequantize: bool = True,
) -> tuple[Form, ...]:
    """Return the forms of an operand step."""
    forms = []
    if dequantize:
        wrong = partial(_around_dequantize, step)
        forms.append(Form(operation="dequantize", wrong=wrong, label=label, around=True))
    for operation in ("matmul", "grouped_matmul"):
        for side in sides:
            wrong = partial(_around_product, step, side)
            name = _joined(label, side)
            forms.append(Form(operation=operation, wrong=wrong, label=name, around=True))
    return tuple(forms)


def in_decoding(
    step: DecodingStep, label: str = "", sides: tuple[str, ...] = ALL_SIDES
) -> tuple[Form, ...]:
    """Return the forms of a decoding step."""
    forms = [Form(operation="dequantize", wrong=partial(_dequantize, step), label=label)]
    for operation, product in (("matmul", _matmul), ("grouped_matmul", _grouped_matmul)):
        for side in sides:
            name = _joined(label, side)
            wrong = partial(product, step, side)
            forms.append(Form(operation=operation, wrong=wrong, label=name))
    return tuple(forms)


def in_quantiser(
    step: QuantisingStep, label: str = "", conventions: tuple[str, ...] = ()
) -> tuple[Form, ...]:
    """Return the forms of a quantising step."""
    lifted: dict[str, Callable[..., Any]] = {
        "quantize": _quantize,
        "silu_mul_quantize": _silu_mul_quantize,
        "rms_norm_quantize": _rms_norm_quantize,
    }
    return tuple(
        Form(
            operation=operation,
            wrong=partial(whole, step),
            label=label,
            conventions=conventions,
        )
        for operation, whole in lifted.items()
    )


def on_codes(change: Callable[[Tensor], Tensor], label: str = "") -> tuple[Form, ...]:
    """Return the forms of a change to the packed codes that a quantiser gives out."""
    return tuple(
        Form(operation=operation, wrong=partial(_changed_codes, change), label=label, around=True)
        for operation in ("quantize", "silu_mul_quantize", "rms_norm_quantize")
    )


_WHERE = {"both": "of both operands", "either": "of one operand"}


def _joined(label: str, side: str) -> str:
    where = _WHERE.get(side, f"of {side}")
    return f"{label}, {where}" if label else where


def _around_dequantize(
    step: OperandStep, kernel: Kernel, codes: Tensor, scales: Tensor, decode: Tensor, dtype: Any
) -> Any:
    return kernel(*step(codes, scales), decode, dtype)


def _around_product(step: OperandStep, side: str, kernel: Kernel, *arguments: Any) -> Any:
    a_codes, a_scales, b_codes, b_scales, *rest = arguments
    if side in ("A", "both"):
        a_codes, a_scales = step(a_codes, a_scales)
    if side in ("B", "either", "both"):
        b_codes, b_scales = step(b_codes, b_scales)
    return kernel(a_codes, a_scales, b_codes, b_scales, *rest)


def _dequantize(
    step: DecodingStep, codes: Tensor, scales: Tensor, decode: Tensor, dtype: torch.dtype
) -> Tensor:
    return (step(codes, scales).float() * decode.float()).to(dtype)


def product_of(a: Tensor, b: Tensor, alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """Return alpha A B^T of float64 elements, rounded once."""
    return round_to((a @ b.T) * alpha.double(), dtype)


def _matmul(step: DecodingStep, side: str, *arguments: Any) -> Tensor:
    a_codes, a_scales, b_codes, b_scales, alpha, dtype = arguments
    of_a = step if side in ("A", "both") else reference.operand
    of_b = step if side in ("B", "either", "both") else reference.operand
    return product_of(of_a(a_codes, a_scales), of_b(b_codes, b_scales), alpha, dtype)


def by_group(one: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return a product of groups, each group's by a wrong product of two matrices."""
    a_codes, a_scales, b_codes, b_scales, alpha, offsets, dtype = arguments
    out = torch.zeros(a_codes.shape[0], b_codes.shape[1], dtype=dtype)
    groups = reference.group_rows(offsets, b_codes.shape[0], a_codes.shape[0])
    for expert, rows in enumerate(groups):
        taken = (a_codes[rows], a_scales[rows], b_codes[expert], b_scales[expert])
        out[rows] = one(*taken, alpha[expert], dtype)
    return out


def _grouped_matmul(step: DecodingStep, side: str, *arguments: Any) -> Tensor:
    return by_group(partial(_matmul, step, side), *arguments)


def _quantize(step: QuantisingStep, x: Tensor, decode: Tensor, *, convention: str) -> Pair:
    return step(x, decode, Convention(convention))


def _silu_mul_quantize(
    step: QuantisingStep, gate: Tensor, up: Tensor, decode: Tensor, *, convention: str
) -> Pair:
    return step(silu_mul(gate, up).float(), decode, Convention(convention))


def _rms_norm_quantize(
    step: QuantisingStep,
    x: Tensor,
    weight: Tensor,
    eps: float,
    decode: Tensor,
    residual: Tensor | None = None,
    *,
    convention: str,
) -> tuple[Tensor, ...]:
    summed = x if residual is None else add_residual(x, residual)
    pair = step(rms_norm(summed, weight, eps).float(), decode, Convention(convention))
    return pair if residual is None else (*pair, summed)


def _changed_codes(change: Callable[[Tensor], Tensor], kernel: Kernel, *arguments: Any) -> Any:
    codes, *rest = kernel(*arguments)
    return (change(codes), *rest)
