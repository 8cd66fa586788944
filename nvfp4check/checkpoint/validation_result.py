"""What a validation found and covered, its verdict, and its document."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nvfp4check import __version__
from nvfp4check.checkpoint.byte_pass import Sample
from nvfp4check.checkpoint.card.review import CardReview
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.checkpoint.summary import CheckpointSummary
from nvfp4check.findings import Coverage, Finding, Severity, Verdict

if TYPE_CHECKING:
    from nvfp4check.checkpoint.audit.outcome import AuditOutcome

SCHEMA = "nvfp4check/validate/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationResult:
    """What a run found, and what it covered."""

    checkpoint: CheckpointSummary
    findings: tuple[Finding, ...]
    coverage: Coverage
    verdict: Verdict
    level: RuleLevel
    sample: Sample | None
    seconds: float
    audit: "AuditOutcome | None" = field(default=None, kw_only=True)
    card: CardReview | None = field(default=None, kw_only=True)

    def to_json(self) -> dict[str, Any]:
        """Return the document of schema nvfp4check/validate/1."""
        coverage: dict[str, Any] = {
            "tensors": self.coverage.tensors,
            "tensors_checked": self.coverage.tensors_checked,
            "bytes_checked": self.coverage.bytes_checked,
            "rules": [*self.coverage.rules],
            "skipped": [{"what": gap.what, "why": gap.why} for gap in self.coverage.skipped],
            "level": self.level.value,
        }
        if self.sample is not None:
            coverage["sample"] = _sample_json(self.sample)
        added: dict[str, Any] = {}
        if self.audit is not None:
            added["audit"] = self.audit.to_json()
        if self.card is not None:
            added["card"] = self.card.to_json()
        return {
            "schema": SCHEMA,
            "tool": {"name": "nvfp4check", "version": __version__},
            "checkpoint": {
                "location": self.checkpoint.location,
                "producer": self.checkpoint.producer,
                "architecture": self.checkpoint.architecture,
                "formats": {**self.checkpoint.formats},
                "bytes": self.checkpoint.bytes,
            },
            "verdict": self.verdict.value,
            "findings": [_finding_json(finding) for finding in self.findings],
            "coverage": coverage,
            "seconds": round(self.seconds, 3),
            **added,
        }


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {
        "rule": finding.rule,
        "name": finding.name,
        "severity": finding.severity.value,
        "tensor": finding.tensor,
        "shard": finding.shard,
        "offset": finding.offset,
        "count": finding.count,
        "message": finding.message,
        "observed": _finite(finding.observed),
        "expected": _finite(finding.expected),
    }


def _finite(value: object) -> object:
    """Spell what JSON has no number for: "nan", "inf", "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value


def _sample_json(sample: Sample) -> dict[str, Any]:
    return {
        "fraction": sample.fraction,
        "seed": sample.seed,
        "groups": sample.groups,
        "groups_read": sample.groups_read,
        "weights": sample.weights,
        "weights_read": sample.weights_read,
        "missed": [
            {"defective_groups": size, "probability": sample.missed(size)}
            for size in sample.defect_sizes
        ],
    }


def verdict_of(
    findings: tuple[Finding, ...], coverage: Coverage, fail_on: Severity = Severity.ERROR
) -> Verdict:
    """Judge a run: a finding as grave as `fail_on` fails it, a gap makes it incomplete."""
    if any(finding.severity.rank <= fail_on.rank for finding in findings):
        return Verdict.FAIL
    return Verdict.INCOMPLETE if coverage.skipped else Verdict.PASS


def exit_code(
    result: ValidationResult, fail_on: Severity = Severity.ERROR, allow_skips: bool = False
) -> int:
    """Return 0 when it was checked and holds, 1 when it does not, 2 when not all was checked."""
    verdict = verdict_of(result.findings, result.coverage, fail_on)
    if verdict is Verdict.FAIL:
        return 1
    return 0 if verdict is Verdict.PASS or allow_skips else 2
