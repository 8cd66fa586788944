"""Which known fault a failing kernel has, by its outputs.

Contract:
    candidate    a form of a fault whose output on the failing input is not the right one, and is
                 what the kernel gave: bit for bit (a NaN any NaN, a zero either zero, experts in
                 any order), or within what the kernel's arithmetic may add to the fault's result
    ranked       candidates are tried on further inputs of the properties; those that are
                 contradicted least are named, the exact ones first
    undecided    faults that explain the same are all named; none that explains is no diagnosis
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto

import torch

from nvfp4check import compare
from nvfp4check.faults import faults_of
from nvfp4check.faults.base import Form, KernelFault
from nvfp4check.faults.power import cases_of
from nvfp4check.ops import OPERATIONS, Inputs, Kernel, UnsupportedError
from nvfp4check.properties import mla_decode, rope
from nvfp4check.properties.law import (
    Case,
    Failure,
    KernelRaisedError,
    PropertyOutcome,
    Runner,
    Setting,
)
from nvfp4check.tolerance import EPILOGUE_ROUNDINGS, Facts
from nvfp4ref.rounding import SMALLEST_SUBNORMAL, UNIT_ROUNDOFF

#: Further inputs of each property on which candidates are tried.
OF_EACH = 4

#: Elements an input may have to be among them.
_LARGEST = 1 << 17

#: Faults named where several explain the same.
_SHOWN = 4

_PRODUCTS = ("matmul", "grouped_matmul")

#: What planted computations may raise on inputs they were not made for.
_REFUSALS = (ValueError, RuntimeError, IndexError)


class Match(Enum):
    """How a fault explains outputs."""

    NONE = auto()
    NEAR = auto()
    EXACT = auto()


@dataclass(slots=True)
class Candidate:
    """A fault that may be the kernel's."""

    fault: KernelFault
    form: Form
    kernel: Kernel
    #: Further inputs on which the kernel gave something else.
    contradicted: int = 0
    exact: bool = True

    @property
    def words(self) -> str:
        """The fault in words."""
        which = f", {self.form.label}" if self.form.label else ""
        return f"{self.fault.id}: {self.fault.name}{which}"


def with_diagnosis(outcome: PropertyOutcome, kernel: Kernel, setting: Setting) -> PropertyOutcome:
    """Return the outcome of a property with the fault that explains its failure, if one does."""
    if outcome.failure is None:
        return outcome
    return replace(outcome, diagnosis=diagnose(outcome.operation, outcome.failure, kernel, setting))


def diagnose(operation: str, failure: Failure, kernel: Kernel, setting: Setting) -> str | None:
    """Return the known fault whose output the failing kernel gives, in words, or None."""
    runner = Runner(OPERATIONS[operation], kernel, setting)
    found = list(_candidates(operation, failure.case, runner))
    if not found:
        return None
    best = _narrowed(operation, found, runner)
    how = "equals" if best[0].exact else "as, within rounding,"
    text = f"{how} {'; or '.join(one.words for one in best[:_SHOWN])}"
    if len(best) > _SHOWN:
        text += f"; or {len(best) - _SHOWN} others"
    return text if len(best) == 1 else f"{text} (the same on every input tried)"


def _candidates(operation: str, case: Case, runner: Runner) -> Iterator[Candidate]:
    outputs = _outputs(runner, case.inputs)
    if outputs is None:
        return
    right = runner.reference(case.inputs)
    convention = runner.setting.convention
    for fault, form in faults_of(operation):
        if form.conventions and convention not in form.conventions:
            continue
        one = Candidate(fault, form, form.apply(convention))
        match = _match(operation, one, case.inputs, outputs, runner, right)
        if match is not Match.NONE:
            one.exact = match is Match.EXACT
            yield one


def _narrowed(operation: str, candidates: list[Candidate], runner: Runner) -> list[Candidate]:
    """Return the candidates that further inputs contradict least, those that match bits first."""
    best = _best(candidates)
    for case in _further_cases(operation, runner.setting):
        if len(best) == 1:
            break
        outputs = _outputs(runner, case.inputs)
        if outputs is None:
            continue
        for one in candidates:
            match = _match(operation, one, case.inputs, outputs, runner)
            one.contradicted += match is Match.NONE
            one.exact = one.exact and match is Match.EXACT
        best = _best(candidates)
    return best


def _best(candidates: list[Candidate]) -> list[Candidate]:
    least = min((one.contradicted, not one.exact) for one in candidates)
    return [one for one in candidates if (one.contradicted, not one.exact) == least]


def _further_cases(operation: str, setting: Setting) -> Iterator[Case]:
    def small(case: Case) -> bool:
        tensors = [value for value in case.inputs.values() if isinstance(value, torch.Tensor)]
        return 0 < sum(one.numel() for one in tensors) <= _LARGEST

    return cases_of(operation, setting, small, of_each=OF_EACH)


