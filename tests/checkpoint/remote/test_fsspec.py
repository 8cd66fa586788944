from collections.abc import Iterator
from types import SimpleNamespace

import fsspec
import pytest

from nvfp4check.checkpoint.header import read_header
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.patience import Retry
from nvfp4check.checkpoint.remote_fsspec import FsspecStorage
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.findings import CheckError

SHARD = "model-00001-of-000002.safetensors"


@pytest.fixture
def in_memory(golden: SimpleNamespace) -> Iterator[str]:
    """The NVFP4 golden in fsspec's memory file system."""
    system = fsspec.filesystem("memory")
    for path in golden.nvfp4.iterdir():
        system.pipe_file(f"/golden/{path.name}", path.read_bytes())
    yield "memory://golden"
    system.rm("/golden", recursive=True)


def hasty(location: str) -> FsspecStorage:
    return FsspecStorage(location, Retry(attempts=3, wait=lambda over, seconds: None))


def test_a_checkpoint_that_fsspec_opens_is_the_local_one(
    in_memory: str, golden: SimpleNamespace
) -> None:
    remote, local = open_checkpoint(in_memory), open_checkpoint(golden.nvfp4)
    assert remote.tensors == local.tensors
    assert remote.files == local.files
    entry = remote.tensors["model.norm.weight"]
    assert remote.tensor_bytes(entry).tobytes() == local.tensor_bytes(entry).tobytes()


def test_a_file_that_shrank_is_an_error_and_no_short_data(in_memory: str) -> None:
    storage = hasty(in_memory)
    header = read_header(storage, SHARD)
    fsspec.filesystem("memory").pipe_file(f"/golden/{SHARD}", b"short")
    with pytest.raises(CheckError, match=r"5 bytes came, expected .*after 3 attempts"):
        storage.read(SHARD, 0, header.file_size)


def test_a_file_that_is_gone_and_one_that_may_not_be_read_are_told_apart(
    in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = hasty(in_memory)
    storage.list()
    system = fsspec.filesystem("memory")
    system.rm(f"/golden/{SHARD}")
    with pytest.raises(StorageError, match="not there"):
        storage.read(SHARD, 0, 8)
    tries: list[str] = []

    def refuse(path: str, *_: object) -> bytes:
        tries.append(path)
        raise PermissionError("denied")

    monkeypatch.setattr(system, "cat_file", refuse)
    with pytest.raises(CheckError, match="denied; check the credentials"):
        storage.read(SHARD, 0, 8)
    assert len(tries) == 1


def test_a_version_is_known_and_changes_with_the_file(in_memory: str) -> None:
    first = hasty(in_memory)
    first.list()
    fsspec.filesystem("memory").pipe_file(f"/golden/{SHARD}", b"another")
    second = hasty(in_memory)
    second.list()
    assert first.version(SHARD)
    assert first.version(SHARD) != second.version(SHARD)


def test_a_url_with_nothing_in_it_and_an_unknown_one_are_said_to_be_so() -> None:
    with pytest.raises(CheckError, match="memory://nowhere"):
        open_checkpoint("memory://nowhere")
    with pytest.raises(CheckError, match="gopher://host/x: cannot be opened"):
        open_checkpoint("gopher://host/x")
