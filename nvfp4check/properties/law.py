"""A property: a law that every implementation of an operation keeps, and how it is tried.

A property generates cases (inputs by name) from a setting, runs the kernel on each, and answers
with the first failure it finds, made as small as it can. It knows nothing of who wrote the kernel.
"""

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

from nvfp4check.compare import Comparison, Mismatch, render
from nvfp4check.ops import (
    Inputs,
    Kernel,
    Operation,
    UnsupportedError,
    WrongOutputsError,
    operation,
)
from nvfp4check.tolerance import Facts

#: Examples a property draws where its domain has no end.
DEFAULT_EXAMPLES = 40

#: A smaller case costs one call of the kernel; no more of them are tried.
MAX_SHRINKS = 200


class Verdict(StrEnum):
    """What became of one property."""

    PASS = "pass"
    FAIL = "fail"
    #: The kernel takes none of the cases.
    SKIP = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a kernel is tried under."""

    convention: str | None = None
    facts: Facts = field(default_factory=Facts)
    device: str = "cpu"
    seed: int = 0
    max_examples: int = DEFAULT_EXAMPLES

    def generator(self, *salt: int) -> torch.Generator:
        """Return a generator that depends on the seed and on whatever else is named."""
        mixed = self.seed
        for value in salt:
            mixed = (mixed * 1_000_003 + value + 1) % 2**63
        return torch.Generator().manual_seed(mixed)


@dataclass(frozen=True, slots=True)
class Case:
    """One call, and whatever its law needs to know beside the arguments."""

    label: str
    inputs: Inputs
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A case that breaks a law."""

    message: str
    case: Case
    actual: tuple[Any, ...] = ()
    expected: tuple[Any, ...] = ()
    worst: Mismatch | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PropertyOutcome:
    """What a property found. `failure` holds the smallest failing case."""

    name: str
    operation: str
    law: str
    verdict: Verdict
    cases: int
    unsupported: int = 0
    message: str = ""
    failure: Failure | None = None
    #: The known fault whose output the failing one is, where there is one.
    diagnosis: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return the outcome as plain JSON, in the form of `kernels test`."""
        worst = self.failure.worst if self.failure else None
        return {
            "name": self.name,
            "law": self.law,
            "verdict": self.verdict.value,
            "cases": self.cases,
            "unsupported": self.unsupported,
            "message": self.message,
            "worst": worst.to_json() if worst else None,
            "diagnosis": self.diagnosis,
        }


class KernelRaisedError(Exception):
    """A kernel raised: the law could not even be asked."""


@dataclass(frozen=True, slots=True)
class Runner:
    """A kernel under a setting: inputs by name in, outputs on the CPU out."""

    operation: Operation
    kernel: Kernel
    setting: Setting

    def __call__(self, inputs: Inputs) -> tuple[Any, ...]:
        """Return the kernel's outputs.

        Raises:
            UnsupportedError: The kernel does not take these inputs.
            KernelRaisedError: The kernel raised anything else, or returned another form.
        """
        moved = {name: to_device(value, self.setting.device) for name, value in inputs.items()}
        try:
            outputs = self.operation.call(self.kernel, moved)
            return tuple(to_device(value, "cpu") for value in outputs)
        except UnsupportedError:
            raise
        except WrongOutputsError as error:
            raise KernelRaisedError(str(error)) from error
        except (Exception, SystemExit) as error:  # not our code: any error, any exit is its answer
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise KernelRaisedError(
                f"raised {type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            ) from error

    def reference(self, inputs: Inputs) -> tuple[Any, ...]:
        """Return the outputs of the reference on the same inputs."""
        reference = self.operation.reference(self.setting.convention)
        return self.operation.call(reference, inputs)

    def wrong_form(self, inputs: Inputs) -> str | None:
        """Return in what the form of the kernel's outputs differs from the reference's, or None."""
        named = zip(self.operation.outputs, self(inputs), self.reference(inputs), strict=False)
        for value, output, right in named:
            found, wanted = _form(output), _form(right)
            if found != wanted:
                return f"returned {value.name} as {found}, expected {wanted}"
        return None


def _form(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


#: Returns a failure, or None where the law holds.
Check = Callable[[Runner, Case], Failure | None]

#: Returns smaller cases than a failing one, the smallest first.
Shrink = Callable[[Case, Failure], Iterable[Case]]


def nothing_smaller(case: Case, failure: Failure) -> Iterable[Case]:
    """Return no smaller case: for laws whose own search makes them small."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Property:
    """One law of one operation."""

    name: str
    operation: str
    #: The law in words.
    law: str
    generate: Callable[[Setting], Iterable[Case]]
    check: Check
    shrink: Shrink = nothing_smaller

    def run(self, kernel: Kernel, setting: Setting) -> PropertyOutcome:
        """Try the law on every case and return what was found first."""
        runner = Runner(operation(self.operation), kernel, setting)
        cases = unsupported = 0
        refusal = ""
        for case in self.generate(setting):
            cases += 1
            try:
                failure = self.ask(runner, case)
            except UnsupportedError as error:
                unsupported += 1
                refusal = refusal or f"{case.label}: {error}"
                continue
            if failure is not None:
                return self._outcome(
                    Verdict.FAIL, cases, unsupported, self._smallest(runner, failure)
                )
        if cases and unsupported == cases:
            return self._outcome(Verdict.SKIP, cases, unsupported, note=refusal)
        note = f"{unsupported} of {cases} not supported ({refusal})" if unsupported else ""
        return self._outcome(Verdict.PASS, cases, unsupported, note=note)

    def ask(self, runner: Runner, case: Case) -> Failure | None:
        """Return the failure of one case, an error of the kernel included.

        Raises:
            UnsupportedError: The kernel does not take the case.
        """
        try:
            return self.check(runner, case)
        except KernelRaisedError as error:
            return Failure(message=str(error), case=case)
        except UnsupportedError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            # A law reckons with outputs of the right form. With another it may fail in any way.
            wrong = runner.wrong_form(case.inputs)
            if wrong is None:
                raise
            return Failure(message=wrong, case=case)

    def _smallest(self, runner: Runner, failure: Failure) -> Failure:
        tried = 0
        shrunk = True
        while shrunk and tried < MAX_SHRINKS and not context_lost(runner.setting.device):
            shrunk = False
            for smaller in self.shrink(failure.case, failure):
                tried += 1
                try:
                    found = self.ask(runner, smaller)
                except UnsupportedError:
                    continue
                if found is not None:
                    failure, shrunk = found, True
                    break
                if tried >= MAX_SHRINKS:
                    break
        return failure

    def _outcome(
        self,
        verdict: Verdict,
        cases: int,
        unsupported: int,
        failure: Failure | None = None,
        note: str = "",
    ) -> PropertyOutcome:
        message = note
        if failure is not None:
            message = f"{failure.case.label}\n{failure.message}\n{describe(failure.case.inputs)}"
        return PropertyOutcome(
            name=self.name,
            operation=self.operation,
            law=self.law,
            verdict=verdict,
            cases=cases,
            unsupported=unsupported,
            message=message,
            failure=failure,
        )


