"""Fold findings that say the same thing of many tensors, for people to read."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nvfp4check.report.visible import visible

#: A finding as it stands in the JSON document.
FindingRecord = Mapping[str, Any]

#: A number that stands as a whole part of a tensor's name: a layer or an expert.
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")

SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True, slots=True)
class Fold:
    """The findings of one rule, by kind of tensor, in the order in which the kinds came."""

    rule: str
    name: str
    severity: str
    kinds: dict[str, list[FindingRecord]]

    @property
    def findings(self) -> list[FindingRecord]:
        """All of them, kind by kind."""
        return [finding for findings in self.kinds.values() for finding in findings]

    @property
    def kind(self) -> str:
        """The kind of tensor, where it is the same for all."""
        return next(iter(self.kinds)) if len(self.kinds) == 1 else ""


def kind_of(tensor: str | None) -> str:
    """Return a tensor's name with the layer and expert numbers replaced by `*`."""
    return _INDEX.sub("*", tensor or "")


def fold(findings: Iterable[FindingRecord]) -> list[Fold]:
    """Group findings by severity and rule, and within a rule by kind of tensor."""
    folds: dict[tuple[str, str, str], Fold] = {}
    for finding in findings:
        key = (finding["rule"], finding["name"], finding["severity"])
        kinds = folds.setdefault(key, Fold(*key, {})).kinds
        kinds.setdefault(kind_of(finding.get("tensor")), []).append(finding)
    return list(folds.values())


def count_by_severity(findings: Iterable[FindingRecord]) -> dict[str, int]:
    """Return how many findings there are of each severity, the gravest first."""
    counts = dict.fromkeys(SEVERITIES, 0)
    for finding in findings:
        counts[finding["severity"]] += 1
    return counts


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: `1 error`, `14,847 errors`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size_text(count: int) -> str:
    """Return a number of bytes as people say it: `413.31 GB`, decimal units."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} bytes" if unit == "bytes" else f"{size:,.2f} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"


def findings_text(counts: Mapping[str, int]) -> str:
    """Return the counts of findings in words: `2 errors, 1 warning`, or `no findings`."""
    words = {"error": "error", "warning": "warning", "info": "note"}
    said = [plural(count, words[severity]) for severity, count in counts.items() if count]
    return ", ".join(said) or "no findings"


def place(finding: FindingRecord) -> str:
    """Return where a finding is, as far as it is known and its message does not say so already."""
    message = finding["message"]
    names = (finding.get("tensor"), finding.get("shard"))
    parts = [visible(name) for name in names if name and name not in message]
    if finding.get("offset") is not None:
        parts.append(f"byte {finding['offset']:,}")
    count = finding.get("count") or 0
    if count > 1 and not {f"{count}", f"{count:,}"} & set(message.split()):
        parts.append(f"{count:,} in all")
    return ", ".join(parts)
