import json
import math
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.opening import Checkpoint, open_checkpoint
from nvfp4check.checkpoint.writing import TensorSpec, encode_header
from nvfp4check.findings import CheckError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"
NORM = "model.norm.weight"


def test_a_sound_checkpoint_opens_without_a_flaw(golden: SimpleNamespace) -> None:
    for which in ("bf16", "fp8", "nvfp4", "ct"):
        checkpoint = open_checkpoint(getattr(golden, which))
        assert checkpoint.unreadable == {}
        assert checkpoint.unsafe == {}
        assert checkpoint.duplicates == {}
        assert checkpoint.json_problems == []
        assert checkpoint.missing_shards == checkpoint.stray_shards == checkpoint.pickles == ()
        assert checkpoint.architecture == "DeepseekV3ForCausalLM"


def stored(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("which", ["bf16", "fp8", "nvfp4", "ct"])
def test_every_tensor_is_the_one_the_library_loads(golden: SimpleNamespace, which: str) -> None:
    checkpoint = open_checkpoint(getattr(golden, which))
    loaded: dict[str, torch.Tensor] = {}
    for shard in checkpoint.shards:
        loaded |= safetensors.torch.load_file(getattr(golden, which) / shard)
    assert loaded.keys() == checkpoint.tensors.keys()
    for name, theirs in loaded.items():
        ours = checkpoint.torch(checkpoint.tensors[name])
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert stored(ours) == stored(theirs), name


def test_a_loaded_tensor_owns_its_memory(clone: CheckpointEditor) -> None:
    checkpoint = open_checkpoint(clone.path)
    checkpoint.torch(checkpoint.tensors[NORM]).zero_()
    assert clone.raw(NORM).any()


def test_part_of_a_tensor_is_that_part(golden: SimpleNamespace) -> None:
    checkpoint = open_checkpoint(golden.nvfp4)
    entry = checkpoint.tensors[NORM]
    whole = checkpoint.tensor_bytes(entry)
    assert whole.shape == (512,)
    assert np.array_equal(checkpoint.tensor_bytes(entry, 100, 260), whole[100:260])
    assert not whole.flags.writeable
    for start, stop in ((-1, 5), (5, 4), (0, 513)):
        with pytest.raises(ValueError, match="of 512 asked"):
            checkpoint.tensor_bytes(entry, start, stop)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, 3.0 + 2.0**-22),
        (torch.bfloat16, -1.5703125),
        (torch.float16, 2.0**-24),
        (torch.float64, 0.1),
        (torch.float32, math.inf),
        (torch.bfloat16, -math.inf),
    ],
)
def test_a_scalar_is_its_stored_value_exactly(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    safetensors.torch.save_file(
        {"x": torch.tensor(value, dtype=dtype)}, tmp_path / "model.safetensors"
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.scalar(checkpoint.tensors["x"]) == value


def test_a_scalar_of_many_elements_or_of_integers_is_an_error(golden: SimpleNamespace) -> None:
    checkpoint = open_checkpoint(golden.nvfp4)
    with pytest.raises(ValueError, match=r"shape \[256\], expected one element"):
        checkpoint.scalar(checkpoint.tensors[NORM])
    entry = TensorEntry("x", "U8", (), NORM, 0, 1)
    stub = SimpleNamespace(shards={}, tensor_bytes=lambda _: np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="dtype U8"):
        Checkpoint.scalar(stub, entry)  # type: ignore[arg-type]


def test_codes_of_four_bits_stay_packed(tmp_path: Path) -> None:
    header = encode_header([TensorSpec("x", "F4", (2, 6))])
    (tmp_path / "model.safetensors").write_bytes(header + bytes(range(6)))
    checkpoint = open_checkpoint(tmp_path)
    loaded = checkpoint.torch(checkpoint.tensors["x"])
    assert loaded.dtype == torch.uint8
    assert loaded.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_raw_export_indexes_no_scale_and_keeps_a_stale_config(golden: SimpleNamespace) -> None:
    checkpoint = open_checkpoint(golden.nvfp4_raw)
    assert checkpoint.index is not None
    unindexed = checkpoint.tensors.keys() - checkpoint.index.weight_map.keys()
    assert len(unindexed) == 3 * 212
    assert checkpoint.config_quantization is not None
    assert checkpoint.config_quantization.producer == "deepseek-fp8"
    assert checkpoint.quantization.producer == "modelopt"


# Nothing to open


def test_where_there_is_nothing_to_open_one_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="no such directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckError, match="the directory is empty"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckError, match=r"no \.safetensors file .* among 1 files"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckError, match=r"only pickles such as pytorch_model\.bin"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads everything")
def test_a_directory_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(CheckError, match="cannot be listed"):
        open_checkpoint(tmp_path / "closed")


# Defects of shards


def test_a_truncated_shard_is_unreadable_and_the_other_is_read(clone: CheckpointEditor) -> None:
    clone.truncate(SECOND, -1)
    checkpoint = open_checkpoint(clone.path)
    assert checkpoint.unreadable.keys() == {SECOND}
    assert "truncated" in checkpoint.unreadable[SECOND]
    assert checkpoint.shards.keys() == {FIRST}


def test_a_header_of_2_to_the_62_bytes_is_data(clone: CheckpointEditor) -> None:
    clone.write_file(FIRST, (2**62).to_bytes(8, "little") + b"{}")
    assert open_checkpoint(clone.path).unreadable.keys() == {FIRST}


def test_a_missing_shard_is_named(clone: CheckpointEditor) -> None:
    clone.drop_file(SECOND)
    assert open_checkpoint(clone.path).missing_shards == (SECOND,)


def test_a_stray_shard_is_named_and_read(clone: CheckpointEditor) -> None:
    clone.write_file(
        "stray.safetensors", encode_header([TensorSpec("stray", "U8", (1,))]) + b"\x07"
    )
    checkpoint = open_checkpoint(clone.path)
    assert checkpoint.stray_shards == ("stray.safetensors",)
    assert checkpoint.tensors["stray"].shard == "stray.safetensors"


def test_of_a_tensor_in_two_shards_the_one_the_index_means_counts(
    clone: CheckpointEditor,
) -> None:
    assert clone.entry(NORM).shard == SECOND
    clone.copy(NORM, FIRST)
    checkpoint = open_checkpoint(clone.path)
    assert [entry.shard for entry in checkpoint.duplicates[NORM]] == [FIRST, SECOND]
    assert checkpoint.tensors[NORM].shard == SECOND


def test_without_an_index_the_first_place_of_a_tensor_counts(clone: CheckpointEditor) -> None:
    clone.copy(NORM, FIRST)
    clone.drop_file(INDEX)
    checkpoint = open_checkpoint(clone.path)
    assert checkpoint.index is None
    assert checkpoint.tensors[NORM].shard == FIRST
    assert checkpoint.stray_shards == ()


def test_pickles_are_named_and_never_opened(clone: CheckpointEditor) -> None:
    os.mkfifo(clone.path / "trap.bin")  # opening it would hang
    clone.write_file("pytorch_model.bin", b"\x80\x04")
    clone.write_file("optimizer.PT", b"\x80\x04")
    assert open_checkpoint(clone.path).pickles == ("optimizer.PT", "pytorch_model.bin")


# Defects of the index


def problems_of(checkpoint: Checkpoint, file: str) -> str:
    return "\n".join(why for name, why in checkpoint.json_problems if name == file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "the top is a list"),
        ("3", "the top is a number"),
        ("{}", "weight_map is missing"),
        ('{"weight_map": []}', "weight_map is a list"),
        ('{"weight_map": {"a": 3, "b": null}}', "weight_map['a'] is '3'"),
        ('{"weight_map": {}, "metadata": 3}', "metadata is not an object"),
        ('{"weight_map": {}, "metadata": {"total_size": "9"}}', "total_size is '9'"),
        ('{"weight_map": {}, "metadata": {"total_size": true}}', "total_size is 'True'"),
        ('{"weight_map": {}, "metadata": {"total_size": NaN}}', "NaN is not JSON"),
        ('{"weight_map": {}, "weight_map": {}}', "'weight_map' appears twice"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"weight_map": {"\\ud800": "x"}}', "half of a surrogate pair"),
    ],
    ids=range(14),
)
def test_a_flaw_of_the_index_is_data_and_the_shards_are_read(
    clone: CheckpointEditor, text: str, message: str
) -> None:
    clone.write_file(INDEX, text)
    checkpoint = open_checkpoint(clone.path)
    assert message in problems_of(checkpoint, INDEX)
    assert len(checkpoint.tensors) == 967


