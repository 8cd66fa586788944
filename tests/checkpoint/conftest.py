"""Golden checkpoints, and copies of them to plant faults in."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvfp4check.checkpoint.editing import CheckpointEditor, copy_checkpoint
from nvfp4check.checkpoint.header import read_header
from nvfp4check.checkpoint.storage import LocalStorage

GOLDENS = Path(__file__).parents[2] / "goldens"


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of all goldens."""
    return GOLDENS


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Directories of the golden checkpoints: bf16, fp8, nvfp4, nvfp4_raw, ct. Never write there."""
    tiny = GOLDENS / "tiny-deepseek-v3"
    raw = tmp_path_factory.mktemp("goldens") / "nvfp4-raw"
    raw.mkdir()
    for folder in (tiny / "nvfp4", tiny / "nvfp4-raw"):
        for file in folder.iterdir():
            (raw / file.name).write_bytes(file.read_bytes())
    return SimpleNamespace(
        bf16=tiny / "bf16",
        fp8=tiny / "fp8",
        nvfp4=tiny / "nvfp4",
        nvfp4_raw=raw,
        ct=GOLDENS / "small-deepseek-v3" / "compressed-tensors",
    )


@pytest.fixture
def clone_of(tmp_path: Path) -> Callable[[Path], CheckpointEditor]:
    """Copy a checkpoint and open the copy for editing: `clone_of(golden.fp8)`."""

    def clone(source: Path) -> CheckpointEditor:
        return copy_checkpoint(source, tmp_path / "checkpoint")

    return clone


@pytest.fixture
def clone(
    golden: SimpleNamespace, clone_of: Callable[[Path], CheckpointEditor]
) -> CheckpointEditor:
    """A copy of the NVFP4 golden to plant a fault in: `clone.raw(name)[0, 0] = 0x7F`."""
    return clone_of(golden.nvfp4)


@pytest.fixture
def headers_only(tmp_path: Path) -> Callable[[str], Path]:
    """Build the checkpoint of a golden header: its real headers before data of zeros."""

    def build(name: str) -> Path:
        target = tmp_path / name
        target.mkdir()
        for file in (GOLDENS / "headers" / name).iterdir():
            if file.suffix == ".header":
                _extend(file, target / file.stem)
            else:
                (target / file.name).write_bytes(file.read_bytes())
        return target

    return build


def _extend(header: Path, target: Path) -> None:
    raw = header.read_bytes()
    entries = json.loads(raw[8:])
    entries.pop("__metadata__", None)
    target.write_bytes(raw)
    with target.open("r+b") as file:
        file.truncate(len(raw) + max(entry["data_offsets"][1] for entry in entries.values()))
    read_header(LocalStorage(target.parent), target.name)
