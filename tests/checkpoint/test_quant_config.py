import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.quant_config import (
    QuantConfig,
    effective,
    from_config,
    from_hf_quant_config,
)

MODULE = "model.layers.0.mlp.up_proj"


def config_of(goldens: Path, name: str) -> QuantConfig:
    return from_config(json.loads((goldens / "configs" / f"{name}_config.json").read_text()))


def hf_of(goldens: Path, name: str) -> QuantConfig:
    path = goldens / "configs" / f"{name}_hf_quant_config.json"
    return from_hf_quant_config(json.loads(path.read_text()))


def test_modelopts_own_file_is_read(goldens: Path) -> None:
    quantization = hf_of(goldens, "nvidia--DeepSeek-V3.1-NVFP4")
    assert quantization.producer == "modelopt"
    assert quantization.producer_version == "0.22.1.dev750+g59a703703"
    assert (quantization.algo, quantization.group_size) == ("NVFP4", 16)
    assert quantization.kv_cache_algo == "FP8"
    assert len(quantization.exclude) == 246
    assert quantization.quantizes_activations is True
    assert quantization.source_files == ("hf_quant_config.json",)
    assert quantization.problems == ()


def test_excludes_cover_layer_61_and_leave_o_proj(goldens: Path) -> None:
    quantization = hf_of(goldens, "nvidia--DeepSeek-V3.1-NVFP4")
    assert quantization.excludes("model.layers.61.mlp.experts.9.up_proj")
    assert quantization.excludes("model.layers.60.self_attn.q_a_proj")
    assert quantization.excludes("lm_head")
    assert not quantization.excludes("model.layers.6.mlp.up_proj")
    assert not quantization.excludes("model.layers.60.self_attn.o_proj")


@pytest.mark.parametrize(
    "name",
    [
        "nvidia--GLM-5.1-NVFP4",
        "nvidia--Kimi-K2.6-NVFP4",
        "nvidia--MiniMax-M2.7-NVFP4",
        "nvidia--Gemma-4-31B-IT-NVFP4",
        "nvidia--Qwen3.5-397B-A17B-NVFP4",
    ],
)
def test_both_files_of_a_newer_export_say_the_same(goldens: Path, name: str) -> None:
    first, second = config_of(goldens, name), hf_of(goldens, name)
    for field in ("producer", "producer_version", "algo", "group_size", "kv_cache_algo"):
        assert getattr(first, field) == getattr(second, field), field
    assert set(first.exclude) == set(second.exclude)


def test_a_file_without_group_size_and_excludes_says_so_by_absence(goldens: Path) -> None:
    quantization = hf_of(goldens, "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4")
    assert quantization.producer == "modelopt"
    assert quantization.producer_version is None
    assert quantization.group_size is None
    assert quantization.exclude == ()


def test_mixed_precision_names_the_algorithm_of_each_layer(goldens: Path) -> None:
    quantization = hf_of(goldens, "nvidia--Qwen3.6-27B-NVFP4")
    assert quantization.algo == "MIXED_PRECISION"
    assert quantization.is_nvfp4
    layer = "model.language_model.layers.0"
    assert quantization.algo_of(f"{layer}.linear_attn.out_proj") == "FP8"
    assert quantization.algo_of(f"{layer}.mlp.gate_proj") == "W4A16_NVFP4"
    assert not quantization.stores_input_scale(f"{layer}.mlp.gate_proj")
    assert quantization.algo_of(f"{layer}.self_attn.nowhere") is None
    assert quantization.algo_of("mtp.layers.0.mlp.up_proj") is None


def test_a_quantised_layer_covers_the_modules_below_it(goldens: Path) -> None:
    for quantization in (
        hf_of(goldens, "nvidia--DeepSeek-V4-Flash-NVFP4"),
        config_of(goldens, "nvidia--DeepSeek-V4-Flash-NVFP4"),
    ):
        assert quantization.producer == "modelopt"
        assert quantization.algo_of("layers.10.ffn.experts.3.w1") == "NVFP4"
        assert quantization.algo_of("layers.10.ffn.shared_experts.w1") is None
        assert quantization.algo_of("layers.1.ffn.gate") is None


def test_compressed_tensors_groups_have_their_targets(goldens: Path) -> None:
    quantization = config_of(goldens, "RedHatAI--DeepSeek-V4-Flash-NVFP4-FP8")
    assert quantization.producer == "compressed-tensors"
    assert quantization.algo == "MIXED_PRECISION"
    assert quantization.group_size == 16
    assert quantization.algo_of("layers.3.attn.wq_b") == "FP8_BLOCK"
    assert quantization.algo_of("layers.3.ffn.experts.7.gate_proj") == "NVFP4"
    assert quantization.algo_of("layers.3.ffn.gate") is None
    assert quantization.stores_input_scale("layers.3.ffn.experts.7.gate_proj")
    assert not quantization.stores_input_scale("layers.3.attn.wq_b")


@pytest.mark.parametrize("algo", ["fp8_pb_wo", "FP8_PB_WO", "fp8_pb_real", "FP8_BLOCK_SCALES"])
def test_modelopts_fp8_in_tiles_has_one_name_and_no_input_scale(algo: str) -> None:
    for declared in ({"quant_algo": algo}, {"quantized_layers": {MODULE: {"quant_algo": algo}}}):
        quantization = from_hf_quant_config({"quantization": declared})
        assert quantization.algo_of(MODULE) == "FP8_BLOCK"
        assert not quantization.stores_input_scale(MODULE)