def test_a_large_index_of_brackets_is_refused_before_it_is_parsed(clone: CheckpointEditor) -> None:
    clone.write_file(INDEX, '{"weight_map": [' + "[]," * 4_000_000 + "[]]}")
    tracemalloc.start()
    checkpoint = open_checkpoint(clone.path)
    assert tracemalloc.get_traced_memory()[1] < 60_000_000
    tracemalloc.stop()
    assert "brackets or commas in 12,000,020 characters" in problems_of(checkpoint, INDEX)


def test_an_index_that_is_not_utf8_is_data(clone: CheckpointEditor) -> None:
    clone.write_file(INDEX, b'{"weight_map": {"\xff": "x"}}')
    assert "not UTF-8 at byte 17" in problems_of(open_checkpoint(clone.path), INDEX)


def test_many_bad_entries_are_counted_and_not_all_listed(clone: CheckpointEditor) -> None:
    clone.write_file(INDEX, json.dumps({"weight_map": dict.fromkeys(map(str, range(5000)), 1)}))
    found = problems_of(open_checkpoint(clone.path), INDEX)
    assert "and 4,980 more entries" in found
    assert len(found.splitlines()) == 21


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.safetensors", "a/../../b", "a\0b"])
def test_an_index_entry_that_leads_out_is_unsafe_and_not_missing(
    clone: CheckpointEditor, name: str
) -> None:
    outside = clone.path.parent / "outside.safetensors"
    outside.write_bytes(encode_header([TensorSpec("outside", "U8", (1,))]) + b"\x00")
    with clone.edit_json(INDEX) as index:
        index["weight_map"][NORM] = name
    checkpoint = open_checkpoint(clone.path)
    assert name in checkpoint.unsafe
    assert checkpoint.missing_shards == ()
    assert "outside" not in checkpoint.tensors
    assert checkpoint.index is not None
    assert NORM not in checkpoint.index.weight_map


