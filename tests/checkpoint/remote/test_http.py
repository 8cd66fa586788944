import pickle
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvfp4check.checkpoint.connections import Timeouts
from nvfp4check.checkpoint.documents import MAX_JSON_BYTES, read_json
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.patience import Patience, Retry
from nvfp4check.checkpoint.remote_http import HttpStorage
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.findings import CheckError

SHARD = "model-00001-of-000002.safetensors"
CONFIG = "config.json"


def patient(delays: list[float], attempts: int = 4) -> Retry:
    """Patience that notes its waits and takes no time for them; nothing is left to chance."""
    return Retry(
        attempts=attempts,
        wait=lambda over, seconds: delays.append(seconds),
        clock=lambda: sum(delays),
        chance=lambda: 1.0,
    )


def opened(server: SimpleNamespace, delays: list[float] | None = None) -> HttpStorage:
    """A storage whose sizes are known, so that faults hit reads."""
    storage = HttpStorage(server.url, patient([] if delays is None else delays))
    storage.list()
    return storage


def test_a_checkpoint_behind_a_web_server_is_the_local_one(
    server: SimpleNamespace, golden: SimpleNamespace
) -> None:
    remote, local = open_checkpoint(server.url), open_checkpoint(golden.nvfp4)
    assert remote.tensors == local.tensors
    assert remote.quantization == local.quantization
    assert remote.json_problems == []
    entry = remote.tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale"]
    assert remote.tensor_bytes(entry).tobytes() == local.tensor_bytes(entry).tobytes()


def test_opening_downloads_headers_and_json_only(server: SimpleNamespace) -> None:
    checkpoint = open_checkpoint(server.url)
    headers = sum(header.data_start for header in checkpoint.shards.values())
    json = sum(size for name, size in checkpoint.files.items() if name.endswith(".json"))
    assert server.sent <= headers + json + len(checkpoint.files)
    assert server.sent < checkpoint.nbytes / 10


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_given_the_time_it_asks_for(
    server: SimpleNamespace, golden: SimpleNamespace, fault: int
) -> None:
    delays: list[float] = []
    storage = opened(server, delays)
    server.faults = [fault, fault]
    assert storage.read(SHARD, 5, 500) == (golden.nvfp4 / SHARD).read_bytes()[5:500]
    assert delays == [7.0 + 1.0, 7.0 + 2.0]


def test_a_date_to_come_back_at_is_understood(server: SimpleNamespace) -> None:
    delays: list[float] = []
    storage = opened(server, delays)
    server.faults = ["date"]
    storage.read(SHARD, 5, 500)
    assert len(delays) == 1
    assert 1 < delays[0] <= 51  # a busy machine may take its time


@pytest.mark.parametrize("fault", ["dropped", "short", "long", "hung up"])
def test_an_answer_that_breaks_off_or_has_the_wrong_length_is_asked_for_again(
    server: SimpleNamespace, golden: SimpleNamespace, fault: str
) -> None:
    delays: list[float] = []
    storage = opened(server, delays)
    server.faults = [fault, fault]
    assert storage.read(SHARD, 5, 5000) == (golden.nvfp4 / SHARD).read_bytes()[5:5000]
    assert delays == [1.0, 2.0]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (503, "status 503, after 4 attempts"),
        ("dropped", "broke off: .*after 4 attempts"),
        ("short", "Content-Length is 94, expected 95, after 4 attempts; run again later"),
        ("long", "Content-Length is 100095, expected 95, after 4 attempts"),
    ],
)
def test_a_failure_that_stays_is_an_error_with_its_reason(
    server: SimpleNamespace, fault: int | str, why: str
) -> None:
    storage = opened(server)
    server.faults = [fault] * 9
    with pytest.raises(CheckError, match=why):
        storage.read(SHARD, 5, 100)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("whole", "answered a range request with the whole file"),
        ("shifted", "expected it to begin at 10 and end at 99"),
        ("no range", "expected it to begin at 10"),
        ("grown", "bytes, and had [0-9,]+ before"),
        ("gzip", "came as 'gzip'"),
        (401, "status 401; it needs a login"),
        (403, "status 403; it needs a login"),
        (418, "status 418, expected 206"),
    ],
)
def test_a_server_that_cannot_be_relied_on_is_not_tried_again(
    server: SimpleNamespace, fault: int | str, why: str
) -> None:
    delays: list[float] = []
    storage = opened(server, delays)
    server.faults = [fault]
    with pytest.raises(CheckError, match=why):
        storage.read(SHARD, 10, 100)
    assert delays == []


