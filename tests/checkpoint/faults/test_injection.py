import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvfp4check.checkpoint.faults.injection import inject
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.findings import CheckError


def test_files_that_stay_are_links_and_those_that_change_are_not(
    golden: SimpleNamespace, tmp_path: Path
) -> None:
    planted = inject(golden.nvfp4, tmp_path / "out", "F7a")
    for path in (tmp_path / "out").iterdir():
        linked = os.path.samefile(golden.nvfp4 / path.name, path)
        assert linked == (path.name not in planted.files_changed)
    assert len(planted.files_changed) == 1
    assert planted.files_linked == len(list(golden.nvfp4.iterdir())) - 1


def test_the_told_bytes_are_exactly_those_that_changed(
    golden: SimpleNamespace, tmp_path: Path
) -> None:
    (change,) = inject(golden.nvfp4, tmp_path / "out", "F1a", seed=3).changes
    before = np.fromfile(golden.nvfp4 / change.file, np.uint8)
    after = np.fromfile(tmp_path / "out" / change.file, np.uint8)
    different = np.flatnonzero(before != after)
    assert different.size == change.count
    assert (different[0], different[-1]) == (change.first, change.last)
    assert change.tensor is not None
    entry = open_checkpoint(golden.nvfp4).tensors[change.tensor]
    assert entry.start <= different[0] <= different[-1] < entry.stop


@pytest.mark.parametrize(
    "pattern",
    [
        "model.layers.2.mlp.experts.5.down_proj",
        "model.layers.2.mlp.experts.5.down_proj.weight",
        "*.2.mlp.experts.5.down_proj.weight_scale",
    ],
)
def test_a_pattern_chooses_the_weight_by_any_of_its_names(
    golden: SimpleNamespace, tmp_path: Path, pattern: str
) -> None:
    (change,) = inject(golden.nvfp4, tmp_path / "out", "F1a", tensor=pattern).changes
    assert change.tensor == "model.layers.2.mlp.experts.5.down_proj.weight"


def test_a_fault_is_found_by_its_name_in_any_case(golden: SimpleNamespace, tmp_path: Path) -> None:
    assert inject(golden.nvfp4, tmp_path / "a", "Dead-Block").fault.id == "F4d"
    assert inject(golden.nvfp4, tmp_path / "b", "f4D").fault.id == "F4d"


def test_another_seed_plants_elsewhere(golden: SimpleNamespace, tmp_path: Path) -> None:
    tensors = {
        inject(golden.nvfp4, tmp_path / str(seed), "F1a", seed=seed).changes[0].tensor
        for seed in range(5)
    }
    assert len(tensors) > 1


def test_an_existing_target_is_refused_and_left_alone(
    golden: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("keep")
    with pytest.raises(CheckError, match="exists; a fault is planted in a new directory"):
        inject(golden.nvfp4, tmp_path, "F1a")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_target_inside_the_original_is_refused(golden: SimpleNamespace) -> None:
    with pytest.raises(CheckError, match="lies inside"):
        inject(golden.nvfp4, golden.nvfp4 / "out", "F1a")


def test_what_cannot_be_planted_leaves_nothing_behind(
    golden: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(CheckError, match="has no NVFP4 weight that --tensor nothing fits"):
        inject(golden.nvfp4, tmp_path / "out", "F1a", tensor="nothing")
    with pytest.raises(CheckError, match="has no NVFP4 weight"):
        inject(golden.bf16, tmp_path / "out", "F1a")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_fault_is_met_with_those_near(golden: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="Did you mean F9a, F9b, F9c, F9d, F9e"):
        inject(golden.nvfp4, tmp_path / "out", "F9")


def test_a_url_is_no_original(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="no local directory"):
        inject("hf://org/name", tmp_path / "out", "F1a")


def test_a_copy_of_a_copy_reaches_neither(golden: SimpleNamespace, tmp_path: Path) -> None:
    first = inject(golden.nvfp4, tmp_path / "first", "F1a", seed=1)
    name = first.files_changed[0]
    before = (tmp_path / "first" / name).read_bytes()
    inject(tmp_path / "first", tmp_path / "second", "F1b", seed=1)
    assert (tmp_path / "first" / name).read_bytes() == before


def test_a_hub_cache_of_links_is_copied_through_its_links(
    golden: SimpleNamespace, tmp_path: Path
) -> None:
    snapshot, blobs = tmp_path / "models--o--n/snapshots/rev", tmp_path / "models--o--n/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(golden.nvfp4.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    planted = inject(snapshot, tmp_path / "out", "F7a")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    name = planted.files_changed[0]
    assert (snapshot / name).read_bytes() == (golden.nvfp4 / name).read_bytes()
    assert (tmp_path / "out" / name).read_bytes() != (golden.nvfp4 / name).read_bytes()
    assert planted.files_linked == len(list(golden.nvfp4.iterdir())) - 1


def test_holes_stay_holes_in_the_copy(tmp_path: Path) -> None:
    from nvfp4check.checkpoint.editing import copy_file

    with (tmp_path / "sparse").open("wb") as file:
        file.seek(3 << 20)
        file.write(b"data")
        file.truncate(64 << 20)
    copy_file(tmp_path / "sparse", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "sparse").read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20