def test_a_shard_that_is_a_link_out_is_unsafe_and_not_read(clone: CheckpointEditor) -> None:
    (clone.path / SECOND).rename(clone.path.parent / SECOND)
    (clone.path / SECOND).symlink_to(clone.path.parent / SECOND)
    checkpoint = open_checkpoint(clone.path)
    assert checkpoint.unsafe.keys() == {SECOND}
    assert checkpoint.shards.keys() == {FIRST}
    assert checkpoint.missing_shards == ()


# Defects of the configuration


def test_nan_in_a_config_is_noted_and_the_rest_is_read(clone: CheckpointEditor) -> None:
    text = (clone.path / "config.json").read_text()
    assert '"rms_norm_eps": 1e-06' in text
    clone.write_file("config.json", text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN'))
    checkpoint = open_checkpoint(clone.path)
    assert checkpoint.json_problems == [("config.json", "NaN is not JSON")]
    assert checkpoint.architecture == "DeepseekV3ForCausalLM"


def test_of_many_flaws_twenty_are_listed(clone: CheckpointEditor) -> None:
    objects = ",".join(f'{{"k{number}": 1, "k{number}": 2}}' for number in range(1000))
    clone.write_file("config.json", f'{{"x": [{objects}]}}')
    assert len(open_checkpoint(clone.path).json_problems) == 20


def test_infinity_is_what_transformers_writes_and_no_flaw(clone: CheckpointEditor) -> None:
    with clone.edit_json("config.json") as config:
        config["time_step_limit"] = [0.0, math.inf]
    checkpoint = open_checkpoint(clone.path)
    assert checkpoint.json_problems == []
    assert checkpoint.config is not None
    assert checkpoint.config["time_step_limit"] == [0.0, math.inf]


def test_a_number_beyond_a_double_is_noted(clone: CheckpointEditor) -> None:
    with clone.edit_json("config.json") as config:
        config["x"] = 0
    text = (clone.path / "config.json").read_text().replace('"x": 0', '"x": 1e999')
    clone.write_file("config.json", text)
    assert "1e999 is beyond the range" in problems_of(open_checkpoint(clone.path), "config.json")


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "null", "[1]", '"x"', "{'a': 1}", "\ufeff{}"])
def test_a_document_of_the_wrong_form_counts_as_absent(
    clone: CheckpointEditor, file: str, text: str
) -> None:
    clone.write_file(file, text)
    checkpoint = open_checkpoint(clone.path)
    assert len(checkpoint.json_problems) == 1
    assert checkpoint.json_problems[0][0] == file
    documents = (checkpoint.config, checkpoint.hf_quant_config, checkpoint.generation_config)
    assert sum(document is None for document in documents) == 1


def test_a_field_of_the_wrong_type_in_a_quantisation_config_is_noted_with_its_place(
    clone: CheckpointEditor,
) -> None:
    with clone.edit_json("hf_quant_config.json") as config:
        config["quantization"]["group_size"] = "16"
    assert open_checkpoint(clone.path).json_problems == [
        (
            "hf_quant_config.json",
            "quantization.group_size is '16', expected a positive whole number",
        )
    ]


@pytest.mark.parametrize("architectures", [None, [], "X", [3], {}])
def test_architectures_of_another_form_name_none(
    clone: CheckpointEditor, architectures: object
) -> None:
    with clone.edit_json("config.json") as config:
        config["architectures"] = architectures
    assert open_checkpoint(clone.path).architecture is None


# Published configurations


def test_every_published_pair_of_configs_opens(goldens: Path, tmp_path: Path) -> None:
    names = sorted({path.name.rsplit("_config")[0] for path in (goldens / "configs").iterdir()})
    names = sorted({name.removesuffix("_hf_quant") for name in names})
    assert len(names) >= 25
    (tmp_path / "x").mkdir()
    empty = encode_header([TensorSpec("lm_head.weight", "BF16", (0,))])
    (tmp_path / "x" / "model.safetensors").write_bytes(empty)
    for name in names:
        for file in ("config.json", "hf_quant_config.json"):
            source = goldens / "configs" / f"{name}_{file}"
            target = tmp_path / "x" / file
            target.unlink(missing_ok=True)
            if source.exists():
                target.write_bytes(source.read_bytes())
        checkpoint = open_checkpoint(tmp_path / "x")
        assert checkpoint.json_problems == [], name
        assert checkpoint.quantization.producer is not None, name
        if "NVFP4" in name:
            assert checkpoint.quantization.is_nvfp4, name
