import os
import pickle
from pathlib import Path

import pytest

from nvfp4check.checkpoint.locations import open_storage
from nvfp4check.checkpoint.storage import LocalStorage, StorageError, unsafe_name
from nvfp4check.findings import CheckError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with two files and a folder, beside a file that is none of its business."""
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (inside / "a.safetensors").write_bytes(bytes(range(100)))
    (inside / "sub" / "b.json").write_bytes(b"{}")
    (tmp_path / "secret").write_bytes(b"secret")
    return inside


def test_files_are_listed_with_their_sizes_and_folders(directory: Path) -> None:
    assert LocalStorage(directory).list() == {"a.safetensors": 100, "sub/b.json": 2}


def test_an_empty_path_is_no_checkpoint_though_it_would_open_this_directory() -> None:
    with pytest.raises(CheckError, match="an empty path names no checkpoint"):
        open_storage("")


def test_a_range_is_read_and_mapped_alike(directory: Path) -> None:
    storage = LocalStorage(directory)
    view = storage.view("a.safetensors")
    assert view is not None
    assert storage.read("a.safetensors", 10, 20) == bytes(range(10, 20)) == bytes(view[10:20])
    assert view.readonly


def test_an_empty_file_maps_to_no_bytes(directory: Path) -> None:
    (directory / "empty").touch()
    view = LocalStorage(directory).view("empty")
    assert view is not None
    assert bytes(view) == b""


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, 101), (200, 300)])
def test_a_range_outside_the_file_is_an_error(directory: Path, start: int, stop: int) -> None:
    with pytest.raises(StorageError, match="the file has 100 bytes"):
        LocalStorage(directory).read("a.safetensors", start, stop)


def test_a_file_that_shrank_after_listing_is_an_error_not_short_data(directory: Path) -> None:
    storage = LocalStorage(directory)
    storage.list()
    os.truncate(directory / "a.safetensors", 50)
    with pytest.raises(StorageError, match="ends after 50 bytes, expected 80"):
        storage.read("a.safetensors", 0, 80)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../secret",
        "sub/../../secret",
        "a\0b",
        "a\\b",
        "C:x",
        "./a",
        "a//b",
        "..",
    ],
)
def test_a_name_that_is_no_plain_relative_path_is_unsafe_and_never_opened(
    directory: Path, name: str
) -> None:
    assert unsafe_name(name) is not None
    storage = LocalStorage(directory)
    with pytest.raises(StorageError, match="not opened"):
        storage.read(name, 0, 1)
    with pytest.raises(StorageError, match="not opened"):
        storage.view(name)


@pytest.mark.parametrize("name", ["a.safetensors", "sub/b.json", "..a", "a..b", "~a"])
def test_a_plain_relative_path_is_safe(name: str) -> None:
    assert unsafe_name(name) is None


def test_a_link_that_leads_out_is_unsafe_and_never_opened(directory: Path) -> None:
    (directory / "link.safetensors").symlink_to("../secret")
    (directory / "folder").symlink_to("..")
    storage = LocalStorage(directory)
    assert storage.unsafe.keys() == {"link.safetensors", "folder"}
    assert "leads out of the checkpoint" in storage.unsafe["link.safetensors"]
    assert "link.safetensors" not in storage.list()
    assert not any(name.startswith("folder") for name in storage.list())
    with pytest.raises(StorageError, match="not opened"):
        storage.read("link.safetensors", 0, 1)


def test_a_link_that_stays_inside_is_followed(directory: Path) -> None:
    (directory / "link.safetensors").symlink_to("a.safetensors")
    assert LocalStorage(directory).read("link.safetensors", 1, 3) == b"\x01\x02"


def test_a_link_in_a_circle_is_no_hang(directory: Path) -> None:
    (directory / "x").symlink_to("y")
    (directory / "y").symlink_to("x")
    assert LocalStorage(directory).list() == {"a.safetensors": 100, "sub/b.json": 2}


def test_a_hub_cache_snapshot_may_link_to_its_blobs_and_nowhere_else(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    (blobs / "sha").write_bytes(b"blob")
    (tmp_path / "other").write_bytes(b"other")
    (snapshot / "model.safetensors").symlink_to("../../blobs/sha")
    (snapshot / "evil.safetensors").symlink_to("../../../other")
    storage = LocalStorage(snapshot)
    assert storage.read("model.safetensors", 0, 4) == b"blob"
    assert storage.unsafe.keys() == {"evil.safetensors"}


def test_a_blob_that_was_not_downloaded_is_a_missing_file(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--name" / "blobs").mkdir()
    (snapshot / "model.safetensors").symlink_to("../../blobs/sha")
    storage = LocalStorage(snapshot)
    assert storage.list() == {}
    assert storage.unsafe == {}


def test_a_name_that_is_not_utf8_is_unsafe(directory: Path) -> None:
    Path(os.fsdecode(os.fsencode(directory) + b"/\xff.safetensors")).touch()
    assert LocalStorage(directory).unsafe == {"\\udcff.safetensors": "name is not valid UTF-8"}


def test_a_pipe_is_no_file_and_is_never_opened(directory: Path) -> None:
    os.mkfifo(directory / "pipe.safetensors")
    assert "pipe.safetensors" not in LocalStorage(directory).list()


def test_hidden_folders_hold_no_part_of_a_checkpoint(directory: Path) -> None:
    (directory / ".git").mkdir()
    (directory / ".git" / "x.safetensors").touch()
    assert ".git/x.safetensors" not in LocalStorage(directory).list()


def test_a_storage_with_mapped_files_travels_to_another_process(directory: Path) -> None:
    storage = LocalStorage(directory)
    storage.view("a.safetensors")
    again = pickle.loads(pickle.dumps(storage))
    assert again.read("a.safetensors", 3, 5) == b"\x03\x04"


def test_no_directory_a_file_and_an_unknown_url_are_said_to_be_so(directory: Path) -> None:
    with pytest.raises(CheckError, match="no such directory"):
        open_storage(directory / "nowhere")
    with pytest.raises(CheckError, match="is a file, expected a directory"):
        open_storage(directory / "a.safetensors")
    with pytest.raises(CheckError, match="gopher://host/x"):
        open_storage("gopher://host/x")
