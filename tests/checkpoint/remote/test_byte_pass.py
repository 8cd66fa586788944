"""What is read over a network is found to be what is read from disk."""

import json
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from nvfp4check.checkpoint.ahead import AHEAD_BYTES, PIECE_BYTES, Ahead, FileRange, RangedBytes
from nvfp4check.checkpoint.byte_pass import scannable_weights
from nvfp4check.checkpoint.diff.run import diff_checkpoints
from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.inspection import inspect
from nvfp4check.checkpoint.naming import Part
from nvfp4check.checkpoint.opening import Checkpoint, open_checkpoint
from nvfp4check.checkpoint.patience import Patience, Retry
from nvfp4check.checkpoint.storage import LocalStorage, StorageError
from nvfp4check.checkpoint.validation import ValidationOptions, validate
from nvfp4check.findings import CheckError
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt

SHARD = "model-00001-of-000002.safetensors"
EXPERT = "model.layers.1.mlp.experts.3.up_proj"


def found_in(checkpoint: Checkpoint, **options: object) -> str:
    """The whole document, without the place and the time."""
    document = validate(checkpoint, ValidationOptions(**options)).to_json()  # type: ignore[arg-type]
    document["checkpoint"].pop("location")
    document.pop("seconds")
    return json.dumps(document)


def hasty(location: str) -> Checkpoint:
    checkpoint = open_checkpoint(location)
    hasty = Patience(Retry(wait=lambda over, seconds: None), reached=True)
    checkpoint.storage._patience = hasty  # type: ignore[attr-defined]
    return checkpoint


