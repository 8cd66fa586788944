"""Every reference, and every correct variant of one, keeps every law."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from nvfp4check.ops import OPERATIONS, operation
from nvfp4check.properties import properties_of
from nvfp4check.properties.law import Property, Setting, Verdict
from nvfp4check.tolerance import Accumulator, Facts
from nvfp4ref.conventions import Convention
from nvfp4ref.matmul import (
    SEQUENTIAL,
    TENSOR_CORE,
    Accumulation,
    AccumulatorRounding,
    grouped_matmul,
    matmul,
)

ORDERS = {
    "sequential": SEQUENTIAL,
    "split-k": Accumulation(chunk=16, splits=4),
    "toward-zero-by-64": TENSOR_CORE,
    "toward-zero-by-16": Accumulation(chunk=16, rounding=AccumulatorRounding.TOWARD_ZERO),
}


def _cases() -> list[Any]:
    cases = []
    for name, known in OPERATIONS.items():
        conventions = list(Convention) if known.has_convention else [None]
        for convention in conventions:
            for law in properties_of(name):
                label = f"{name}-{convention}-{law.name}" if convention else f"{name}-{law.name}"
                cases.append(pytest.param(law, convention, id=label))
    return cases


@pytest.mark.parametrize(("law", "convention"), _cases())
def test_the_reference_keeps_the_law(law: Property, convention: str | None) -> None:
    kernel = operation(law.operation).reference(convention)

    outcome = law.run(kernel, Setting(convention=convention, max_examples=10))

    assert outcome.verdict is Verdict.PASS, outcome.message
    assert outcome.cases > 0


@pytest.mark.parametrize("law", properties_of("matmul"), ids=lambda law: law.name)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_every_order_of_accumulation_keeps_the_laws_of_matmul(
    law: Property, order: Accumulation
) -> None:
    outcome = law.run(partial(matmul, order=order), Setting(max_examples=10))

    assert outcome.verdict is Verdict.PASS, outcome.message


@pytest.mark.parametrize("law", properties_of("grouped_matmul"), ids=lambda law: law.name)
def test_truncation_keeps_the_laws_of_grouped_matmul(law: Property) -> None:
    outcome = law.run(partial(grouped_matmul, order=TENSOR_CORE), Setting())

    assert outcome.verdict is Verdict.PASS, outcome.message


def _in_float32(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    wide = gate.float()
    return wide / (1 + torch.exp(-wide)) * up.float()


def _norm_in_float32(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale * weight.float()


def _rms_norm_unrounded(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scale: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """As FlashInfer: the norm is of the sum before it is rounded."""
    quantize = operation("quantize").reference("engine")
    summed = x.float() if residual is None else x.float() + residual.float()
    out: tuple[torch.Tensor, ...] = quantize(_norm_in_float32(summed, weight, eps), scale)
    return out if residual is None else (*out, summed.to(x.dtype))


def _silu_in_float32(
    gate: torch.Tensor, up: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    found: tuple[torch.Tensor, ...] = operation("quantize").reference("engine")(
        _in_float32(gate, up), scale
    )
    return found


def _silu_in_bfloat16(
    gate: torch.Tensor, up: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    found: tuple[torch.Tensor, ...] = operation("quantize").reference("engine")(
        _in_float32(gate, up).bfloat16(), scale
    )
    return found


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("rms_norm_quantize", _rms_norm_unrounded), ("silu_mul_quantize", _silu_in_float32)],
)
def test_float32_arithmetic_keeps_the_laws(name: str, kernel: Callable[..., Any]) -> None:
    for law in properties_of(name):
        outcome = law.run(kernel, Setting(convention="engine"))
        assert outcome.verdict is Verdict.PASS, outcome.message


def test_an_activation_in_bfloat16_needs_to_be_declared() -> None:
    laws = properties_of("silu_mul_quantize")
    declared = Setting(convention="engine", facts=Facts(intermediate=Accumulator.BFLOAT16))

    kept = {law.run(_silu_in_bfloat16, declared).verdict for law in laws}
    undeclared = {law.run(_silu_in_bfloat16, Setting(convention="engine")).verdict for law in laws}

    assert kept == {Verdict.PASS}
    assert Verdict.FAIL in undeclared
