"""Which planted faults a suite sees, and which of them a tolerance rule would let pass.

Contract:
    seen      the first property that fails on the wrong computation; a fault that raises is an
              error of the catalogue, not something seen
    reference faults are planted in the reference, and what it does is declared: it divides as IEEE
              754 does, gives ties to the lower index, and treats a row alike in every batch
    rule      seen where some result of the fault is not accepted, on one sample of the rule's own
              random inputs; then on every product of the suite, compared with the exact product
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from nvfp4check.compare import Zeros, bits
from nvfp4check.faults import faults_of
from nvfp4check.faults.base import Form, KernelFault
from nvfp4check.faults.published_rules import PublishedRule
from nvfp4check.faults.variants import Variant, correct_variants
from nvfp4check.ops import OPERATIONS, Inputs, Kernel
from nvfp4check.properties import properties_of
from nvfp4check.properties.law import Case, Property, PropertyOutcome, Setting, Verdict
from nvfp4check.tolerance import Facts, Reciprocal, Ties
from nvfp4ref.matmul import exact

#: The convention faults are planted under where none is asked for.
CONVENTION = "engine"

#: What the reference declares.
REFERENCE_FACTS = Facts(reciprocal=Reciprocal.IEEE, ties=Ties.LOWER_INDEX, batch_invariant=True)


class BrokenFaultError(RuntimeError):
    """A planted fault raised instead of computing something wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planting:
    """One form of a fault, and the convention it is planted under."""

    fault: KernelFault
    form: Form
    convention: str | None

    @property
    def name(self) -> str:
        """The fault's id, with its form where there are several."""
        return named(self.fault, self.form)

    def kernel(self, inner: Kernel | None = None) -> Kernel:
        """Return the wrong computation: in a kernel that is given, or in the reference."""
        return self.form.apply(self.convention, inner)


@dataclass(frozen=True, slots=True)
class Sighting:
    """One planted fault, and the property that saw it."""

    planting: Planting
    seen_by: str | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """One correct variant, and the property that rejected it."""

    variant: Variant
    rejected_by: str | None
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleOutcome:
    """What a rule sees of the planted faults of `matmul` on one kind of inputs."""

    #: Faults whose result differs there from the right one at all.
    showing: tuple[str, ...]
    #: Faults that the rule does not accept.
    seen: tuple[str, ...]
    #: Correct variants that the rule does not accept.
    refused: tuple[str, ...]


def until_broken(
    kernel: Kernel, operation: str, setting: Setting
) -> Iterator[tuple[Property, PropertyOutcome | None]]:
    """Yield each property before it is asked, and again with its outcome; end at a broken one."""
    for law in properties_of(operation):
        yield law, None
        outcome = law.run(kernel, setting)
        yield law, outcome
        if outcome.verdict is Verdict.FAIL:
            return


def first_broken_law(kernel: Kernel, operation: str, setting: Setting) -> tuple[str | None, str]:
    """Return the first property that a kernel breaks, and what it says."""
    for law, outcome in until_broken(kernel, operation, setting):
        if outcome is not None and outcome.verdict is Verdict.FAIL:
            return law.name, outcome.message
    return None, ""


def plantings(
    operation: str, convention: str | None = None, kernel: Kernel | None = None
) -> Iterator[Planting]:
    """Yield every fault of an operation, planted in the reference, or what goes around a kernel."""
    for fault, form in faults_of(operation):
        under = form.convention_for(convention or CONVENTION)
        if kernel is None or (form.around and under in (None, convention)):
            yield Planting(fault=fault, form=form, convention=under)


def sight(operation: str, *, convention: str | None = None, seed: int = 0) -> Iterator[Sighting]:
    """Plant every fault of an operation in the reference and yield what saw it.

    Raises:
        BrokenFaultError: A fault raised.
    """
    for planting in plantings(operation, convention):
        started = time.perf_counter()
        setting = Setting(convention=planting.convention, facts=REFERENCE_FACTS, seed=seed)
        seen_by, message = first_broken_law(planting.kernel(), operation, setting)
        if "\nraised " in message:
            raise BrokenFaultError(f"{planting.name} in {operation} raised:\n{message}")
        yield Sighting(planting, seen_by, time.perf_counter() - started)