@pytest.fixture
def damaged(clone: CheckpointEditor) -> Path:
    """A copy with defects of every kind of rule on bytes: blocks, scales, scalars, copies."""
    clone.raw(f"{EXPERT}.weight_scale")[0, 0] = 0x7F
    clone.raw(f"{EXPERT}.weight_scale")[2, 1] = 0x00
    clone.set_scalar(f"{EXPERT}.weight_scale_2", 0.0)
    clone.raw("model.layers.1.mlp.experts.2.up_proj.weight")[:] = 0
    return Path(clone.path)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_damaged_checkpoint_has_the_same_findings_over_http(
    serve: Callable[[Path], SimpleNamespace],
    damaged: Path,
    jobs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nvfp4check.checkpoint.byte_pass._ITEM_BYTES", 50_000)
    local = found_in(open_checkpoint(damaged))
    assert {"NV201", "NV301"} <= {finding["rule"] for finding in json.loads(local)["findings"]}
    assert found_in(open_checkpoint(serve(damaged).url), jobs=jobs) == local


@pytest.mark.parametrize("form", ["nvfp4", "nvfp4_raw", "ct", "fp8", "bf16"])
def test_every_golden_has_the_same_findings_over_http(
    serve: Callable[[Path], SimpleNamespace], golden: SimpleNamespace, form: str
) -> None:
    directory = getattr(golden, form)
    assert found_in(open_checkpoint(serve(directory).url)) == found_in(open_checkpoint(directory))


def test_a_hub_and_an_object_store_give_the_same_findings(
    hub: SimpleNamespace, golden: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("nvfp4check.checkpoint.byte_pass._ITEM_BYTES", 50_000)
    local = found_in(open_checkpoint(golden.nvfp4))
    assert found_in(open_checkpoint("hf://org/name@v1"), jobs=2) == local
    system = fsspec.filesystem("memory")
    for path in golden.nvfp4.iterdir():
        system.pipe_file(f"/same/{path.name}", path.read_bytes())
    assert found_in(open_checkpoint("memory://same")) == local
    system.rm("/same", recursive=True)


def test_a_network_with_every_passing_fault_changes_nothing(
    serve: Callable[[Path], SimpleNamespace], damaged: Path
) -> None:
    faults = ("dropped", 429, "short", 503, "long", "date", "hung up")

    def planned(path: str, span: str, time: int) -> int | str | None:
        # Of each range its own: up to as many as a request bears, or none.
        drawn = zlib.crc32(f"{path} {span}".encode())
        return faults[(drawn + time) % len(faults)] if time < drawn % Retry().attempts else None

    server = serve(damaged)
    checkpoint = hasty(server.url)
    server.plan = planned
    assert found_in(checkpoint) == found_in(open_checkpoint(damaged))
    assert {*faults, None} == {*server.given}


@pytest.mark.parametrize("fault", [503, "dropped", "short", "shifted", "whole", 403])
def test_a_network_that_stays_broken_ends_the_run_and_finds_no_fault_in_the_checkpoint(
    server: SimpleNamespace, fault: int | str
) -> None:
    checkpoint = hasty(server.url)
    server.plan = lambda path, span, time: fault
    with pytest.raises(CheckError, match=server.url):
        validate(checkpoint)


def test_a_network_that_breaks_while_opening_is_no_fault_of_the_checkpoint(
    server: SimpleNamespace,
) -> None:
    server.faulty = lambda path, span: SHARD in path and span != "bytes=0-0"
    server.plan = lambda path, span, time: 403
    with pytest.raises(CheckError, match="status 403"):
        open_checkpoint(server.url)


def test_no_byte_of_a_weight_is_read_twice(server: SimpleNamespace) -> None:
    checkpoint = open_checkpoint(server.url)
    before = server.sent
    validate(checkpoint)
    assert server.sent - before <= 1.25 * checkpoint.nbytes


def test_inspect_is_the_same_over_http(server: SimpleNamespace, golden: SimpleNamespace) -> None:
    remote = inspect(open_checkpoint(server.url)).to_json()
    local = inspect(open_checkpoint(golden.nvfp4)).to_json()
    assert remote.pop("location") != local.pop("location")
    assert remote == local


def test_the_audit_against_a_base_is_the_same_over_http(
    serve: Callable[[Path], SimpleNamespace], damaged: Path, golden: SimpleNamespace
) -> None:
    local = found_in(open_checkpoint(damaged), base=open_checkpoint(golden.fp8))
    assert "NV7" in local
    base = open_checkpoint(serve(golden.fp8).url)
    assert (
        found_in(open_checkpoint(serve(damaged).url), base=base).replace(
            base.location, str(golden.fp8)
        )
        == local
    )


def test_a_difference_of_two_checkpoints_is_the_same_over_http(
    serve: Callable[[Path], SimpleNamespace], damaged: Path, golden: SimpleNamespace
) -> None:
    def compared(a: str | Path, b: str | Path) -> dict[str, Any]:
        document = diff_checkpoints(open_checkpoint(a), open_checkpoint(b)).to_json()
        document.pop("seconds")
        assert document["a"].pop("location") != document["b"].pop("location")
        return document

    local = compared(damaged, golden.nvfp4)
    assert compared(serve(damaged).url, serve(golden.nvfp4).url) == local


def test_an_interrupted_run_goes_on_unless_the_file_is_another(
    server: SimpleNamespace,
    golden: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nvfp4check.checkpoint.byte_pass._ITEM_BYTES", 50_000)
    whole = found_in(open_checkpoint(golden.nvfp4))
    journal = tmp_path / "journal"
    weights, _ = scannable_weights(open_checkpoint(server.url))
    codes = [weight.parts[Part.CODES] for weight in weights]
    spans = {(f"/{code.shard}", f"bytes={code.start}-{code.stop - 1}"): code for code in codes}

    def read_in_a_run(resume: bool) -> list[str]:
        """The weights whose codes are asked for, in the order of the file."""
        checkpoint = hasty(server.url)
        server.asked.clear()
        assert found_in(checkpoint, journal=journal, resume=resume) == whole
        return [code.name for span, code in spans.items() for _ in range(server.asked[span])]

    everything = [weight.parts[Part.CODES].name for weight in weights]
    assert read_in_a_run(resume=False) == everything
    broken = [*spans][150]
    server.plan = lambda path, span, time: 403 if (path, span) == broken else None
    checkpoint = hasty(server.url)
    with pytest.raises(CheckError, match="status 403"):
        found_in(checkpoint, journal=journal)
    server.plan = lambda path, span, time: None
    kept = journal.read_bytes()
    finished = kept.count(b"\n") - 1  # the first line says of which files
    assert 100 < finished <= 150
    assert read_in_a_run(resume=True) == everything[finished:]
    journal.write_bytes(kept)
    server.etags[SHARD] = '"another"'
    assert read_in_a_run(resume=True) == everything


def test_the_forward_pass_over_http_is_the_local_one(
    server: SimpleNamespace, golden: SimpleNamespace, tmp_path: Path
) -> None:
    prompts = [Prompt(id="x", tokens=(0, 41, 574))]
    remote = run_forward(server.url, prompts, tmp_path / "remote")
    local = run_forward(golden.nvfp4, prompts, tmp_path / "local")
    assert torch.equal(remote.run.logits("x"), local.run.logits("x"))


def test_the_command_line_checks_a_url_and_says_when_it_cannot(
    server: SimpleNamespace, closed_port: int
) -> None:
    command = [sys.executable, "-m", "nvfp4check", "validate"]
    sound = subprocess.run(
        [*command, server.url, "--jobs", "2"], capture_output=True, text=True, check=False
    )
    assert (sound.returncode, sound.stderr) == (0, "")
    gone = subprocess.run(
        [*command, f"http://127.0.0.1:{closed_port}/model"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert gone.returncode == 2
    assert "no answer" in gone.stderr
    assert "Traceback" not in gone.stderr


class Counted:
    """A storage of made-up bytes that knows how much was asked for and not yet taken."""

    location = "counted"
    unsafe: dict[str, str] = {}  # noqa: RUF012  (the protocol's attribute)

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []
        self.given_up = 0

    def list(self) -> dict[str, int]:
        return {"shard": 1 << 40}

    def view(self, name: str) -> memoryview | None:
        return None

    def version(self, name: str) -> str:
        return "1"

    def gather(self, name: str, ranges: object) -> None:
        """Nothing waits here."""

    def giving_up(self) -> AbstractContextManager[None]:
        self.given_up += 1
        return nullcontext()

    def read(self, name: str, start: int, stop: int) -> bytes:
        self.reads.append((start, stop))
        if start == 13 << 20:
            raise StorageError("torn")
        return bytes([start >> 20 & 0xFF]) * (stop - start)


def test_reading_ahead_gives_the_bytes_and_never_runs_far() -> None:
    counted = Counted()
    plan = [FileRange("shard", at << 20, (at + 1) << 20) for at in range(100, 200)]
    with Ahead(counted, plan) as ahead:
        for taken, part in enumerate(plan):
            assert ahead.read("shard", part.start, part.stop)[:1] == bytes([part.start >> 20])
            assert len(counted.reads) <= taken + 1 + (AHEAD_BYTES >> 20)
    assert sorted(counted.reads) == [(part.start, part.stop) for part in plan]


def test_reading_ahead_passes_over_what_is_not_taken_and_reads_what_is_not_planned() -> None:
    counted = Counted()
    plan = [FileRange("shard", at << 20, (at + 1) << 20) for at in range(20)]
    with Ahead(counted, plan) as ahead:
        assert ahead.read("shard", 5 << 20, 6 << 20)[:1] == b"\x05"
        assert ahead.read("shard", 300 << 20, (300 << 20) + 1) == bytes([300 & 0xFF])
        with pytest.raises(StorageError, match="torn"):
            ahead.read("shard", 13 << 20, 14 << 20)
        assert ahead.read("shard", 19 << 20, 20 << 20)[:1] == b"\x13"
    assert counted.given_up == 0


def test_what_was_read_ahead_is_given_up_where_the_work_failed() -> None:
    counted = Counted()
    plan = [FileRange("shard", at << 20, (at + 1) << 20) for at in range(20)]
    with pytest.raises(StorageError, match="torn"), Ahead(counted, plan) as ahead:
        ahead.read("shard", 13 << 20, 14 << 20)
    assert counted.given_up == 1


def test_slices_of_a_tensor_that_is_read_in_pieces_are_its_bytes(tmp_path: Path) -> None:
    size = 2 * PIECE_BYTES + 1000
    data = np.random.default_rng(0).integers(0, 256, size + 20, np.uint8)
    (tmp_path / "shard").write_bytes(data.tobytes())
    tensor = data[7 : 7 + size]
    entry = TensorEntry("x", "U8", (size,), "shard", 7, 7 + size)
    ranged = RangedBytes(LocalStorage(tmp_path), entry)
    edges = [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES, size - 1, size]
    assert ranged.size == size
    for start in edges:
        for stop in edges:
            assert ranged[start:stop].tobytes() == tensor[start:stop].tobytes()
    assert ranged[5:].tobytes() == tensor[5:].tobytes()
    with pytest.raises(ValueError, match="contiguous"):
        ranged[::2]


def test_a_huge_weight_is_never_in_memory(
    serve: Callable[[Path], SimpleNamespace], golden: SimpleNamespace, tmp_path: Path
) -> None:
    header = {
        "model.layers.0.mlp.up_proj.weight": ("U8", [65536, 4096]),
        "model.layers.0.mlp.up_proj.weight_scale": ("F8_E4M3", [65536, 512]),
        "model.layers.0.mlp.up_proj.weight_scale_2": ("F32", []),
    }
    entries, at = {}, 0
    for name, (dtype, shape) in header.items():
        nbytes = int(np.prod(shape)) * (4 if dtype == "F32" else 1)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    script = """
        import sys, tracemalloc
        from nvfp4check.checkpoint.opening import open_checkpoint
        from nvfp4check.checkpoint.validation import ValidationOptions, validate
        options = ValidationOptions(select=("NV2", "NV4"))
        validate(open_checkpoint(sys.argv[1]), options)  # loads and compiles what it needs
        checkpoint = open_checkpoint(sys.argv[2])
        tracemalloc.start()
        result = validate(checkpoint, options)
        print(result.coverage.bytes_checked, tracemalloc.get_traced_memory()[1])
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(golden.nvfp4), serve(tmp_path).url],
        capture_output=True,
        text=True,
        check=True,
    )
    read, held = map(int, run.stdout.split())
    assert read == 288 * (1 << 20) + 4
    # What was read ahead, and of each request under way the piece in chunks and put together: no
    # more than eight requests are, however slow the machine. It is a third of the weight.
    assert held < read / 2
