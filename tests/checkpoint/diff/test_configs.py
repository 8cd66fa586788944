"""Settings that mean the same are no difference; others are, with what they matter to."""

import json

import pytest

from nvfp4check.checkpoint.diff.classes import FailOn
from nvfp4check.checkpoint.diff.configs import compare_configs
from nvfp4check.checkpoint.opening import open_checkpoint


def differences(a, b):
    return compare_configs(open_checkpoint(a), open_checkpoint(b))


def test_order_and_nulls_and_whole_numbers_as_floats_are_no_difference(golden, clone):
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        with clone.edit_json(file) as document:
            held = dict(reversed(list(document.items())))
            document.clear()
            document.update(held, a_setting_without_a_value=None)
    with clone.edit_json("config.json") as config:
        config["routed_scaling_factor"] = float(config["routed_scaling_factor"])
        config["hidden_size"] = float(config["hidden_size"])

    assert differences(golden.nvfp4, clone) == []


@pytest.mark.parametrize(
    ("file", "key", "value", "matters", "fails"),
    [
        ("config.json", "rope_theta", 5000.0, "model", True),
        ("config.json", "transformers_version", "0.0.1", "note", False),
        ("generation_config.json", "temperature", 1.9, "generation", False),
        ("tokenizer_config.json", "model_max_length", 77, "tokenizer", True),
    ],
)
def test_a_changed_setting_says_what_it_matters_to(golden, clone, file, key, value, matters, fails):
    with clone.edit_json(file) as document:
        document[key] = value

    (found,) = differences(golden.nvfp4, clone)

    assert (found.file, found.key, found.matters.value) == (file, key, matters)
    assert found.b == value
    assert found.fails(FailOn.DIFFERENT, formats_changed=False) is fails
    assert found.fails(FailOn.BYTES, formats_changed=False)


def test_exclude_lists_are_compared_by_what_they_cover(golden, clone):
    with clone.edit_json("hf_quant_config.json") as document:
        patterns = document["quantization"]["exclude_modules"]
        # The same modules in other words.
        document["quantization"]["exclude_modules"] = [*reversed(patterns), "lm_head"]
    assert differences(golden.nvfp4, clone) == []

    with clone.edit_json("hf_quant_config.json") as document:
        document["quantization"]["exclude_modules"].append("model.layers.1.mlp.experts.3.*")
    (found,) = differences(golden.nvfp4, clone)

    assert found.key == "quantization: excluded linears"
    assert "only here model.layers.1.mlp.experts.3.down_proj" in found.b
    assert found.fails(FailOn.DIFFERENT, formats_changed=False)
    assert not found.fails(FailOn.DIFFERENT, formats_changed=True)


def test_a_changed_vocabulary_is_counted_not_printed(golden, clone):
    document = json.loads((clone.path / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    first = next(iter(vocabulary))
    vocabulary["an unheard of word"] = vocabulary.pop(first)
    clone.write_file("tokenizer.json", json.dumps(document))

    found = [d for d in differences(golden.nvfp4, clone) if d.key == "model.vocab"]

    assert "1 of them not so in b" in found[0].a
    assert "1 of them not so in a" in found[0].b


def test_a_missing_tokenizer_is_a_difference(golden, clone):
    clone.drop_file("tokenizer.json")

    (found,) = differences(golden.nvfp4, clone)

    assert (found.file, found.a, found.b) == ("tokenizer.json", "present", None)