def _outputs(runner: Runner, inputs: Inputs) -> tuple[torch.Tensor, ...] | None:
    required = {value.name for value in runner.operation.arguments if not value.optional}
    if not required <= set(inputs):
        return None
    try:
        outputs = runner(inputs)
    except (UnsupportedError, KernelRaisedError):
        return None
    return outputs if all(isinstance(one, torch.Tensor) for one in outputs) else None


def _match(
    operation: str,
    candidate: Candidate,
    inputs: Inputs,
    actual: tuple[torch.Tensor, ...],
    runner: Runner,
    right: tuple[torch.Tensor, ...] | None = None,
) -> Match:
    """Return how a fault explains these outputs, which it must not do where they are right."""
    try:
        wrong = OPERATIONS[operation].call(candidate.kernel, inputs)
        if len(wrong) != len(actual) or (right and _equal(operation, wrong, right)):
            return Match.NONE
        if _equal(operation, actual, wrong):
            return Match.EXACT
        radius = _radius(operation, candidate.kernel, inputs, wrong, runner)
    except _REFUSALS:
        return Match.NONE
    if radius is None or not _near(operation, actual, wrong, radius):
        return Match.NONE
    # What is as near to the right result is not explained by a fault.
    return Match.NONE if right and _near(operation, actual, right, radius) else Match.NEAR


def _equal(
    operation: str, actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]
) -> bool:
    if len(actual) != len(expected):
        return False
    pairs = zip(_ordered(operation, actual), _ordered(operation, expected), strict=True)
    return all(compare.bits(a, b, zeros=compare.Zeros.UNSIGNED).holds for a, b in pairs)


def _ordered(operation: str, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return the experts of a router by number, each with its weight; other outputs as they are."""
    if operation != "route":
        return outputs
    experts, weights = outputs
    order = experts.sort(-1).indices
    return experts.gather(-1, order), weights.gather(-1, order)


def _near(
    operation: str,
    actual: tuple[torch.Tensor, ...],
    centre: tuple[torch.Tensor, ...],
    radius: torch.Tensor,
) -> bool:
    """Tell whether the values lie within a radius; what stands before them must be equal."""
    *others, values = _ordered(operation, actual)
    *same, wanted = _ordered(operation, centre)
    if not all(torch.equal(a, b) for a, b in zip(others, same, strict=True)):
        return False
    if values.shape != wanted.shape or values.dtype != wanted.dtype:
        return False
    wide, middle = values.double(), wanted.double()
    alike = (wide == middle) | (wide.isnan() & middle.isnan())
    return bool((alike | ((wide - middle).abs() <= radius)).all())


def _radius(
    operation: str,
    kernel: Kernel,
    inputs: Inputs,
    wrong: tuple[torch.Tensor, ...],
    runner: Runner,
) -> torch.Tensor | None:
    """Return how far a kernel's rounding may take it from a fault's values; None for codes."""
    facts = runner.setting.facts
    values = wrong[-1]
    if not values.is_floating_point() or values.dtype == torch.float8_e4m3fn:
        return None
    stored = UNIT_ROUNDOFF[values.dtype] * values.double().abs() + SMALLEST_SUBNORMAL[values.dtype]
    if operation in _PRODUCTS:
        return 2 * stored + _product_rounding(operation, kernel, inputs, facts)
    case = Case("", inputs)
    if operation == "rope":
        return rope.allowed(case, runner).allowed + stored
    if operation == "mla_decode":
        return mla_decode.allowed(runner, case).allowed + stored
    if operation == "route":
        roundings = int(inputs["top_k"]) + 3
        error = 3 * facts.function_error + roundings * UNIT_ROUNDOFF[torch.float32]
        return error * values.double().abs() + stored
    return 2 * stored + 2 * UNIT_ROUNDOFF[torch.float32] * values.double().abs()


def _product_rounding(operation: str, kernel: Kernel, inputs: Inputs, facts: Facts) -> torch.Tensor:
    """Return the bound of `tolerance` on the fault's own sums: its product of magnitudes."""
    taken = dict(inputs)
    for side in "ab":
        taken[f"{side}_codes"] = taken[f"{side}_codes"] & 0x77
        raw = taken[f"{side}_scales"].contiguous().view(torch.uint8) & 0x7F
        taken[f"{side}_scales"] = raw.view(torch.float8_e4m3fn)
    taken["alpha"] = taken["alpha"].abs()
    taken["dtype"] = torch.float32
    magnitude: torch.Tensor = OPERATIONS[operation].call(kernel, taken)[0].double().abs()
    count = facts.roundings(2 * inputs["a_codes"].shape[1]) + EPILOGUE_ROUNDINGS
    return count * facts.accumulator_roundoff * magnitude
