"""How small an error each derived bound sees: a bound that is loosened no longer does.

Every kernel here computes the reference's result in float64 and then errs by one part in 2**k. What
is asserted is measured: the law sees the error at k and no longer at k + 3, where it is below the
roundings of a correct kernel.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from nvfp4check.faults import variants
from nvfp4check.ops import operation
from nvfp4ref import fused, nvfp4
from nvfp4ref.conventions import Convention
from nvfp4ref.deepseek_v3 import rotary, routing
from nvfp4ref.deepseek_v3.config import RotaryConfig

Tensor = torch.Tensor
Failing = Callable[..., set[str]]
ENGINE = Convention.ENGINE

#: Steps from an error that is seen to one that is not.
STEPS = 3


def product(error: float, *arguments: Any) -> Tensor:
    right = operation("matmul").reference()(*arguments)
    return (right.double() * (1 + error)).to(right.dtype)


def attended(error: float, *arguments: Any) -> Tensor:
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    result: Tensor = operation("mla_decode").reference()(*wide) * (1 + error)
    return result.to(arguments[0].dtype)


def scaled_scores(error: float, *arguments: Any) -> Tensor:
    result: Tensor = operation("mla_decode").reference()(
        *arguments[:-1], arguments[-1] * (1 + error)
    )
    return result


def turned(error: float, x: Tensor, positions: Tensor, config: Any) -> Tensor:
    return (rotary.rope(x.double(), positions, config) * (1 + error)).to(x.dtype)


def turned_too_far(error: float, x: Tensor, positions: Tensor, config: Any) -> Tensor:
    settings = RotaryConfig.of(config)
    theta = rotary.angles(positions, settings).double() * (1 + error)
    factor = 1.0 if settings.rope_scaling is None else settings.rope_scaling.rotary_factor
    return rotary.rotate(x.double(), theta.cos() * factor, theta.sin() * factor).to(x.dtype)


def weighed(error: float, *arguments: Any) -> tuple[Tensor, Tensor]:
    experts, weights = operation("route").reference()(*arguments)
    return experts, (weights.double() * (1 + error)).float()


def activated(error: float, gate: Tensor, up: Tensor, decode: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.nn.functional.silu(gate.double()) * up.double() * (1 + error)
    return nvfp4.quantize(value.float(), decode, ENGINE)


def normed(
    error: float, x: Tensor, weight: Tensor, eps: float, decode: Tensor, residual: Any = None
) -> tuple[Tensor, ...]:
    summed = x if residual is None else fused.add_residual(x, residual)
    value = fused.rms_norm(summed, weight, eps).double() * (1 + error)
    quantised = nvfp4.quantize(value.float(), decode, ENGINE)
    return quantised if residual is None else (*quantised, summed)


@pytest.mark.parametrize(
    ("name", "law", "kernel", "seen"),
    [
        ("matmul", "all-scales-within-the-bound", product, 18),
        ("matmul", "alpha-is-applied-once", product, 19),
        ("mla_decode", "every-length", attended, 12),
        ("mla_decode", "every-length", scaled_scores, 12),
        ("rope", "every-shape", turned, 20),
        ("rope", "every-kind-of-position", turned_too_far, 20),
        ("route", "biases-choose-and-do-not-weigh", weighed, 19),
        ("silu_mul_quantize", "codes-are-within-the-activations-error", activated, 17),
        ("rms_norm_quantize", "every-shape", normed, 17),
    ],
)
def test_a_bound_sees_one_part_in_so_many_and_no_correct_rounding(
    failing: Failing, name: str, law: str, kernel: Callable[..., Any], seen: int
) -> None:
    convention = "engine" if operation(name).has_convention else None

    assert failing(name, partial(kernel, 2.0**-seen), convention, law) == {law}
    assert failing(name, partial(kernel, 2.0 ** -(seen + STEPS)), convention, law) == set()


@pytest.mark.parametrize(("ulps", "broken"), [(2, set()), (16, {"codes-are-the-conventions"})])
def test_a_quantisers_reciprocals_may_be_2_ulp_off_and_not_16(
    failing: Failing, ulps: int, broken: set[str]
) -> None:
    kernel = partial(variants._engine, partial(variants._off_by, ulps))

    assert failing("quantize", kernel, "engine", "codes-are-the-conventions") == broken


def test_choice_scores_off_by_a_thousandth_are_seen(failing: Failing) -> None:
    """Near ties are free within the error of a sigmoid, and no further."""

    def kernel(
        logits: Tensor, bias: Tensor, groups: int, kept: int, top_k: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))
        scores = routing.choice_scores(logits, bias) + 1e-3 * noise
        experts = routing.choose(scores, groups, kept, top_k)
        return experts, routing.weigh(logits, experts, scaling)

    assert "biases-choose-and-do-not-weigh" in failing("route", kernel)


def test_what_lies_behind_the_last_token_may_not_be_weighed_with_zero(failing: Failing) -> None:
    def kernel(*arguments: Any) -> Tensor:
        pages = arguments[2].float().sum() * 0.0
        result: Tensor = operation("mla_decode").reference()(*arguments)
        return (result.float() + pages).to(result.dtype)

    assert failing("mla_decode", kernel) == {"poison-beyond-the-length-changes-nothing"}
