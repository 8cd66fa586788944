import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvfp4check.checkpoint.faults import CHECKPOINT_FAULTS

Run = Callable[..., Any]
NVFP4 = str(Path(__file__).parents[2] / "goldens/tiny-deepseek-v3/nvfp4")


def test_every_fault_is_listed(run: Run) -> None:
    ran = run("faults", "list")
    assert ran.code == 0
    listed = re.findall(r"^(F\w+) +([a-z0-9-]+)", ran.out, re.MULTILINE)
    assert listed == [(f.id, f.name) for f in CHECKPOINT_FAULTS.values()]


@pytest.mark.parametrize("identifier", CHECKPOINT_FAULTS)
def test_a_fault_is_explained_with_its_threads(run: Run, identifier: str) -> None:
    fault = CHECKPOINT_FAULTS[identifier]
    said = " ".join(run("faults", "list", identifier).out.split())
    assert said.startswith(f"{fault.id} {fault.name} {fault.does}")
    for text in (*fault.found_by, *fault.found_with_base, *fault.threads):
        assert text in said


def test_a_class_names_its_faults_and_not_those_of_another(run: Run) -> None:
    document = json.loads(run("faults", "list", "f1", "--format", "json").out)
    assert document["schema"] == "nvfp4check/faults/1"
    assert [fault["id"] for fault in document["faults"]] == ["F1a", "F1b", "F1c"]


def test_faults_of_kernels_are_listed_when_asked_for(run: Run) -> None:
    both = json.loads(run("faults", "list", "--kind", "all", "--format", "json").out)["faults"]
    kernel = json.loads(run("faults", "list", "--kind", "kernel", "--format", "json").out)["faults"]
    assert {fault["kind"] for fault in kernel} == {"kernel"}
    assert [fault for fault in both if fault["kind"] == "kernel"] == kernel
    assert len(both) - len(kernel) == len(CHECKPOINT_FAULTS)
    assert all(fault["operations"] for fault in kernel)
    text = run("faults", "list", "--kind", "kernel").out
    assert f"{len(kernel)} faults that a kernel can carry" in text
    assert "Found by kernels power" in run("faults", "list", "F2a", "--kind", "kernel").out


def test_an_unknown_class_is_refused(run: Run) -> None:
    ran = run("faults", "list", "F99")
    assert ran.code == 2
    assert "no fault begins with 'F99'" in ran.err


@pytest.mark.parametrize("format", ["text", "markdown", "html"])
def test_what_was_planted_is_told(run: Run, tmp_path: Path, format: str) -> None:
    ran = run(
        "faults", "inject", NVFP4, str(tmp_path / "out"), "--fault", "F8a", "--format", format
    )
    assert ran.code == 0
    for text in ("F8a", "gate-up-global-scales-differ", "global scale times 1.2547"):
        assert text in ran.out.replace("\\", "")


def test_the_json_document_names_tensors_bytes_and_files(run: Run, tmp_path: Path) -> None:
    ran = run(
        "faults", "inject", NVFP4, str(tmp_path / "out"), "--fault", "F4d", "--format", "json"
    )
    document = json.loads(ran.out)
    planted = document["planted"]
    assert document["schema"] == "nvfp4check/faults/1"
    assert document["faults"][0]["found_by"] == ["NV209"]
    assert planted["changes"][0]["count"] == 1
    assert planted["files_changed"] == sorted({change["file"] for change in planted["changes"]})


def test_a_planted_fault_fails_validation_and_the_original_passes(run: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert run("faults", "inject", NVFP4, out, "--fault", "gate-up-global-scales-differ").code == 0
    assert run("validate", NVFP4).code == 0
    ran = run("validate", out)
    assert ran.code == 1
    assert "NV501" in ran.out


def test_an_existing_directory_is_refused(run: Run, tmp_path: Path) -> None:
    ran = run("faults", "inject", NVFP4, str(tmp_path), "--fault", "F1a")
    assert ran.code == 2
    assert "exists" in ran.err
    assert ran.out == ""
