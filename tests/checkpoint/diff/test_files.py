"""What a loader makes of files and index; how tensors are cut into shards is no difference."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from nvfp4check.checkpoint.diff.classes import FailOn
from nvfp4check.checkpoint.diff.run import DiffOptions, diff_checkpoints
from nvfp4check.checkpoint.index import INDEX_FILE
from nvfp4check.checkpoint.opening import open_checkpoint

NAME = "model.layers.1.mlp.experts.2.down_proj.weight_scale"


def differences(a, b):
    return diff_checkpoints(open_checkpoint(a), open_checkpoint(b), DiffOptions(read_bytes=False))


def only_difference(golden, clone):
    there, back = differences(golden.nvfp4, clone), differences(clone, golden.nvfp4)
    (found,), (other,) = there.config, back.config
    assert (found.a, found.b) == (other.b, other.a)
    assert found.a is None
    return found


def test_a_tensor_that_one_index_leaves_out_is_named(golden, clone):
    with clone.edit_json(INDEX_FILE) as index:
        del index["weight_map"][NAME]

    found = only_difference(golden, clone)

    assert (found.key, found.b) == ("tensors left out", f"1 tensor: {NAME}")
    assert found.fails(FailOn.DIFFERENT, formats_changed=False)


def test_many_tensors_are_counted(golden, clone):
    with clone.edit_json(INDEX_FILE) as index:
        scales = [name for name in index["weight_map"] if name.endswith("_scale")]
        for name in scales:
            del index["weight_map"][name]

    found = only_difference(golden, clone)

    assert found.b.startswith(f"{len(scales):,} tensors: ")
    assert found.b.endswith(f"and {len(scales) - 3:,} more")


def test_a_tensor_that_is_not_where_the_index_says_is_named(golden, clone):
    with clone.edit_json(INDEX_FILE) as index:
        index["weight_map"]["model.ghost.weight"] = index["weight_map"][NAME]

    found = only_difference(golden, clone)

    assert found.key == "tensors that are not where it says"
    assert "model.ghost.weight" in found.b


def test_a_wrong_total_size_is_a_note(golden, clone):
    with clone.edit_json(INDEX_FILE) as index:
        index["metadata"]["total_size"] += 1

    found = only_difference(golden, clone)

    assert found.key == "wrong total_size"
    assert "though the tensors take" in found.b
    assert not found.fails(FailOn.DIFFERENT, formats_changed=False)
    assert found.fails(FailOn.BYTES, formats_changed=False)


def test_a_file_that_no_index_names_is_a_difference(golden, clone):
    shard = next(iter(sorted(golden.nvfp4.glob("*.safetensors"))))
    shutil.copy(shard, clone.path / "stray.safetensors")

    keys = {diff.key: diff.b for diff in differences(golden.nvfp4, clone).config}

    assert keys["files that no index names"] == "1 file: stray.safetensors"
    assert "tensors in two of them" in keys


def test_several_shards_without_an_index_are_a_difference(golden, clone):
    (clone.path / INDEX_FILE).unlink()

    found = only_difference(golden, clone)

    assert (found.file, found.b) == (INDEX_FILE, "absent, beside several shards")


@pytest.mark.parametrize(("metadata", "said"), [(None, "none, pt"), ({"format": "tf"}, "pt, tf")])
def test_the_format_that_headers_name_is_a_note(golden, tmp_path, metadata, said):
    copy = shutil.copytree(golden.fp8, tmp_path / "copy")
    shard = next(iter(sorted(copy.glob("*.safetensors"))))
    tensors = load_file(shard)
    shard.unlink()
    save_file(tensors, shard, metadata)

    (found,) = differences(golden.fp8, copy).config

    assert (found.file, found.key) == ("headers of the shards", "format")
    assert (found.a, found.b) == ("pt", said)
    assert not found.fails(FailOn.DIFFERENT, formats_changed=False)


def test_one_file_without_an_index_is_no_difference(golden, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    tensors = {}
    for shard in sorted(golden.fp8.glob("*.safetensors")):
        tensors |= load_file(shard)
    for document in golden.fp8.glob("*.json"):
        if document.name != INDEX_FILE:
            shutil.copy(document, one)
    save_file(tensors, one / "model.safetensors", {"format": "pt"})

    assert differences(golden.fp8, one).config == ()


def test_weights_in_a_shard_that_is_not_there_are_not_compared_and_not_said_to_be_gone(
    golden, tmp_path
):
    partial = shutil.copytree(golden.fp8, tmp_path / "partial")
    (partial / "model-00002-of-000002.safetensors").unlink()

    found = differences(golden.fp8, partial)

    assert set(found.summary) == {"same-form"}
    assert found.config == ()
    lost = [
        gap for gap in found.skipped if gap.why == "stored in model-00002-of-000002.safetensors"
    ]
    assert len(lost) == 1
    assert len(found.weights) + int(lost[0].what.split(": ")[1].split()[0]) == 331