def test_modelopts_fp8_by_channel_and_token_stores_no_input_scale() -> None:
    declared = {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    assert not from_hf_quant_config({"quantization": declared}).stores_input_scale(MODULE)
    assert from_hf_quant_config({"quantization": {"quant_algo": "FP8"}}).stores_input_scale(MODULE)


@pytest.mark.parametrize(
    ("weights", "algo", "block"),
    [
        ({"strategy": "block", "block_structure": [128, 128]}, "FP8_BLOCK", (128, 128)),
        ({"strategy": "block", "block_structure": [64, 32]}, "FP8_BLOCK", (64, 32)),
        ({"strategy": "block", "block_structure": [128]}, "FP8_BLOCK", None),
        ({"strategy": "channel"}, "FP8", None),
        ({"strategy": "tensor", "type": "int"}, "mixed-precision", None),
        ({"strategy": "channel", "num_bits": 4}, "mixed-precision", None),
    ],
)
def test_a_group_of_a_mixture_is_known_by_its_numbers_where_it_names_no_format(
    weights: dict[str, Any], algo: str, block: tuple[int, int] | None
) -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", **weights}}
    declared = {"quant_method": "compressed-tensors", "format": "mixed-precision"}
    declared["config_groups"] = {"group_0": group}
    quantization = from_config({"quantization_config": declared})
    assert quantization.algo_of(MODULE) == algo
    assert quantization.weight_block_size == block
    assert bool(quantization.problems) == (weights.get("block_structure") == [128])


def test_integer_quantisation_is_named_by_its_format(goldens: Path) -> None:
    quantization = config_of(goldens, "moonshotai--Kimi-K2.5")
    assert quantization.algo_of("model.layers.3.mlp.experts.0.up_proj") == "pack-quantized"
    assert quantization.algo_of("model.layers.0.mlp.up_proj") is None
    assert not quantization.is_nvfp4


def test_deepseeks_fp8_has_its_tile_and_scale_format(goldens: Path) -> None:
    quantization = config_of(goldens, "deepseek-ai--DeepSeek-V3.2")
    assert quantization.producer == "deepseek-fp8"
    assert quantization.algo == "FP8_BLOCK"
    assert quantization.weight_block_size == (128, 128)
    assert quantization.scale_fmt == "ue8m0"
    assert config_of(goldens, "deepseek-ai--DeepSeek-R1").scale_fmt is None


def test_a_config_without_a_word_declares_nothing() -> None:
    for config in ({}, {"quantization_config": None}, {"quantization_config": {}}):
        quantization = from_config(config)
        assert quantization.producer is None
        assert quantization.algo_of("model.layers.0.mlp.up_proj") is None


def test_another_method_is_named_and_not_understood() -> None:
    quantization = from_config({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert quantization.producer == "gptq"
    assert not quantization.understood
    assert not from_config({"quantization_config": {"bits": 4}}).understood


def test_modelopts_word_counts_before_a_stale_one(golden: SimpleNamespace) -> None:
    checkpoint = open_checkpoint(golden.nvfp4_raw)
    assert checkpoint.config_quantization is not None
    assert checkpoint.config_quantization.algo == "FP8_BLOCK"
    assert checkpoint.quantization.algo == "NVFP4"


def test_with_neither_file_nothing_is_declared_and_problems_are_kept() -> None:
    broken = from_config({"quantization_config": 3})
    assert effective(None, None) == QuantConfig()
    assert effective(None, broken).problems == broken.problems != ()


WRONG: list[Any] = [3, -1, 0, 1.5, math.nan, True, "x", [], [1], {}, {"a": 1}, [["x"]]]


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize(
    "field",
    ["quant_algo", "group_size", "kv_cache_quant_algo", "exclude_modules", "quantized_layers"],
)
def test_a_field_of_any_type_is_read_or_noted(field: str, value: object) -> None:
    base: dict[str, object] = {"quant_algo": "NVFP4", "group_size": 16}
    quantization = from_hf_quant_config({"quantization": {**base, field: value}})
    found: dict[str, object] = {
        "quant_algo": quantization.algo,
        "group_size": quantization.group_size,
        "kv_cache_quant_algo": quantization.kv_cache_algo,
        "exclude_modules": list(quantization.exclude),
        "quantized_layers": quantization.quantized_layers,
    }
    kept = type(found[field]) is type(value) and found[field] == value
    assert kept or quantization.problems
    assert all(field in problem for problem in quantization.problems)
    quantization.algo_of("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize(
    "field",
    ["config_groups", "ignore", "format", "version", "kv_cache_scheme", "targets", "weights"],
)
def test_compressed_tensors_of_any_form_is_read_or_noted(field: str, value: object) -> None:
    group: dict[str, object] = {"targets": ["Linear"], "weights": {"num_bits": 4}}
    fields: dict[str, object] = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": group},
    }
    (group if field in group else fields)[field] = value
    quantization = from_config({"quantization_config": fields})
    assert quantization.producer == "compressed-tensors"
    quantization.algo_of("model.layers.0.mlp.up_proj")
    quantization.stores_input_scale("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("size", [128, [128], [128, 0], [128, -1], [128, "128"], [True, True], {}])
def test_a_tile_that_is_no_pair_of_sizes_is_noted(size: object) -> None:
    fields = {"quant_method": "fp8", "weight_block_size": size}
    quantization = from_config({"quantization_config": fields})
    assert quantization.weight_block_size is None
    assert "weight_block_size" in quantization.problems[0]
