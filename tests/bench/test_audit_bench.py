"""The measurement of the audit runs, and finds the weights that it wrote sound."""

from pathlib import Path

import pytest

from nvfp4check.bench import audit
from nvfp4check.checkpoint.audit.whole import run_audit
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.engine.local import LocalEngine


def test_the_pair_that_is_measured_is_an_honest_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_ROWS", 256)
    monkeypatch.setattr(audit, "_COLUMNS", 256)
    audit.write_pair(tmp_path, 3)
    ours, base = (open_checkpoint(tmp_path / name) for name in ("nvfp4", "fp8"))
    outcome, gaps = run_audit(ours, base, LocalEngine(1))

    assert gaps == []
    assert len(outcome.weights) == 3
    assert all(weight.differs("modelopt") == 0 for weight in outcome.weights.values())
    first, second, third = (outcome.weights[name].counts for name in sorted(outcome.weights))
    assert first == second == third
