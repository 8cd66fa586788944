"""Each fault planted in a golden: the right rule sees it, and nothing unrelated does."""

import hashlib
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvfp4check.checkpoint.faults import CHECKPOINT_FAULTS, CheckpointFault
from nvfp4check.checkpoint.faults.injection import Injection, inject
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules import RULES
from nvfp4check.checkpoint.validation import ValidationOptions, validate
from nvfp4check.findings import Severity

#: Faults of weights that the NVFP4 golden does not have, and the checkpoint that has them.
ELSEWHERE = {"F8d": "ct", "F9e": "narrow", "F20j": "fp8"}


def files(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def source(request: pytest.FixtureRequest, golden: SimpleNamespace, fault: str) -> Path:
    """The checkpoint to plant in."""
    where = ELSEWHERE.get(fault, "nvfp4")
    found: Path = request.getfixturevalue("narrow") if where == "narrow" else getattr(golden, where)
    return found


@cache
def rules_of(
    checkpoint: Path, base: Path | None = None
) -> frozenset[tuple[str, str | None, Severity]]:
    """Return rule, tensor and severity of everything that validate finds."""
    options = ValidationOptions(base=None if base is None else open_checkpoint(base))
    result = validate(open_checkpoint(checkpoint), options)
    return frozenset((found.rule, found.tensor, found.severity) for found in result.findings)


def plant(source: Path, target: Path, fault: str, seed: int = 0) -> Injection:
    planted = inject(source, target, fault, seed=seed)
    assert planted.changes
    assert planted.files_changed
    return planted


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_the_rules_of_the_catalogue_find_it_and_no_other_error(
    source: Path, tmp_path: Path, fault: str
) -> None:
    entry = CHECKPOINT_FAULTS[fault]
    before = files(source)
    plant(source, tmp_path / "planted", fault)
    assert files(source) == before
    fired = rules_of(tmp_path / "planted") - rules_of(source)
    assert {rule for rule, _, _ in fired} >= set(entry.found_by)
    errors = {rule for rule, _, severity in fired if severity is Severity.ERROR}
    assert errors <= {*entry.found_by, *entry.also}


@pytest.mark.parametrize(
    "fault", [f for f in CHECKPOINT_FAULTS if CHECKPOINT_FAULTS[f].found_with_base]
)
def test_the_audit_finds_it_and_no_other_error(
    source: Path, golden: SimpleNamespace, tmp_path: Path, fault: str
) -> None:
    entry = CHECKPOINT_FAULTS[fault]
    plant(source, tmp_path / "planted", fault)
    bases = {golden.ct: golden.ct.parent / "bf16", golden.nvfp4: golden.fp8}
    base = bases[source] if source in bases else source.parent / "fp8"
    fired = rules_of(tmp_path / "planted", base) - rules_of(source, base)
    assert {rule for rule, _, _ in fired} & set(entry.found_with_base)
    errors = {rule for rule, _, severity in fired if severity is Severity.ERROR}
    assert errors <= {*entry.found_by, *entry.found_with_base, *entry.also}


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_the_same_seed_plants_the_same_bytes(source: Path, tmp_path: Path, fault: str) -> None:
    first = plant(source, tmp_path / "first", fault, seed=7)
    second = plant(source, tmp_path / "second", fault, seed=7)
    assert first.changes == second.changes
    assert files(tmp_path / "first") == files(tmp_path / "second")
    assert files(tmp_path / "first") != files(source)


@pytest.mark.parametrize("entry", CHECKPOINT_FAULTS.values(), ids=CHECKPOINT_FAULTS)
def test_an_entry_says_what_it_does_and_who_finds_it(entry: CheckpointFault) -> None:
    assert re.fullmatch(r"F\d{1,2}[a-k]\d?", entry.id)
    assert re.fullmatch(r"[a-z0-9-]+", entry.name)
    assert entry.does.endswith(".")
    assert entry.found_by or entry.found_with_base or entry.remark
    assert {*entry.found_by, *entry.found_with_base, *entry.also} <= RULES.keys()
    for url in entry.threads:
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(pull|issues)/\d+", url)


def test_names_are_told_apart() -> None:
    assert len({entry.name for entry in CHECKPOINT_FAULTS.values()}) == len(CHECKPOINT_FAULTS)


def test_swizzled_scales_are_seen_without_a_base_where_rows_differ(
    narrow: Path, tmp_path: Path
) -> None:
    inject(narrow, tmp_path / "out", "F9a", tensor="*.mlp.gate_proj")
    assert {rule for rule, _, _ in rules_of(tmp_path / "out") - rules_of(narrow)} == {"NV206"}
