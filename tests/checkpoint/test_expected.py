import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvfp4check.checkpoint.expected import Expected, expected_tensors, supports
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.quant_config import (
    QuantConfig,
    effective,
    from_config,
    from_hf_quant_config,
)


def published(goldens: Path, name: str, quantised: str | None = None) -> Expected:
    """Expected tensors of a published config.json, with a published hf_quant_config.json."""
    config = json.loads((goldens / "configs" / f"{name}_config.json").read_text())
    hf = None
    if quantised:
        path = goldens / "configs" / f"{quantised}_hf_quant_config.json"
        hf = from_hf_quant_config(json.loads(path.read_text()))
    return expected_tensors(config, effective(hf, from_config(config)))


def listed(path: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor that a table of patterns stands for."""
    for line in path.read_text().splitlines()[1:]:
        pattern, dtype, shape, layers = line.split("\t")
        first, _, last = layers.partition("-")
        numbers = range(int(first), int(last) + 1) if first else range(1)
        for layer in numbers:
            for expert in range(256) if "{e}" in pattern else range(1):
                name = pattern.format(i=layer, e=expert)
                yield name, dtype, tuple(json.loads(shape))


V31 = "nvidia--DeepSeek-V3.1-NVFP4"


def test_deepseek_v3_1_nvfp4_has_its_tensors_bytes_and_quantised_linears(goldens: Path) -> None:
    expected = published(goldens, V31, V31)
    assert expected.problems == ()
    assert expected.required == 180_547
    assert expected.nbytes == 413_306_995_616
    codes = [t for t in expected.tensors.values() if t.dtypes == ("U8",)]
    assert len(codes) == 44_788
    assert expected.mtp_layers == (61,)


def test_deepseek_v3_fp8_has_its_tensors_and_bytes(goldens: Path) -> None:
    expected = published(goldens, "deepseek-ai--DeepSeek-V3")
    assert expected.problems == ()
    assert expected.required == 91_991
    assert expected.nbytes == 688_574_839_360


def test_deepseek_v3_0324_nvfp4_quantises_no_attention(goldens: Path) -> None:
    expected = published(goldens, V31, "nvidia--DeepSeek-V3-0324-NVFP4")
    assert expected.required == 180_364
    codes = [t.name for t in expected.tensors.values() if t.dtypes == ("U8",)]
    assert len(codes) == 44_727
    assert not any("self_attn" in name for name in codes)


@pytest.mark.parametrize(
    ("table", "config", "quantised"),
    [
        ("deepseek_v3_fp8.tsv", "deepseek-ai--DeepSeek-V3", None),
        ("deepseek_v31_nvfp4_mlp_o.tsv", V31, V31),
        ("deepseek_v3_nvfp4_mlp.tsv", V31, "nvidia--DeepSeek-V3-0324-NVFP4"),
    ],
)
def test_every_name_dtype_and_shape_is_that_of_the_published_table(
    goldens: Path, table: str, config: str, quantised: str | None
) -> None:
    expected = published(goldens, config, quantised).tensors
    rows = {name: (dtype, shape) for name, dtype, shape in listed(goldens / "expected" / table)}
    found = {name: (t.dtypes[0], t.shape) for name, t in expected.items() if name in rows}
    assert found == rows
    assert {name for name, t in expected.items() if not t.optional} <= rows.keys()


def test_an_indexer_belongs_to_the_attention_of_deepseek_v3_2(goldens: Path) -> None:
    name = "nvidia--DeepSeek-V3.2-NVFP4"
    expected = published(goldens, name, name)
    assert expected.problems == ()
    indexer = {
        key.partition("indexer.")[2]: (tensor.dtypes[0], tensor.shape)
        for key, tensor in expected.tensors.items()
        if key.startswith("model.layers.7.self_attn.indexer.")
    }
    assert indexer == {
        "wq_b.weight": ("BF16", (64 * 128, 1536)),
        "wk.weight": ("BF16", (128, 7168)),
        "weights_proj.weight": ("BF16", (64, 7168)),
        "k_norm.weight": ("BF16", (128,)),
        "k_norm.bias": ("BF16", (128,)),
    }
    assert sum(t.dtypes == ("U8",) for t in expected.tensors.values()) == 44_788


def test_kimi_k2_has_no_mtp_layer_and_384_experts(goldens: Path) -> None:
    expected = published(goldens, "moonshotai--Kimi-K2-Instruct")
    assert expected.problems == ()
    assert expected.mtp_layers == ()
    assert "model.layers.60.mlp.experts.383.down_proj.weight_scale_inv" in expected.tensors


def agrees(expected: Expected, checkpoint: Any, absent: str = "") -> None:
    """Every stored tensor is expected as it is, and every required one is stored."""
    assert expected.problems == ()
    for name, entry in checkpoint.tensors.items():
        assert entry.dtype in expected.tensors[name].dtypes, name
        assert expected.tensors[name].accepts_shape(entry.shape), name
    missing = {name for name, t in expected.tensors.items() if not t.optional}
    missing -= checkpoint.tensors.keys()
    assert all(absent and name.startswith(absent) for name in missing), sorted(missing)[:3]


@pytest.mark.parametrize("which", ["bf16", "fp8", "nvfp4", "nvfp4_raw"])
def test_the_trained_checkpoints_hold_exactly_what_is_expected(
    golden: SimpleNamespace, which: str
) -> None:
    checkpoint = open_checkpoint(getattr(golden, which))
    assert checkpoint.config is not None
    expected = expected_tensors(checkpoint.config, checkpoint.quantization)
    agrees(expected, checkpoint)
    assert expected.required == len(checkpoint.tensors)
    assert expected.nbytes == checkpoint.nbytes


def test_compressed_tensors_quantises_attention_too_and_lacks_only_mtp(
    golden: SimpleNamespace,
) -> None:
    checkpoint = open_checkpoint(golden.ct)
    assert checkpoint.config is not None
    expected = expected_tensors(checkpoint.config, checkpoint.quantization)
    agrees(expected, checkpoint, absent="model.layers.4.")
    assert "model.layers.0.self_attn.q_a_proj.weight_packed" in checkpoint.tensors


@pytest.mark.parametrize(
    ("name", "mtp"),
    [
        ("bf16", "model.layers.4."),
        ("llm-compressor", "model.layers.5."),
        ("modelopt-deepseek-example", ""),
    ],
)
def test_real_headers_hold_what_is_expected(
    headers_only: Callable[[str], Path], name: str, mtp: str
) -> None:
    checkpoint = open_checkpoint(headers_only(name))
    assert checkpoint.config is not None
    agrees(expected_tensors(checkpoint.config, checkpoint.quantization), checkpoint, absent=mtp)


@pytest.mark.parametrize("name", ["modelopt-default", "modelopt-mlp-only"])
def test_modelopts_own_export_departs_in_the_router_bias_alone(
    headers_only: Callable[[str], Path], name: str
) -> None:
    checkpoint = open_checkpoint(headers_only(name))
    assert checkpoint.config is not None
    expected = expected_tensors(checkpoint.config, checkpoint.quantization).tensors
    wrong = {
        key
        for key, entry in checkpoint.tensors.items()
        if key not in expected
        or entry.dtype not in expected[key].dtypes
        or not expected[key].accepts_shape(entry.shape)
    }
    assert wrong
    assert all(key.endswith("mlp.gate.e_score_correction_bias") for key in wrong)


SMALL: dict[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "vocab_size": 128,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
}


def small(**changes: object) -> Expected:
    return expected_tensors({**SMALL, **changes}, QuantConfig())


def test_queries_without_a_bottleneck_have_one_projection() -> None:
    names = small(q_lora_rank=None).tensors
    assert names["model.layers.0.self_attn.q_proj.weight"].shape == (24, 64)
    assert not any("q_a_" in name or "q_b_" in name for name in names)


def test_every_second_layer_is_a_mixture_with_frequency_two() -> None:
    names = small(num_hidden_layers=5, moe_layer_freq=2).tensors
    moe = [layer for layer in range(5) if f"model.layers.{layer}.mlp.gate.weight" in names]
    assert moe == [2, 4]


def test_a_model_without_experts_is_dense_throughout() -> None:
    names = small(n_routed_experts=None, moe_intermediate_size=None).tensors
    assert "model.layers.1.mlp.down_proj.weight" in names
    assert not any(".experts." in name for name in names)


def test_a_tied_head_may_be_left_out() -> None:
    assert small(tie_word_embeddings=True).tensors["lm_head.weight"].optional
    assert not small().tensors["lm_head.weight"].optional


def test_attention_bias_adds_three_biases_a_layer() -> None:
    names = [name for name in small(attention_bias=True).tensors if name.endswith("_proj.bias")]
    names += [name for name in small(attention_bias=True).tensors if name.endswith("mqa.bias")]
    assert len(names) == 6


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -1, 0, 2**40, 10**400, "61", True, 1.5, [], {}, None]
)
@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_size_that_is_none_is_a_problem_with_its_name(name: str, value: object) -> None:
    expected = small(**{name: value})
    assert expected.tensors == {}
    assert any(name in problem for problem in expected.problems)


def test_a_config_that_asks_for_a_trillion_tensors_makes_none() -> None:
    expected = small(num_hidden_layers=1_000_000, n_routed_experts=1_000_000)
    assert expected.tensors == {}
    assert "1,000,000 layers of 1,000,000 experts" in expected.problems[0]


def test_every_size_missing_is_listed_at_once() -> None:
    expected = expected_tensors({"architectures": ["DeepseekV3ForCausalLM"]}, QuantConfig())
    assert len(expected.problems) == 9


@pytest.mark.parametrize("architectures", [None, [], [3], "DeepseekV3ForCausalLM", ["LlamaModel"]])
def test_another_architecture_is_said_to_have_no_map(architectures: object) -> None:
    expected = expected_tensors({"architectures": architectures}, QuantConfig())
    assert expected.tensors == {}
    assert "no map of tensors for architecture" in expected.problems[0]


def test_an_unknown_method_or_algorithm_is_said_to_have_no_map() -> None:
    method = QuantConfig(producer="gptq", understood=False)
    assert "'gptq'" in expected_tensors(SMALL, method).problems[0]
    algorithm = QuantConfig(producer="modelopt", algo="W4A16_AWQ")
    assert "'W4A16_AWQ'" in expected_tensors(SMALL, algorithm).problems[0]


def test_support_is_by_architecture() -> None:
    assert supports("DeepseekV3ForCausalLM")
    assert supports("DeepseekV32ForCausalLM")
    assert not supports("Qwen3MoeForCausalLM")
    assert not supports(None)


def test_a_scalar_may_be_stored_with_one_dimension(goldens: Path) -> None:
    name = "model.layers.3.mlp.experts.0.up_proj.weight_scale_2"
    scale = published(goldens, V31, V31).tensors[name]
    assert scale.accepts_shape(())
    assert scale.accepts_shape((1,))
    assert not scale.accepts_shape((2048,))
    assert not scale.accepts_shape((1, 1))
