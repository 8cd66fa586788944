import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from nvfp4check.checkpoint.header import read_header
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.remote import FsspecStorage, HttpStorage, Retry
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.findings import CheckError

SHARD = "model-00001-of-000002.safetensors"


class RangeServer(ThreadingHTTPServer):
    """Serves one directory by ranges, counts what it sends, and misbehaves on demand."""

    directory: Path
    sent: int
    #: Answers to give before the true one: a status, "short", "whole" or "shifted".
    faults: list[int | str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: RangeServer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = self.server.directory / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        data = path.read_bytes()
        part = data[int(first) : int(last) + 1]
        # The first byte is asked for to learn a size; faults are kept for the reads.
        fault = self.server.faults.pop(0) if self.server.faults and last != "0" else None
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Retry-After", "7")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200 if fault == "whole" else 206)
        begin = int(first) + (fault == "shifted")
        self.send_header("Content-Range", f"bytes {begin}-{last}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[:-1] if fault == "short" else part)
        self.server.sent += len(part)


@pytest.fixture
def server(golden: SimpleNamespace) -> Iterator[RangeServer]:
    """A loopback server of the NVFP4 golden."""
    with RangeServer(("127.0.0.1", 0), Handler) as server:
        server.directory, server.sent, server.faults = golden.nvfp4, 0, []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def patient(delays: list[float], attempts: int = 4) -> Retry:
    return Retry(attempts=attempts, first_delay=1.0, sleep=delays.append)


def test_a_checkpoint_behind_a_web_server_is_the_local_one(
    server: RangeServer, golden: SimpleNamespace
) -> None:
    remote, local = open_checkpoint(server.url), open_checkpoint(golden.nvfp4)
    assert remote.tensors == local.tensors
    assert remote.quantization == local.quantization
    assert remote.json_problems == []
    entry = remote.tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale"]
    assert remote.tensor_bytes(entry).tobytes() == local.tensor_bytes(entry).tobytes()


def test_opening_downloads_headers_and_json_only(server: RangeServer) -> None:
    checkpoint = open_checkpoint(server.url)
    headers = sum(header.data_start for header in checkpoint.shards.values())
    json = sum(size for name, size in checkpoint.files.items() if name.endswith(".json"))
    assert server.sent <= headers + json + len(checkpoint.files)
    assert server.sent < checkpoint.nbytes / 10


@pytest.mark.parametrize("fault", [429, 500, 503, "short"])
def test_a_passing_failure_is_tried_again_with_growing_delays(
    server: RangeServer, golden: SimpleNamespace, fault: int | str
) -> None:
    delays: list[float] = []
    server.faults = [fault, fault]
    storage = HttpStorage(server.url, patient(delays))
    assert storage.read(SHARD, 5, 500) == (golden.nvfp4 / SHARD).read_bytes()[5:500]
    assert delays == ([1.0, 2.0] if fault == "short" else [7.0, 7.0])


def test_a_failure_that_stays_is_an_error_with_its_reason(server: RangeServer) -> None:
    server.faults = [503] * 9
    with pytest.raises(StorageError, match="status 503, after 4 attempts"):
        HttpStorage(server.url, patient([])).read(SHARD, 0, 100)


def test_short_bodies_that_stay_short_are_an_error(server: RangeServer) -> None:
    server.faults = ["short"] * 9
    with pytest.raises(StorageError, match=r"after 4 attempts"):
        HttpStorage(server.url, patient([])).read(SHARD, 0, 100)


def test_a_server_that_ignores_ranges_is_refused(server: RangeServer) -> None:
    server.faults = ["whole"]
    with pytest.raises(StorageError, match="with the whole file"):
        HttpStorage(server.url, patient([])).read(SHARD, 0, 100)


def test_bytes_of_another_place_are_refused(server: RangeServer) -> None:
    server.faults = ["shifted"]
    with pytest.raises(StorageError, match="expected it to begin at 10"):
        HttpStorage(server.url, patient([])).read(SHARD, 10, 100)


@pytest.mark.parametrize("status", [401, 403, 418])
def test_a_refusal_is_not_tried_again(server: RangeServer, status: int) -> None:
    delays: list[float] = []
    server.faults = [status]
    with pytest.raises(StorageError, match=f"status {status}"):
        HttpStorage(server.url, patient(delays)).read(SHARD, 0, 100)
    assert delays == []


def test_a_name_that_leads_out_is_not_asked_for(server: RangeServer) -> None:
    with pytest.raises(StorageError, match="not opened"):
        HttpStorage(server.url).read("../config.json", 0, 1)
    assert server.sent == 0


def test_a_url_with_nothing_behind_it_is_said_to_be_empty(
    server: RangeServer, tmp_path: Path
) -> None:
    server.directory = tmp_path
    with pytest.raises(CheckError, match=r"none of config\.json"):
        open_checkpoint(server.url)


def test_a_server_that_is_not_there_is_an_error(server: RangeServer) -> None:
    port = server.server_port
    server.server_close()
    with pytest.raises(CheckError, match="no answer"):
        HttpStorage(f"http://127.0.0.1:{port}", patient([], attempts=2)).list()


@pytest.fixture
def in_memory(golden: SimpleNamespace) -> Iterator[str]:
    """The NVFP4 golden in fsspec's memory file system."""
    system = fsspec.filesystem("memory")
    for path in golden.nvfp4.iterdir():
        system.pipe_file(f"/golden/{path.name}", path.read_bytes())
    yield "memory://golden"
    system.rm("/golden", recursive=True)


def test_a_checkpoint_that_fsspec_opens_is_the_local_one(
    in_memory: str, golden: SimpleNamespace
) -> None:
    remote, local = open_checkpoint(in_memory), open_checkpoint(golden.nvfp4)
    assert remote.tensors == local.tensors
    assert remote.files == local.files
    entry = remote.tensors["model.norm.weight"]
    assert remote.tensor_bytes(entry).tobytes() == local.tensor_bytes(entry).tobytes()


def test_a_file_that_shrank_is_an_error_and_no_short_data(in_memory: str) -> None:
    storage = FsspecStorage(in_memory, patient([]))
    header = read_header(storage, SHARD)
    fsspec.filesystem("memory").pipe_file(f"/golden/{SHARD}", b"short")
    with pytest.raises(StorageError, match="5 bytes came, expected"):
        storage.read(SHARD, 0, header.file_size)


def test_a_url_with_nothing_in_it_and_an_unknown_one_are_said_to_be_so() -> None:
    with pytest.raises(CheckError, match="memory://nowhere"):
        open_checkpoint("memory://nowhere")
    with pytest.raises(CheckError, match="gopher://host/x: cannot be opened"):
        open_checkpoint("gopher://host/x")


def test_a_hub_that_cannot_be_reached_is_an_error_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_file_system.constants.ENDPOINT", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    with pytest.raises(CheckError, match="hf://org/name"):
        open_checkpoint("hf://org/name@main")
    with pytest.raises(CheckError, match="hf://onlyname"):
        open_checkpoint("hf://onlyname")
