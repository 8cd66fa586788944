"""Hostile and broken checkpoints: an exit code, a message, and no traceback."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
#: An erased screen, a forged line, a name that reads backwards.
ESCAPES = "model.\x1b[2J\x1b[31m\nPASS: no findings\u202e.weight"


def shard(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with this header, its length told truly or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "U8", "shape": shape, "data_offsets": [start, stop]}


TENSOR = shard({"a.weight": entry(0, 4, [4])}, b"\0\0\0\0")

FILES: dict[str, dict[str, bytes]] = {
    "an empty directory": {},
    "a shard of no bytes": {"model.safetensors": b""},
    "a header of 2**62 bytes": {"model.safetensors": shard(b"{}", length=2**62)},
    "a header of 2**64 - 1 bytes": {"model.safetensors": shard(b"{}", length=2**64 - 1)},
    "a header that is a list": {"model.safetensors": shard(b"[1, 2]")},
    "a header of deep brackets": {"model.safetensors": shard(b"[" * 100_000)},
    "a header with NaN": {"model.safetensors": shard(b'{"a": NaN}')},
    "a header that is not UTF-8": {"model.safetensors": shard(b'{"\xff": 1}')},
    "a tensor larger than its shard": {
        "model.safetensors": shard({"a.weight": entry(0, 2**60, [2**60])})
    },
    "a negative offset": {"model.safetensors": shard({"a.weight": entry(-4, 0, [4])})},
    "a shape that overflows": {
        "model.safetensors": shard({"a.weight": entry(0, 4, [2**40, 2**40])}, b"\0\0\0\0")
    },
    "an index that climbs out": {
        "model.safetensors.index.json": b'{"weight_map": {"a.weight": "../../etc/passwd"}}'
    },
    "an index that is absolute": {
        "model.safetensors.index.json": b'{"weight_map": {"a.weight": "/etc/passwd"}}'
    },
    "an index of the wrong type": {
        "model.safetensors": TENSOR,
        "model.safetensors.index.json": b'{"weight_map": [1, 2], "metadata": 7}',
    },
    "a config of the wrong type": {"model.safetensors": TENSOR, "config.json": b"[]"},
    "a config with wrong types inside": {
        "model.safetensors": TENSOR,
        "config.json": b'{"architectures": 7, "num_hidden_layers": "x", "quantization_config": []}',
    },
    "a config with NaN": {
        "model.safetensors": TENSOR,
        "config.json": b'{"architectures": ["DeepseekV3ForCausalLM"], "hidden_size": NaN}',
    },
    "a config with huge numbers": {
        "model.safetensors": TENSOR,
        "config.json": b'{"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 1e300,'
        b' "n_routed_experts": 9999999999}',
    },
    "a config cut short": {"model.safetensors": TENSOR, "config.json": b'{"architectures": ['},
    "a name with escapes": {
        "model.safetensors": shard({ESCAPES: entry(0, 4, [4])}, b"\0\0\0\0"),
        "config.json": json.dumps({"architectures": [ESCAPES]}).encode(),
    },
}


@pytest.fixture(params=FILES)
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for name, content in FILES[request.param].items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("format", ["text", "json", "markdown", "html", "junit", "sarif"])
def test_bad_input_ends_in_1_or_2_without_a_traceback(run: Run, broken: Path, format: str) -> None:
    ran = run("validate", str(broken), "--format", format)
    assert ran.code in (1, 2)
    assert "Traceback" not in ran.err
    assert "internal error" not in ran.err
    assert (ran.err == "") == (ran.out != "")


def test_no_escape_reaches_either_stream(run: Run, broken: Path) -> None:
    ran = run("validate", str(broken))
    assert "\x1b" not in ran.out + ran.err
    assert "\u202e" not in ran.out + ran.err
    assert not any(line.startswith("PASS") for line in ran.out.splitlines())