def test_a_whole_file_in_place_of_a_range_is_not_downloaded(
    serve: Callable[[Path], SimpleNamespace], tmp_path: Path
) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(200 << 20)
    server = serve(tmp_path)
    storage = opened(server)
    server.faults = ["whole"]
    with pytest.raises(CheckError, match="download the checkpoint instead"):
        storage.read("model.safetensors", 10, 100)
    assert server.hung_up.wait(600)  # no machine's sockets hold so much


def test_a_server_without_ranges_is_refused_when_opening(server: SimpleNamespace) -> None:
    server.faulty = lambda path, span: True
    server.plan = lambda path, span, time: "whole"
    with pytest.raises(CheckError, match="with the whole file"):
        open_checkpoint(server.url)


def test_a_file_that_another_one_replaces_is_noticed(server: SimpleNamespace) -> None:
    storage = opened(server)
    storage.read(SHARD, 0, 8)
    server.etags[SHARD] = '"another"'
    with pytest.raises(CheckError, match="another file by now"):
        storage.read(SHARD, 8, 16)
    server.etags[SHARD] = 'W/"weak"'
    storage.read(SHARD, 8, 16)
    assert storage.version(SHARD).startswith('"')


def test_a_file_that_is_gone_is_the_fault_of_the_checkpoint(
    serve: Callable[[Path], SimpleNamespace], tmp_path: Path
) -> None:
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    storage = opened(serve(tmp_path))
    assert storage.list() == {CONFIG: 2, "model.safetensors": 0}
    (tmp_path / CONFIG).unlink()
    with pytest.raises(StorageError, match="not there"):
        storage.read(CONFIG, 0, 2)
    with pytest.raises(StorageError, match="the file has 0 bytes"):
        storage.read("model.safetensors", 0, 8)
    (tmp_path / CONFIG).write_text("")
    with pytest.raises(StorageError, match="is empty, expected 2 bytes"):
        storage.read(CONFIG, 0, 2)


def test_a_long_read_is_several_requests_and_one_of_them_may_fail(
    serve: Callable[[Path], SimpleNamespace], tmp_path: Path
) -> None:
    data = np.arange(5 << 20, dtype="<u4").tobytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    server = serve(tmp_path)
    storage = opened(server)
    server.plan = lambda path, span, time: "dropped" if (span[6], time) == ("3", 0) else None
    assert storage.read("model.safetensors", 3, len(data) - 3) == data[3:-3]
    spans = [headers["Range"] for _, headers in server.requests]
    assert len([span for span in spans if span != "bytes=0-0"]) == 3 + 1


def test_small_ranges_are_gathered_in_few_requests(
    server: SimpleNamespace, golden: SimpleNamespace
) -> None:
    storage = opened(server)
    before = len(server.requests)
    ranges = [(start, start + 4) for start in range(400, 4000, 40)]
    storage.gather(SHARD, ranges)
    storage.gather(SHARD, ranges)
    data = (golden.nvfp4 / SHARD).read_bytes()
    assert [storage.read(SHARD, *part) for part in ranges] == [data[a:b] for a, b in ranges]
    assert len(server.requests) == before + 1


def test_the_scalars_of_a_shard_come_together(server: SimpleNamespace) -> None:
    checkpoint = open_checkpoint(server.url)
    scalars = [entry for entry in checkpoint.tensors.values() if entry.nbytes == 4]
    before = len(server.requests)
    local = open_checkpoint(server.directory)
    assert [checkpoint.scalar(entry) for entry in scalars] == [
        local.scalar(local.tensors[entry.name]) for entry in scalars
    ]
    assert len(scalars) > 20
    assert len(server.requests) - before <= len(checkpoint.shards)


def test_connections_are_used_again(server: SimpleNamespace) -> None:
    storage = opened(server)
    accepted: list[object] = []
    process = server.process_request
    server.process_request = lambda *args: (accepted.append(args), process(*args))
    for start in range(20):
        storage.read(SHARD, start, start + 100)
    assert len(accepted) <= 1