def accept(operation: str, seed: int = 0) -> Iterator[Acceptance]:
    """Try every correct variant of an operation and yield what rejected it."""
    for variant in correct_variants(operation):
        setting = Setting(convention=variant.convention, facts=variant.facts, seed=seed)
        rejected_by, message = first_broken_law(variant.kernel, operation, setting)
        yield Acceptance(variant=variant, rejected_by=rejected_by, message=message)


def named(fault: KernelFault, form: Form) -> str:
    """Return a fault's id, with its form where there are several."""
    return f"{fault.id} {form.label}".strip()


def planted_in_matmul() -> dict[str, Kernel]:
    """Return the wrong kernels of `matmul` by name."""
    return {named(fault, form): form.apply() for fault, form in faults_of("matmul")}


def on_own_inputs(
    rules: Sequence[PublishedRule], seed: int = 0, *, model_sized: bool = False
) -> dict[str, RuleOutcome]:
    """Return what rules see on one sample each of the inputs that their projects' tests draw.

    With `model_sized`, on random inputs as large as a model's activations and weights.
    """
    alike: dict[object, list[PublishedRule]] = defaultdict(list)
    for rule in rules:
        alike[rule.drawing(model_sized)].append(rule)
    outcomes: dict[str, RuleOutcome] = {}
    for group in alike.values():
        first = group[0]
        sample = first.model_sized_sample(seed) if model_sized else first.sample(seed)
        expected = {rule.name: rule.expected(sample) for rule in group}
        outcomes |= outcomes_on([(sample.inputs, expected)], group)
    return {rule.name: outcomes[rule.name] for rule in rules}


def on_our_inputs(rules: Sequence[PublishedRule], seed: int = 0) -> dict[str, RuleOutcome]:
    """Return what rules see on the products of the suite."""
    products = (
        (inputs, dict.fromkeys((rule.name for rule in rules), expected))
        for inputs, expected in _products_of_the_suite(seed)
    )
    return outcomes_on(products, rules)


def outcomes_on(
    products: Iterable[tuple[Inputs, Mapping[str, torch.Tensor]]], rules: Sequence[PublishedRule]
) -> dict[str, RuleOutcome]:
    """Return what each rule sees on some products, each with what each rule compares with."""
    wrong = planted_in_matmul()
    right = {one.name: one.kernel for one in correct_variants("matmul")}
    showing: set[str] = set()
    unseen = {rule.name: set(wrong) for rule in rules}
    accepted = {rule.name: set(right) for rule in rules}
    operation = OPERATIONS["matmul"]
    for inputs, expected in products:
        truth = operation.call(operation.reference(), inputs)[0]
        for name, kernel in {**wrong, **right}.items():
            open_to = unseen if name in wrong else accepted
            asked = [rule for rule in rules if name in open_to[rule.name]]
            if not asked and (name in showing or name in right):
                continue
            actual = operation.call(kernel, inputs)[0]
            if name in wrong and not _same(actual, truth):
                showing.add(name)
            for rule in asked:
                if not rule.accepts(actual, expected[rule.name]):
                    open_to[rule.name].discard(name)
    return {
        rule.name: RuleOutcome(
            showing=tuple(name for name in wrong if name in showing),
            seen=tuple(name for name in wrong if name not in unseen[rule.name]),
            refused=tuple(name for name in right if name not in accepted[rule.name]),
        )
        for rule in rules
    }


def _same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bits(actual, expected, zeros=Zeros.UNSIGNED).holds


def _products_of_the_suite(seed: int) -> Iterator[tuple[Inputs, torch.Tensor]]:
    for case in cases_of("matmul", Setting(seed=seed)):
        taken = case.inputs
        operands = (taken[f"{side}_{part}"] for side in "ab" for part in ("codes", "scales"))
        yield taken, exact(*operands).value * taken["alpha"].double()


def cases_of(
    operation: str,
    setting: Setting,
    keep: Callable[[Case], bool] = lambda case: True,
    of_each: int | None = None,
) -> Iterator[Case]:
    """Yield cases of an operation's properties that are complete calls: all, or some of each."""
    required = {value.name for value in OPERATIONS[operation].arguments if not value.optional}
    for law in properties_of(operation):
        complete = (
            case for case in law.generate(setting) if required <= set(case.inputs) and keep(case)
        )
        yield from itertools.islice(complete, of_each)
