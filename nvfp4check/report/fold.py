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
    """Findings of one rule about tensors of one kind, in the order they came."""

    rule: str
    name: str
    severity: str
    kind: str
    findings: tuple[FindingRecord, ...]


def kind_of(tensor: str | None) -> str:
    """Return a tensor's name with the layer and expert numbers replaced by `*`."""
    return _INDEX.sub("*", tensor or "")


def fold(findings: Iterable[FindingRecord]) -> list[Fold]:
    """Group findings by severity, rule and kind of tensor, keeping the order of the first ones."""
    groups: dict[tuple[str, str, str, str], list[FindingRecord]] = {}
    for finding in findings:
        key = (
            finding["rule"],
            finding["name"],
            finding["severity"],
            kind_of(finding.get("tensor")),
        )
        groups.setdefault(key, []).append(finding)
    return [Fold(*key, tuple(members)) for key, members in groups.items()]


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
