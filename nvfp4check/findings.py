"""What a check found: findings, what was covered, and what was not.

A fault in a checkpoint is data, never an exception. An exception is for what could not be checked.
"""

from dataclasses import dataclass, field
from enum import StrEnum

#: What `observed` and `expected` may hold: plain JSON.
JsonScalar = str | int | float | bool | None
JsonValue = JsonScalar | list[JsonScalar] | dict[str, JsonScalar]


class Severity(StrEnum):
    """How bad a finding is. Members stand in order of gravity."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"

    @property
    def rank(self) -> int:
        """Position for sorting, the gravest first."""
        return list(Severity).index(self)


class Verdict(StrEnum):
    """The answer of a whole validation."""

    PASS = "pass"
    FAIL = "fail"
    INCOMPLETE = "incomplete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing a rule found, at one place.

    `offset` is a byte offset into the shard; `count` how many elements, blocks or tensors are
    concerned. `observed` and `expected` are JSON values.
    """

    rule: str
    name: str
    severity: Severity
    message: str
    tensor: str | None = None
    shard: str | None = None
    offset: int | None = None
    count: int | None = None
    observed: JsonValue = None
    expected: JsonValue = None

    @property
    def sort_key(self) -> tuple[int, str, str, str, int, str]:
        """Severity, rule, tensor, then whatever makes the order total."""
        return (
            self.severity.rank,
            self.rule,
            self.tensor or "",
            self.shard or "",
            -1 if self.offset is None else self.offset,
            self.message,
        )


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that was not checked, and why. Nothing is skipped in silence."""

    what: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What a validation looked at."""

    tensors: int = 0
    tensors_checked: int = 0
    bytes_checked: int = 0
    rules: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = field(default=())


class CheckError(Exception):
    """Something could not be checked: unreadable input, bad usage, a missing dependency.

    The command line prints the message and exits with 2. The message names the file, the tensor,
    what was found, what was expected and what to do next.
    """
