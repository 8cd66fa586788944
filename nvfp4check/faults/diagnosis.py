"""Which known fault a failing kernel has, by its outputs.

Contract:
    candidate    a form of a fault whose output on a failing input is not the right one, and is
                 what the kernel gave: bit for bit (a NaN any NaN, a zero either zero, experts in
                 any order), or within what the kernel's arithmetic may add to the fault's result
    ranked       by two more inputs of each property: a fault must explain more than half of those
                 on which the kernel is wrong, and counts less for each that it would have made
                 wrong and the kernel got right; exact ones come first
    undecided    faults that rank the same are all named; none that explains is no diagnosis
"""

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import lru_cache

import torch

from nvfp4check import compare
from nvfp4check.faults import faults_of
from nvfp4check.faults.base import Form, KernelFault
from nvfp4check.ops import OPERATIONS, Inputs, Kernel, UnsupportedError
from nvfp4check.properties import mla_decode, properties_of, rope
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

#: Inputs of each property on which a failing kernel is tried once more.
OF_EACH = 2

#: Wrong calls that every fault of the catalogue is tried on; the rest are for those that remain.
FIRST = 3

#: Elements an input may have to be among them.
_LARGEST = 1 << 20

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
    #: Wrong calls that it explains.
    explained: int = 0
    #: Right calls that it would have made wrong.
    refuted: int = 0
    exact: bool = True

    @property
    def words(self) -> str:
        """The fault in words."""
        which = f" ({self.form.label})" if self.form.label else ""
        return f"{self.fault.id}: {self.fault.name}{which}"

    @property
    def rank(self) -> tuple[int, bool]:
        """Larger for a better explanation."""
        return self.explained - self.refuted, self.exact

    def weigh(self, operation: str, wrong: "Calls", right: "Calls", runner: Runner) -> None:
        """Count the calls that speak for the fault, and those that speak against it."""
        matches = [_match(operation, self, call, runner) for call in wrong]
        self.explained = sum(match is not Match.NONE for match in matches)
        self.exact = Match.NEAR not in matches
        self.refuted = sum(_shows(operation, self, call) for call in right)


def with_diagnosis(outcome: PropertyOutcome, kernel: Kernel, setting: Setting) -> PropertyOutcome:
    """Return the outcome of a property with the fault that explains its failure, if one does."""
    if outcome.failure is None:
        return outcome
    return replace(outcome, diagnosis=diagnose(outcome.operation, outcome.failure, kernel, setting))


def diagnose(operation: str, failure: Failure, kernel: Kernel, setting: Setting) -> str | None:
    """Return the known fault whose output the failing kernel gives, in words, or None."""
    runner = Runner(OPERATIONS[operation], kernel, setting)
    wrong, right = _tried(operation, failure.case, runner)
    if not wrong:
        return None
    candidates = _candidates(operation, wrong[:FIRST], runner)
    for one in candidates:
        one.weigh(operation, wrong, right, runner)
    best = _best([one for one in candidates if 2 * one.explained > len(wrong)])
    if not best:
        return None
    how = "equals" if best[0].exact else "as, within rounding,"
    text = f"{how} {'; or '.join(one.words for one in best[:_SHOWN])}"
    if len(best) > _SHOWN:
        text += f"; or {len(best) - _SHOWN} others"
    if best[0].explained < len(wrong):
        return f"{text} (on {best[0].explained} of {len(wrong)} inputs where the kernel is wrong)"
    return text if len(best) == 1 else f"{text} (the same on every input tried)"


@dataclass(frozen=True, slots=True)
class Call:
    """What a kernel gave for some inputs, and what is right."""

    inputs: Inputs
    outputs: tuple[torch.Tensor, ...]
    right: tuple[torch.Tensor, ...]


#: Several of them.
Calls = tuple[Call, ...]


def _tried(operation: str, failing: Case, runner: Runner) -> tuple[Calls, Calls]:
    """Return calls that break a law, the failing one first, and calls that gave the right bits.

    A call that keeps its law and gives other bits, as rounding may, says nothing.
    """
    hashable = isinstance(runner.kernel, Hashable)
    wrong, right = (_further if hashable else _further.__wrapped__)(operation, runner)
    first = _call(failing, runner)
    if first is not None and not _equal(operation, first.outputs, first.right):
        wrong = (first, *wrong)
    return wrong, right


@lru_cache(maxsize=2)
def _further(operation: str, runner: Runner) -> tuple[Calls, Calls]:
    """Return the calls of `_tried` but the first: the same for each law that a kernel breaks."""
    wrong: list[Call] = []
    right: list[Call] = []
    for law in properties_of(operation):
        for case in itertools.islice(filter(_is_small, law.generate(runner.setting)), OF_EACH):
            try:
                failure = law.ask(runner, case)
            except UnsupportedError:
                continue
            call = _call(failure.case if failure else case, runner)
            if call is None:
                continue
            same = _equal(operation, call.outputs, call.right)
            if failure is not None and not same:
                wrong.append(call)
            elif failure is None and same:
                right.append(call)
    return tuple(wrong), tuple(right)


def _is_small(case: Case) -> bool:
    tensors = [value for value in case.inputs.values() if isinstance(value, torch.Tensor)]
    return 0 < sum(one.numel() for one in tensors) <= _LARGEST


def _call(case: Case, runner: Runner) -> Call | None:
    """Return a call with its outputs; None if it is not complete, or the kernel refuses it."""
    required = {value.name for value in runner.operation.arguments if not value.optional}
    if not required <= set(case.inputs):
        return None
    try:
        outputs = runner(case.inputs)
    except (UnsupportedError, KernelRaisedError):
        return None
    if not all(isinstance(one, torch.Tensor) for one in outputs):
        return None
    return Call(case.inputs, outputs, runner.reference(case.inputs))


def _candidates(operation: str, calls: Calls, runner: Runner) -> list[Candidate]:
    """Return the faults that explain any of some wrong calls."""
    convention = runner.setting.convention
    found = []
    for fault, form in faults_of(operation):
        if form.conventions and convention not in form.conventions:
            continue
        one = Candidate(fault, form, form.apply(convention))
        if any(_match(operation, one, call, runner) is not Match.NONE for call in calls):
            found.append(one)
    return found


def _best(candidates: list[Candidate]) -> list[Candidate]:
    if not candidates:
        return []
    most = max(one.rank for one in candidates)
    return [one for one in candidates if one.rank == most]


def _match(operation: str, candidate: Candidate, call: Call, runner: Runner) -> Match:
    """Return how a fault explains a call that went wrong."""
    try:
        wrong = OPERATIONS[operation].call(candidate.kernel, call.inputs)
        if len(wrong) != len(call.outputs) or _equal(operation, wrong, call.right):
            return Match.NONE
        if _equal(operation, call.outputs, wrong):
            return Match.EXACT
        radius = _radius(operation, candidate.kernel, call.inputs, wrong, runner)
    except _REFUSALS:
        return Match.NONE
    if radius is None or not _near(operation, call.outputs, wrong, radius):
        return Match.NONE
    # What is as near to the right result is not explained by a fault.
    return Match.NONE if _near(operation, call.outputs, call.right, radius) else Match.NEAR


def _shows(operation: str, candidate: Candidate, call: Call) -> bool:
    """Tell whether a fault would have gone wrong where the kernel did not."""
    try:
        wrong = OPERATIONS[operation].call(candidate.kernel, call.inputs)
    except _REFUSALS:
        return True
    return not _equal(operation, wrong, call.right)


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
