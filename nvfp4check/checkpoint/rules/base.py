"""What a rule is, what it may look at, and how it says what it found.

A rule is a function from a `RuleContext` to problems, with the text that explains it:

    @rule("NV003", "indexed-tensor-absent", Severity.ERROR, fires_when=..., why=..., repair=...)
    def indexed_tensor_absent(context: RuleContext) -> Iterator[Problem]:
        ...
        yield Problem("...", tensor=name, shard=shard)

The decorator returns the `Rule`. A group file lists its rules in `RULES`, and the package's
`__init__` collects the groups. What a rule cannot look at it hands to `RuleContext.skip`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from nvfp4check.findings import Finding, JsonValue, Severity, Skipped
from nvfp4check.visible import visible

if TYPE_CHECKING:
    from nvfp4check.checkpoint.audit.outcome import AuditOutcome
    from nvfp4check.checkpoint.card.review import CardReview
    from nvfp4check.checkpoint.expected import Expected
    from nvfp4check.checkpoint.opening import Checkpoint
    from nvfp4check.checkpoint.scan import WeightScan


class RuleLevel(StrEnum):
    """How much of a checkpoint a rule has to read."""

    HEADERS = "headers"
    BYTES = "bytes"


def printable(text: object, limit: int = 200) -> str:
    """Return a name or message from the checkpoint on one harmless line, cut to a length."""
    return visible(text, limit)


def counted(count: int, noun: str) -> str:
    """Return "1 tensor", "2 tensors"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing a rule found: a `Finding` without the rule's id, name and severity.

    `offset` is a byte offset into the shard; `count` how many elements, blocks or tensors are
    concerned.
    """

    message: str
    tensor: str | None = None
    shard: str | None = None
    offset: int | None = None
    count: int | None = None
    observed: JsonValue = None
    expected: JsonValue = None


@dataclass(slots=True)
class RuleContext:
    """What the rules look at.

    `expected` is the map of the unquantised model; it is None when there is none for the
    architecture, and `why_nothing_is_expected` says so. `scans` holds what the byte pass counted,
    by logical weight name; it is empty at level headers and partial in a sampled run. `tp` is the
    number of tensor parallel shards to check for, or None. `base` is the checkpoint that this one
    should have been made from, `audit` what holding the two together gave, and `card` the review
    of the model card; each is None where there is none.
    """

    checkpoint: "Checkpoint"
    expected: "Expected | None" = None
    why_nothing_is_expected: str = ""
    scans: "Mapping[str, WeightScan]" = field(default_factory=dict)
    level: RuleLevel = RuleLevel.HEADERS
    tp: int | None = None
    base: "Checkpoint | None" = None
    audit: "AuditOutcome | None" = None
    card: "CardReview | None" = None
    skipped: list[Skipped] = field(default_factory=list)

    def skip(self, what: str, why: str) -> None:
        """Record something that was not checked. Said twice, it is kept once."""
        entry = Skipped(what, why)
        if entry not in self.skipped:
            self.skipped.append(entry)


Check = Callable[[RuleContext], Iterable[Problem]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule of validate, with what a release engineer needs to act on it."""

    id: str
    name: str
    severity: Severity
    level: RuleLevel
    fires_when: str
    why: str
    repair: str
    incidents: tuple[str, ...]
    check: Check

    def findings(self, context: RuleContext) -> Iterator[Finding]:
        """Run the rule and put its name on everything it found."""
        for problem in self.check(context):
            yield Finding(
                rule=self.id,
                name=self.name,
                severity=self.severity,
                message=problem.message,
                tensor=problem.tensor,
                shard=problem.shard,
                offset=problem.offset,
                count=problem.count,
                observed=problem.observed,
                expected=problem.expected,
            )


def rule(
    identifier: str,
    name: str,
    severity: Severity,
    *,
    fires_when: str,
    why: str,
    repair: str,
    incidents: tuple[str, ...] = (),
    level: RuleLevel = RuleLevel.HEADERS,
) -> Callable[[Check], Rule]:
    """Make a rule of the function below it."""

    def make(check: Check) -> Rule:
        return Rule(
            id=identifier,
            name=name,
            severity=severity,
            level=level,
            fires_when=fires_when,
            why=why,
            repair=repair,
            incidents=incidents,
            check=check,
        )

    return make
