"""Whole checkpoints of real producers against one another."""

import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nvfp4check.checkpoint.diff.classes import FailOn, WeightClass
from nvfp4check.checkpoint.diff.results import WeightDiff
from nvfp4check.checkpoint.diff.run import DiffOptions, diff_checkpoints
from nvfp4check.checkpoint.editing import copy_checkpoint
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.engine.local import START_SECONDS, LocalEngine, alone_if_sooner
from nvfp4check.findings import CheckError


def compare(a, b, **options):
    return diff_checkpoints(open_checkpoint(a), open_checkpoint(b), DiffOptions(**options))


def reshard(source, target):
    """Write a checkpoint's tensors into shards of another cut, in another order."""
    target.mkdir()
    tensors = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    with safe_open(shard, "pt") as opened:
        metadata = opened.metadata()
    names = sorted(tensors, key=lambda name: name[::-1])
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-000003.safetensors"
        held = names[number::3]
        save_file({name: tensors[name] for name in held}, target / file, metadata)
        weight_map |= dict.fromkeys(held, file)
    for document in source.glob("*.json"):
        shutil.copy(document, target / document.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("kind", ["nvfp4", "fp8", "bf16", "ct"])
def test_a_checkpoint_is_identical_to_itself_in_other_shards(golden, tmp_path, kind):
    source = getattr(golden, kind)

    found = compare(source, reshard(source, tmp_path / "resharded"))

    assert set(found.summary) == {"identical"}
    assert not found.config
    assert not any(found.failing(FailOn.BYTES))


def test_the_raw_export_differs_from_the_repaired_one_in_its_settings_alone(golden):
    found = compare(golden.nvfp4, golden.nvfp4_raw)

    assert set(found.summary) == {"identical"}
    assert {diff.matters.value for diff in found.config} >= {"quantization"}
    assert any("deepseek-fp8" in str(diff.b) for diff in found.config)
    assert found.failing(FailOn.DIFFERENT)[1]


#: a, b, and how many weights are of each class.
PAIRS = [
    ("nvfp4", "fp8", {"identical": 43, "same-values": 1, "format-changed": 287}),
    ("nvfp4", "bf16", {"identical": 43, "requantized": 76, "format-changed": 212}),
    ("fp8", "bf16", {"identical": 43, "format-changed": 288}),
]


@pytest.mark.parametrize(("one", "two", "classes"), PAIRS)
def test_formats_of_one_model_are_within_rounding_of_one_another(golden, one, two, classes):
    found = compare(getattr(golden, one), getattr(golden, two))

    assert found.summary == classes
    assert all(diff.bound_holds for diff in found.weights)
    assert not found.failing(FailOn.DIFFERENT)[0]
    assert found.failing(FailOn.REQUANTIZED)[0]


def test_weights_that_went_through_fp8_are_named_so(golden):
    found = compare(golden.nvfp4, golden.bf16)

    said = Counter(diff.diagnosis for diff in found.weights if diff.cls.value != "identical")
    assert said == {"a was made from b by way of FP8 128x128": 288}


@pytest.mark.parametrize(("one", "two"), [pair[:2] for pair in PAIRS])
def test_the_order_of_the_checkpoints_does_not_matter(golden, one, two):
    there = compare(getattr(golden, one), getattr(golden, two))
    back = compare(getattr(golden, two), getattr(golden, one))

    assert there.summary == back.summary
    for left, right in zip(there.weights, back.weights, strict=True):
        assert (left.name, left.cls, left.bound_holds) == (right.name, right.cls, right.bound_holds)
        assert (left.sqnr_db is None) == (right.sqnr_db is None)
        # The sums run in one order, their mean does not.
        assert left.sqnr_db is None or abs(left.sqnr_db - right.sqnr_db) < 1e-9
        assert left.max_abs == right.max_abs
        assert left.beyond == right.beyond


def test_weights_of_one_side_are_listed_from_either(golden, goldens):
    bf16 = goldens / "small-deepseek-v3" / "bf16"
    there, back = compare(bf16, golden.ct), compare(golden.ct, bf16)

    assert there.summary.get("only-in-a", 0) == back.summary.get("only-in-b", 0)
    assert there.summary["format-changed"] == back.summary["format-changed"] > 0
    assert all(d.bound_holds for d in there.weights if d.cls is WeightClass.FORMAT_CHANGED)


def test_the_same_values_in_the_other_direction_of_global_scales_are_the_same(golden, tmp_path):
    """A power of two has an exact reciprocal: ModelOpt's and compressed-tensors' names agree."""
    a, b = (tmp_path / name for name in "ab")
    for folder in (a, b):
        folder.mkdir()
        shutil.copy(golden.nvfp4 / "config.json", folder)
    codes = torch.arange(256, dtype=torch.uint8).repeat(4).reshape(16, 64)
    scales = torch.full((16, 8), 1.5).to(torch.float8_e4m3fn)
    module = "model.layers.0.mlp.down_proj"
    save_file(
        {
            f"{module}.weight": codes,
            f"{module}.weight_scale": scales,
            f"{module}.weight_scale_2": torch.tensor(2.0**-9),
        },
        a / "model.safetensors",
    )
    encode = torch.tensor([2.0**9])
    tensors = {f"{module}.weight_packed": codes, f"{module}.weight_scale": scales}
    save_file({**tensors, f"{module}.weight_global_scale": encode}, b / "model.safetensors")

    assert compare(a, b).summary == {"same-values": 1}

    # 3 * 2**7 has none: the same codes and scales, and values an ulp apart.
    save_file(
        {**tensors, f"{module}.weight_global_scale": torch.tensor([3.0 * 2**7])},
        b / "model.safetensors",
    )
    save_file(
        {
            f"{module}.weight": codes,
            f"{module}.weight_scale": scales,
            f"{module}.weight_scale_2": torch.tensor(1 / (3.0 * 2**7)),
        },
        a / "model.safetensors",
    )
    found = compare(a, b).weights[0]

    assert found.cls is WeightClass.SCALES_ONLY
    assert found.diagnosis == "same codes and scales, global scale inverse to 1 ulp"
    assert found.bound_holds


def test_equal_values_are_the_same_in_nvfp4_and_bfloat16(golden, tmp_path):
    a, b = (tmp_path / name for name in "ab")
    for folder in (a, b):
        folder.mkdir()
    name = "model.layers.0.mlp.down_proj.weight"
    codes = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    scales = torch.full((4, 8), 2.0).to(torch.float8_e4m3fn)
    save_file(
        {name: codes, f"{name}_scale": scales, f"{name}_scale_2": torch.tensor(0.25)},
        a / "model.safetensors",
    )
    nibbles = torch.stack([codes & 15, codes >> 4], -1).reshape(4, 128).long()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([table, -table])[nibbles] * 0.5
    save_file({name: values.bfloat16()}, b / "model.safetensors")

    assert compare(a, b).weights[0].cls is WeightClass.SAME_VALUES

    values[3, 5] *= 1.0078125  # one unit in the last place of bfloat16
    save_file({name: values.bfloat16()}, b / "model.safetensors")
    found = compare(a, b).weights[0]

    assert found.cls is WeightClass.FORMAT_CHANGED
    assert (found.worst.row, found.worst.column) == (3, 5)


def test_a_fused_linear_is_held_against_its_members(golden, tmp_path):
    target = tmp_path / "fused"
    target.mkdir()
    tensors = {}
    for shard in sorted(golden.bf16.glob("*.safetensors")):
        tensors |= load_file(shard)
    parent = "model.layers.0.mlp"
    members = [tensors.pop(f"{parent}.{leaf}.weight") for leaf in ("gate_proj", "up_proj")]
    tensors[f"{parent}.gate_up_proj.weight"] = torch.cat(members)
    save_file(tensors, target / "model.safetensors")
    shutil.copy(golden.bf16 / "config.json", target)

    found = compare(golden.bf16, target)
    summary = dict(found.summary)

    assert summary.pop("same-values") == 2
    assert set(summary) == {"identical"}


def test_only_compares_what_fits_and_refuses_what_fits_nothing(golden):
    found = compare(golden.nvfp4, golden.fp8, only="model.layers.1.mlp.experts.*")
    assert found.weights
    assert all(".1.mlp.experts." in diff.name for diff in found.weights)
    with pytest.raises(CheckError, match="fits no weight"):
        compare(golden.nvfp4, golden.fp8, only="nothing.*")


def test_headers_tell_forms_and_no_values(golden):
    found = compare(golden.nvfp4, golden.fp8, read_bytes=False)

    assert set(found.summary) == {"same-form", "format-changed"}
    assert all(diff.sqnr_db is None for diff in found.weights)
    assert found.bytes_read == 0


def test_a_sample_compares_whole_modules_and_says_what_it_may_miss(golden):
    found = compare(golden.nvfp4, golden.fp8, sample=0.2, seed=3)

    assert found.sample.groups_read < found.sample.groups
    assert 0 < len(found.weights) < 331
    assert 0 < found.sample.missed(1) < 1


def test_two_processes_find_what_one_finds(golden, monkeypatch):
    monkeypatch.setattr("nvfp4check.checkpoint.diff.run._ITEM_BYTES", 1 << 18)
    one = compare(golden.nvfp4, golden.bf16, only="model.layers.[01].*")
    monkeypatch.setattr("nvfp4check.engine.local.START_SECONDS", 0.0)
    two = compare(golden.nvfp4, golden.bf16, only="model.layers.[01].*", engine=LocalEngine(2))

    assert one.weights == two.weights


def test_processes_that_save_nothing_are_not_started(golden, monkeypatch):
    monkeypatch.setattr("nvfp4check.checkpoint.diff.run._ITEM_BYTES", 1 << 18)
    monkeypatch.setattr("nvfp4check.engine.local.ProcessPoolExecutor", None)

    assert compare(golden.nvfp4, golden.bf16, only="model.layers.[01].*", jobs=8).weights
    monkeypatch.setattr("nvfp4check.engine.local.START_SECONDS", 0.0)
    with pytest.raises(TypeError):  # there is nothing to start them with
        compare(golden.nvfp4, golden.bf16, only="model.layers.[01].*", jobs=8)


def test_processes_are_started_for_what_takes_longer_than_their_start():
    engine = LocalEngine(4)

    assert alone_if_sooner(engine, START_SECONDS * 4 / 3).jobs == 1
    assert alone_if_sooner(engine, START_SECONDS * 3 / 2) is engine


def test_an_interrupted_run_goes_on_and_ends_with_the_same(golden, tmp_path, monkeypatch):
    journal = tmp_path / "journal.jsonl"
    monkeypatch.setattr("nvfp4check.checkpoint.diff.run._ITEM_BYTES", 1 << 18)
    whole = compare(golden.nvfp4, golden.fp8, journal=tmp_path / "other.jsonl")

    class StoppedError(Exception):
        pass

    def stop(done, total):
        if done > total // 2:
            raise StoppedError

    sides = open_checkpoint(golden.nvfp4), open_checkpoint(golden.fp8)
    with pytest.raises(StoppedError):
        diff_checkpoints(*sides, DiffOptions(journal=journal), stop)
    kept = journal.read_text().count("\n") - 1
    assert kept > 50
    heard = []
    found = diff_checkpoints(
        *sides, DiffOptions(journal=journal, resume=True), lambda done, total: heard.append(done)
    )

    assert heard[0] > 0
    assert found.weights == whole.weights
    assert not journal.exists()


def test_results_survive_the_journey_through_json(golden):
    for diff in compare(golden.nvfp4, golden.bf16).weights:
        document = json.loads(json.dumps(diff.to_json(), allow_nan=False))
        assert WeightDiff.from_json(document) == diff


def test_a_truncated_shard_is_not_compared_and_said_so(golden, tmp_path):
    broken = copy_checkpoint(golden.nvfp4, tmp_path / "broken")
    broken.truncate("model-00002-of-000002.safetensors", -1000)

    found = compare(golden.nvfp4, broken)

    assert any("model-00002" in gap.what for gap in found.skipped)


def test_an_unknown_device_is_refused():
    with pytest.raises(CheckError, match="leave --device out"):
        DiffOptions(device="cuda")


@pytest.mark.parametrize(("old", "new"), [("model.", "transformer."), ("", "language_model.")])
def test_names_under_another_prefix_are_paired_and_said_so(golden, tmp_path, old, new):
    target = tmp_path / "renamed"
    target.mkdir()
    tensors = {}
    for shard in sorted(golden.bf16.glob("*.safetensors")):
        tensors |= load_file(shard)
    tensors = {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(tensors, target / "model.safetensors")
    shutil.copy(golden.bf16 / "config.json", target)

    there, back = compare(golden.bf16, target), compare(target, golden.bf16)

    assert set(there.summary) == set(back.summary) == {"identical"}
    assert f"names of b begin with '{new}'" in there.patterns[0]
    assert f"a's begin with '{new}'" in back.patterns[0]


def test_a_head_that_the_embeddings_stand_for_is_explained(golden, tmp_path):
    clone = copy_checkpoint(golden.bf16, tmp_path / "tied")
    clone.drop("lm_head.weight")
    with clone.edit_json("config.json") as config:
        config["tie_word_embeddings"] = True

    (found,) = [d for d in compare(golden.bf16, clone).weights if d.cls.value != "identical"]

    assert found.cls is WeightClass.ONLY_IN_A
    assert found.diagnosis == "b takes its embeddings for it: tie_word_embeddings"


NAME = "model.layers.0.mlp.down_proj"


def written(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def of_nvfp4(columns, scale_columns=None):
    scales = torch.full((32, scale_columns or columns // 16), 0.5).to(torch.float8_e4m3fn)
    return {
        f"{NAME}.weight": torch.full((32, columns // 2), 0x21, dtype=torch.uint8),
        f"{NAME}.weight_scale": scales,
        f"{NAME}.weight_scale_2": torch.tensor(1.0),
    }


@pytest.mark.parametrize(
    ("wide", "said"),
    [
        (of_nvfp4(128), "shape [32, 64] becomes [32, 128]"),
        (of_nvfp4(128, 4), "twice the columns in b: its codes stand one a byte, not packed"),
    ],
)
def test_twice_the_columns_are_unpacked_codes_only_under_as_many_scales(tmp_path, wide, said):
    [diff] = compare(written(tmp_path / "a", of_nvfp4(64)), written(tmp_path / "b", wide)).weights

    assert (diff.cls, diff.diagnosis) == (WeightClass.SHAPE_CHANGED, said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.inf, "2,048 elements of a are NaN or infinite"),
        (0.0, "every element of a is 0"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_infinities_are_not_told_for_zeros(tmp_path, value, said, dtype):
    a = {f"{NAME}.weight": torch.full((32, 64), value, dtype=torch.bfloat16)}
    b = of_nvfp4(64) if dtype is None else {f"{NAME}.weight": torch.ones(32, 64, dtype=dtype)}
    [diff] = compare(written(tmp_path / "a", a), written(tmp_path / "b", b)).weights

    assert diff.diagnosis == said
