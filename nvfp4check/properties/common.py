"""Laws that every operation keeps, made for one from the cases it is given.

Each function returns a property. `Cases` yields ordinary inputs; what makes the law is added here.

Bits are demanded, but of operations that sum over a row: they give a `check` that holds one call to
the truth, which is all that is asked of a kernel that does not declare `batch_invariant`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from nvfp4check import compare, inputs
from nvfp4check.properties.law import Case, Check, Failure, Property, Runner, Setting, failed
from nvfp4check.properties.memory import GuardedAllocations

Cases = Callable[[Setting], Iterable[Case]]

#: Calls on the same input; a race shows in one of a few.
REPEATS = 4


def repeats(operation: str, cases: Cases) -> Property:
    """The same inputs give the same bits, call after call."""

    def check(runner: Runner, case: Case) -> Failure | None:
        first = runner(case.inputs)
        for turn in range(1, REPEATS):
            again = runner(case.inputs)
            failure = same_outputs(runner, case, again, first, f"call {turn + 1} against the first")
            if failure:
                return failure
        return None

    return Property(
        name="repeat-runs-agree",
        operation=operation,
        law="the same inputs give the same bits, call after call",
        generate=cases,
        check=check,
    )


def writes_only_its_outputs(operation: str, cases: Cases) -> Property:
    """Nothing is written outside the outputs, and the inputs are left as they were."""

    def check(runner: Runner, case: Case) -> Failure | None:
        before = {
            name: value.clone()
            for name, value in case.inputs.items()
            if isinstance(value, torch.Tensor)
        }
        plain = runner(case.inputs)
        with GuardedAllocations() as guarded:
            actual = runner(case.inputs)
        violations = guarded.violations()
        if violations:
            return Failure(
                message="memory outside an output was written:\n  " + "\n  ".join(violations),
                case=case,
                actual=actual,
            )
        for name, value in before.items():
            changed = compare.bits(
                case.inputs[name], value, what=f"input {name}", nans=compare.Nans.SAME_BITS
            )
            if not changed.holds:
                return failed(case, changed, note="the kernel changed its input")
        return same_outputs(
            runner, case, actual, plain, "with other contents in freshly allocated memory"
        )

    return Property(
        name="writes-only-its-outputs",
        operation=operation,
        law="every byte of the outputs is written, none outside them, and no input is changed",
        generate=cases,
        check=check,
    )


def permutes_rows(
    operation: str,
    cases: Cases,
    arguments: tuple[str, ...],
    name: str = "rows-are-independent",
    truth: Check | None = None,
) -> Property:
    """Permuted rows give permuted outputs, and a row alone gives what it gives among others."""

    def check(runner: Runner, case: Case) -> Failure | None:
        whole = runner(case.inputs)
        held = _holder(runner, truth)
        rows = case.inputs[arguments[0]].shape[0]
        generator = runner.setting.generator(rows, 77)
        order = torch.randperm(rows, generator=generator)
        picked = _rows(case, arguments, order, "rows permuted")
        failure = held(picked, tuple(out[order] for out in whole), "")
        if failure:
            return failure
        for row in sorted({0, rows // 2, rows - 1}):
            alone = _rows(case, arguments, torch.tensor([row]), f"row {row} alone")
            failure = held(alone, tuple(out[row : row + 1] for out in whole), "")
            if failure:
                return failure
        return None

    return Property(
        name=name,
        operation=operation,
        law="a row's result depends neither on its place nor on the rows beside it",
        generate=cases,
        check=check,
    )


def _holder(
    runner: Runner, truth: Check | None
) -> Callable[[Case, tuple[Any, ...], str], Failure | None]:
    """Return what holds a call to the bits of another, or to the truth where only that is due."""

    def held(case: Case, expected: tuple[Any, ...], note: str) -> Failure | None:
        if truth is not None and not runner.setting.facts.batch_invariant:
            return truth(runner, case)
        return same_outputs(runner, case, runner(case.inputs), expected, note)

    return held


def _rows(case: Case, arguments: tuple[str, ...], order: torch.Tensor, note: str) -> Case:
    taken: dict[str, Any] = dict(case.inputs)
    for name in arguments:
        taken[name] = take_rows(taken[name], order)
    return Case(f"{case.label}, {note}", taken, case.facts)


def take_rows(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the rows in another order, for dtypes that torch cannot index too."""
    if values.dtype == torch.float8_e4m3fn:
        return values.view(torch.uint8)[order].view(values.dtype)
    return values[order]


def takes_any_view(
    operation: str, cases: Cases, arguments: tuple[str, ...], truth: Check | None = None
) -> Property:
    """Strides and alignment of an input do not matter."""

    def generate(setting: Setting) -> Iterator[Case]:
        for case in cases(setting):
            for name in arguments:
                for view, values in inputs.views(case.inputs[name]):
                    viewed = {**case.inputs, name: values}
                    plain = dict(case.inputs)
                    yield Case(f"{case.label}, {name}: {view}", viewed, {"plain": plain})

    def check(runner: Runner, case: Case) -> Failure | None:
        expected = runner(case.facts["plain"])
        held = _holder(runner, truth)
        return held(case, expected, "against the same values in plain layout")

    return Property(
        name="strides-do-not-matter",
        operation=operation,
        law="non-contiguous and misaligned inputs give what contiguous ones give",
        generate=generate,
        check=check,
    )


def ignores_poison(operation: str, cases: Cases, arguments: tuple[str, ...]) -> Property:
    """What lies in memory before and after an input does not matter."""

    def generate(setting: Setting) -> Iterator[Case]:
        for case in cases(setting):
            for byte in inputs.POISONS:
                poisoned = dict(case.inputs)
                for name in arguments:
                    poisoned[name] = inputs.among_poison(poisoned[name], byte)
                label = f"{case.label}, {byte:#x} around {', '.join(arguments)}"
                yield Case(label, poisoned, {"plain": dict(case.inputs)})

    def check(runner: Runner, case: Case) -> Failure | None:
        expected = runner(case.facts["plain"])
        return same_outputs(
            runner, case, runner(case.inputs), expected, "against the same values without poison"
        )

    return Property(
        name="poison-beside-the-rows-changes-nothing",
        operation=operation,
        law="bytes 0x7F, 0xFF, 0x7E and 0xA5 before and after the real rows change no result",
        generate=generate,
        check=check,
    )


def same_outputs(
    runner: Runner,
    case: Case,
    actual: tuple[Any, ...],
    expected: tuple[Any, ...],
    note: str = "",
    zeros: compare.Zeros = compare.Zeros.SIGNED,
) -> Failure | None:
    """Compare all outputs bit for bit, by the operation's names for them."""
    if len(actual) != len(expected):
        return Failure(
            message=f"{len(actual)} outputs, expected {len(expected)}", case=case, actual=actual
        )
    for value, found, wanted in zip(runner.operation.outputs, actual, expected, strict=False):
        comparison = compare.bits(found, wanted, what=value.name, zeros=zeros)
        failure = failed(case, comparison, actual, expected, note)
        if failure:
            return failure
    return None