def test_a_server_that_trickles_is_given_up(
    server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = opened(server)
    # A minute passes from each look at the clock to the next.
    clock = SimpleNamespace(monotonic=count(step=60.0).__next__)
    monkeypatch.setattr("nvfp4check.checkpoint.connections.time", clock)
    storage._patience = Patience(patient([], attempts=1))
    server.faults = ["slow"]
    with pytest.raises(CheckError, match="500 of 1,000 bytes came in time: too slow"):
        storage.read(SHARD, 0, 1000)


def test_a_server_that_does_not_answer_is_given_up(server: SimpleNamespace) -> None:
    storage = HttpStorage(server.url, patient([], attempts=2), Timeouts(read=0.2))
    storage._files = opened(server).list()
    server.faults = ["silent", "silent"]
    with pytest.raises(CheckError, match=r"timed out.*after 2 attempts"):
        storage.read(SHARD, 0, 1000)


def test_a_server_that_is_not_there_is_tried_once_more_alone(closed_port: int) -> None:
    delays: list[float] = []
    with pytest.raises(CheckError, match=r"no answer: .*after 2 attempts; check the spelling"):
        HttpStorage(f"http://127.0.0.1:{closed_port}", patient(delays)).list()
    assert set(delays) == {1.0}  # of the files that were asked for, side by side


def test_a_host_that_nobody_knows_is_tried_once_more_alone(nowhere: str) -> None:
    delays: list[float] = []
    with pytest.raises(CheckError, match=r"no answer: .*after 2 attempts; check the spelling"):
        HttpStorage(f"http://{nowhere}", patient(delays)).list()
    assert set(delays) == {1.0}


def test_a_server_that_was_there_is_waited_for(server: SimpleNamespace, closed_port: int) -> None:
    delays: list[float] = []
    storage = opened(server, delays)
    storage._location = f"http://127.0.0.1:{closed_port}"
    with pytest.raises(CheckError, match=r"no answer.*after 4 attempts; run again later"):
        storage.read(SHARD, 0, 100)
    assert delays == [1.0, 2.0, 4.0]


def test_files_asked_for_side_by_side_are_given_up_together(server: SimpleNamespace) -> None:
    woken: list[bool] = []
    retry = Retry(wait=lambda over, seconds: woken.append(over.wait(60)))
    server.faulty = lambda path, span: True
    server.retry_after = [""] * 99  # else the one that is refused may wait like the others
    # A file late in the order, so that those before it wait.
    server.plan = lambda path, span, time: 403 if path == "/tokenizer_config.json" else 503
    with pytest.raises(CheckError, match="status 403"):
        HttpStorage(server.url, retry).list()
    assert all(woken)
    assert max(server.asked.values()) == 1


def test_a_document_beyond_the_limit_is_not_downloaded(
    serve: Callable[[Path], SimpleNamespace], tmp_path: Path
) -> None:
    with (tmp_path / CONFIG).open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    server = serve(tmp_path)
    document, problems = read_json(opened(server), CONFIG)
    assert document is None
    assert "expected at most 100,000,000" in problems[0]
    assert server.sent < 1000


def test_a_listing_that_failed_is_made_again(server: SimpleNamespace) -> None:
    storage = HttpStorage(server.url, patient([]))
    server.faulty = lambda path, span: SHARD in path
    server.plan = lambda path, span, time: 403 if time == 0 else None
    with pytest.raises(CheckError, match="status 403"):
        storage.list()
    assert SHARD in storage.list()


def test_headers_of_any_form_are_an_error_and_no_traceback(server: SimpleNamespace) -> None:
    storage = opened(server)
    server.retry_after = ["Thu, 01 Jan 0001 00:00:00 GMT", "soon", "-1", "", "9" * 400]
    server.faults = [429] * 4
    storage._patience = Patience(patient([], attempts=9))
    storage.read(SHARD, 0, 100)
    server.faults = [429]
    with pytest.raises(CheckError, match="429, and asks to wait for 999,999,999 seconds; run"):
        storage.read(SHARD, 0, 100)
    server.faults = ["endless range"]
    with pytest.raises(CheckError, match="Content-Range is 'bytes 0-99/9999"):
        storage.read(SHARD, 0, 100)


def test_a_url_with_nothing_behind_it_is_said_to_be_empty(
    serve: Callable[[Path], SimpleNamespace], tmp_path: Path
) -> None:
    with pytest.raises(CheckError, match=r"none of config\.json"):
        open_checkpoint(serve(tmp_path).url)


def test_an_index_of_countless_shards_is_refused(
    serve: Callable[[Path], SimpleNamespace], tmp_path: Path
) -> None:
    index = ", ".join(f'"{place}": "{place}.safetensors"' for place in range(10_001))
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    server = serve(tmp_path)
    with pytest.raises(CheckError, match="names 10,001 shards"):
        open_checkpoint(server.url)
    assert len(server.requests) < 20


def test_a_storage_travels_to_another_process_without_its_connections(
    server: SimpleNamespace, golden: SimpleNamespace
) -> None:
    storage = HttpStorage(server.url)
    storage.read(CONFIG, 0, storage.list()[CONFIG])
    assert storage._connections.managers
    travelled = pickle.loads(pickle.dumps(storage))
    assert travelled._connections.managers == {}
    assert travelled.read(SHARD, 0, 8) == (golden.nvfp4 / SHARD).read_bytes()[:8]