def failed(
    case: Case,
    comparison: Comparison,
    actual: tuple[Any, ...] = (),
    expected: tuple[Any, ...] = (),
    note: str = "",
) -> Failure | None:
    """Return the failure that a comparison amounts to, or None where it holds."""
    if comparison.holds:
        return None
    text = render(comparison)
    return Failure(
        message=f"{note}\n{text}" if note else text,
        case=case,
        actual=actual,
        expected=expected,
        worst=comparison.worst,
    )


def to_device(value: Any, device: str) -> Any:
    """Return a tensor on a device, with its strides and offset; anything else as it is.

    A misaligned or strided view stays one: the storage moves and the view is laid over it again.
    """
    if not isinstance(value, torch.Tensor) or value.device.type == torch.device(device).type:
        return value
    plain = value.is_contiguous() and value.storage_offset() == 0
    if plain or device == "cpu":
        return value.to(device)
    storage = value.untyped_storage()
    whole = torch.empty(0, dtype=value.dtype).set_(storage)
    moved = whole.to(device)
    return moved.as_strided(value.shape, value.stride(), value.storage_offset())


def context_lost(device: str) -> bool:
    """Tell whether a kernel has left a GPU in error: CUDA gives it again on every later call."""
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if torch.device(device).type != "cuda" or not begun:
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


#: Tensors up to this many elements are written out in full where a case is described.
SHOWN_ELEMENTS = 64


def describe(inputs: Inputs) -> str:
    """Return inputs as text that can be typed in again: hexadecimal bits of small tensors."""
    return "\n".join(f"  {name} = {_describe_value(value)}" for name, value in inputs.items())


def _describe_value(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    form = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value.numel() > SHOWN_ELEMENTS:
        return form
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = value.contiguous().flatten()
    raw = flat.view(kinds[value.element_size()]) if value.dtype.is_floating_point else flat
    width = value.element_size() * 8
    bits = " ".join(f"{int(bit) & ((1 << width) - 1):0{width // 4}x}" for bit in raw)
    text = f"{form} bits {bits}"
    if value.dtype.is_floating_point and value.element_size() > 1:
        numbers = ", ".join(f"{number:.9g}" for number in flat.float().tolist())
        text += f"\n      ({numbers})"
    return text
