import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint

GATE = "model.layers.1.mlp.experts.3.gate_proj"


def index_of(clone: CheckpointEditor) -> dict[str, str]:
    index: dict[str, str] = json.loads((clone.path / "model.safetensors.index.json").read_text())
    return index["weight_map"]


def test_a_copy_is_the_golden_byte_for_byte(
    clone: CheckpointEditor, golden: SimpleNamespace
) -> None:
    names = sorted(path.name for path in golden.nvfp4.iterdir())
    assert sorted(path.name for path in clone.path.iterdir()) == names
    for name in names:
        assert (clone.path / name).read_bytes() == (golden.nvfp4 / name).read_bytes()


def test_a_patched_byte_changes_that_byte_and_no_other(
    clone: CheckpointEditor, golden: SimpleNamespace
) -> None:
    entry = clone.entry(f"{GATE}.weight_scale")
    clone.raw(f"{GATE}.weight_scale")[2, 5] ^= 0x55
    before = np.fromfile(golden.nvfp4 / entry.shard, np.uint8)
    after = np.fromfile(clone.path / entry.shard, np.uint8)
    assert np.flatnonzero(before != after).tolist() == [entry.start + 2 * entry.shape[1] + 5]


def test_a_scalar_is_read_back_as_it_was_set(clone: CheckpointEditor) -> None:
    clone.set_scalar(f"{GATE}.weight_scale_2", math.inf)
    checkpoint = open_checkpoint(clone.path)
    assert checkpoint.scalar(checkpoint.tensors[f"{GATE}.weight_scale_2"]) == math.inf


def test_a_renamed_tensor_keeps_its_bytes_and_the_index_follows(clone: CheckpointEditor) -> None:
    data = clone.raw(f"{GATE}.weight").tobytes()
    others = len(clone.entries())
    clone.rename(f"{GATE}.weight", "elsewhere.weight")
    assert clone.raw("elsewhere.weight").tobytes() == data
    assert f"{GATE}.weight" not in clone.entries()
    assert len(clone.entries()) == others
    assert index_of(clone)["elsewhere.weight"] == clone.entry("elsewhere.weight").shard


def test_a_dropped_tensor_leaves_the_others_as_they_were(clone: CheckpointEditor) -> None:
    kept = {name: clone.raw(name).tobytes() for name in list(clone.entries())[::97]}
    clone.drop("model.norm.weight")
    assert "model.norm.weight" not in clone.entries()
    assert "model.norm.weight" not in index_of(clone)
    kept.pop("model.norm.weight", None)
    assert {name: clone.raw(name).tobytes() for name in kept} == kept


def test_the_index_stays_when_told_so(clone: CheckpointEditor) -> None:
    before = index_of(clone)
    clone.drop("model.norm.weight", index=False)
    clone.add("extra", b"\x00\x01", dtype="U8", shape=(2,), index=False)
    assert index_of(clone) == before


def test_a_moved_tensor_is_in_its_new_shard_only(clone: CheckpointEditor) -> None:
    data = clone.raw("model.norm.weight").tobytes()
    source = clone.entry("model.norm.weight").shard
    target = next(shard for shard in clone.shards if shard != source)
    clone.move("model.norm.weight", target)
    assert open_checkpoint(clone.path).duplicates == {}
    assert clone.entry("model.norm.weight").shard == target
    assert clone.raw("model.norm.weight").tobytes() == data


def test_swapped_tensors_hold_each_other(clone: CheckpointEditor) -> None:
    one, two = f"{GATE}.weight", f"{GATE.replace('gate', 'up')}.weight"
    first, second = clone.raw(one).tobytes(), clone.raw(two).tobytes()
    assert first != second
    clone.swap(one, two)
    assert clone.raw(one).tobytes() == second
    assert clone.raw(two).tobytes() == first


def test_content_of_the_wrong_size_is_refused(clone: CheckpointEditor) -> None:
    with pytest.raises(ValueError, match=r"3 bytes for BF16 \(256,\), expected 512"):
        clone.replace("model.norm.weight", b"\x00" * 3)
    with pytest.raises(ValueError, match="bytes 510 to 513 of 512"):
        clone.patch("model.norm.weight", b"abc", at=510)


def test_an_edited_index_total_stays_true(clone: CheckpointEditor) -> None:
    clone.add("extra", b"\x00" * 10, dtype="U8", shape=(10,))
    checkpoint = open_checkpoint(clone.path)
    assert checkpoint.index is not None
    assert checkpoint.index.total_size == checkpoint.nbytes


def test_a_golden_header_becomes_an_openable_checkpoint(
    headers_only: Callable[[str], Path],
) -> None:
    path = headers_only("modelopt-deepseek-example")
    assert len(open_checkpoint(path).tensors) == 437
