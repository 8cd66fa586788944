"""NV101 to NV109: each fires on its planted fault, alone, and names the place."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.checkpoint.validation import ValidationOptions, ValidationResult, validate
from nvfp4check.findings import Finding, Severity

INDEX = "model.safetensors.index.json"
HF_QUANT = "hf_quant_config.json"
NORM = "model.layers.2.input_layernorm.weight"
BIAS = "model.layers.3.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.3.mlp.experts.2.down_proj"
LAST = 5  # the MTP layer of the golden


def run(path: Path | CheckpointEditor) -> ValidationResult:
    directory = path
    if isinstance(path, CheckpointEditor):
        directory = path.path
        if (directory / INDEX).exists():  # other sizes of tensors are not the planted fault
            with path.edit_json(INDEX) as index:
                total = sum(entry.nbytes for entry in path.entries().values())
                index["metadata"]["total_size"] = total
    return validate(open_checkpoint(directory), ValidationOptions(level=RuleLevel.HEADERS))


def only(path: Path | CheckpointEditor, rule: str) -> list[Finding]:
    """Give the findings of a checkpoint, and see that no other rule has any."""
    result = run(path)
    assert {finding.rule for finding in result.findings} == {rule}
    return list(result.findings)


def errors(result: ValidationResult) -> set[str]:
    return {f.rule for f in result.findings if f.severity is Severity.ERROR}


def bfloat16(clone: CheckpointEditor, name: str, shape: tuple[int, ...]) -> None:
    """Store a weight as BF16, of ones."""
    data = np.full(shape, 0x3F80, "<u2").tobytes()
    clone.replace(name, data, dtype="BF16", shape=shape)


def unquantise(clone: CheckpointEditor, module: str) -> None:
    """Store a linear as an exporter does that met no calibration data for it."""
    rows, half = clone.entry(f"{module}.weight").shape
    bfloat16(clone, f"{module}.weight", (rows, 2 * half))
    for part in ("weight_scale", "weight_scale_2", "input_scale"):
        clone.drop(f"{module}.{part}")


def quantise(clone: CheckpointEditor, module: str) -> None:
    """Store a linear as NVFP4, of ones."""
    rows, columns = clone.entry(f"{module}.weight").shape
    shard = clone.entry(f"{module}.weight").shard
    codes, scales = (rows, columns // 2), (rows, columns // 16)
    clone.replace(f"{module}.weight", b"\x22" * (rows * columns // 2), dtype="U8", shape=codes)
    one = np.float32(1).tobytes()
    for name, data, dtype, shape in (
        ("weight_scale", b"\x38" * (scales[0] * scales[1]), "F8_E4M3", scales),
        ("weight_scale_2", one, "F32", ()),
        ("input_scale", one, "F32", ()),
    ):
        clone.add(f"{module}.{name}", data, dtype=dtype, shape=shape, shard=shard)


@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight", BIAS, "lm_head.weight"])
def test_nv101_names_the_tensor_that_is_nowhere(clone: CheckpointEditor, name: str) -> None:
    shape = [*clone.entry(name).shape]
    clone.drop(name)
    [finding] = only(clone, "NV101")
    assert (finding.tensor, finding.expected) == (name, shape)


def test_a_whole_weight_that_is_gone_is_one_finding(clone: CheckpointEditor) -> None:
    for part in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        clone.drop(f"{EXPERT}.{part}")
    [finding] = only(clone, "NV101")
    assert finding.tensor == f"{EXPERT}.weight"


def test_a_tensor_that_the_index_names_is_not_called_missing(clone: CheckpointEditor) -> None:
    clone.drop(NORM, index=False)
    [finding] = only(clone, "NV003")
    assert finding.tensor == NORM


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.0.gate_proj.input_quantizer._amax",
        "base_model.model.layers.0.self_attn.o_proj.base_layer.weight",
        f"model.layers.{LAST + 1}.input_layernorm.weight",
        "model.layers.3.mlp.experts.16.up_proj.weight",
    ],
)
def test_nv102_names_the_tensor_without_a_place(clone: CheckpointEditor, name: str) -> None:
    clone.add(name, b"\0\0", dtype="BF16", shape=(1,))
    [finding] = only(clone, "NV102")
    entry = clone.entry(name)
    assert (finding.tensor, finding.shard, finding.offset) == (name, entry.shard, entry.start)
    assert finding.severity is Severity.WARNING


def test_scales_of_the_kv_cache_have_their_place(clone: CheckpointEditor) -> None:
    one = np.float32(1).tobytes()
    for part in ("k_proj.k_scale", "v_proj.v_scale"):
        clone.add(f"model.layers.1.self_attn.{part}", one, dtype="F32", shape=())
    assert run(clone).findings == ()


def test_an_mtp_layer_that_nobody_promised_is_unexpected(clone: CheckpointEditor) -> None:
    with clone.edit_json("config.json") as config:
        config["num_nextn_predict_layers"] = 0
    findings = only(clone, "NV102")
    assert all(f.tensor and f.tensor.startswith(f"model.layers.{LAST}.") for f in findings)


def test_nv103_says_that_a_weight_is_transposed(clone: CheckpointEditor) -> None:
    name = "model.layers.3.mlp.gate.weight"
    shape = clone.entry(name).shape
    clone.reshape(name, shape[::-1])
    [finding] = only(clone, "NV103")
    assert (finding.tensor, finding.observed) == (name, [*shape[::-1]])
    assert finding.expected == [*shape]
    assert "transposed" in finding.message


def test_nv103_says_that_codes_are_not_packed(clone: CheckpointEditor) -> None:
    rows, half = clone.entry(f"{EXPERT}.weight").shape
    clone.replace(f"{EXPERT}.weight", b"\2" * (2 * rows * half), shape=(rows, 2 * half))
    [finding] = only(clone, "NV103")
    assert (finding.tensor, finding.expected) == (f"{EXPERT}.weight", [rows, half])
    assert "not packed" in finding.message


def test_nv103_wants_one_global_scale_a_weight(clone: CheckpointEditor) -> None:
    name = f"{EXPERT}.weight_scale_2"
    clone.replace(name, np.ones(4, "<f4").tobytes(), shape=(4,))
    [finding] = only(clone, "NV103")
    assert (finding.tensor, finding.observed) == (name, [4])


def test_one_element_may_be_a_scalar_or_a_vector(clone: CheckpointEditor) -> None:
    clone.reshape(f"{EXPERT}.weight_scale_2", (1,))
    assert run(clone).findings == ()


def test_nv104_wants_the_routers_bias_in_float32(clone: CheckpointEditor) -> None:
    bfloat16(clone, BIAS, clone.entry(BIAS).shape)
    [finding] = only(clone, "NV104")
    assert (finding.tensor, finding.observed, finding.expected) == (BIAS, "BF16", "F32")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8", "I8"])
def test_nv104_sees_a_norm_of_one_byte_an_element(clone: CheckpointEditor, dtype: str) -> None:
    shape = clone.entry(NORM).shape
    clone.replace(NORM, b"\x38" * shape[0], dtype=dtype)
    [finding] = only(clone, "NV104")
    assert (finding.tensor, finding.observed) == (NORM, dtype)


@pytest.mark.parametrize(
    ("part", "dtype"),
    [
        ("weight", "I8"),
        ("weight", "F8_E4M3"),
        ("weight_scale", "U8"),
        ("weight_scale", "F8_E5M2"),
        ("weight_scale", "F8_E8M0"),
    ],
)
def test_nv104_sees_a_part_of_another_dtype(clone: CheckpointEditor, part: str, dtype: str) -> None:
    name = f"{EXPERT}.{part}"
    clone.replace(name, clone.raw(name).tobytes(), dtype=dtype)
    findings = [f for f in run(clone).findings if f.rule != "NV103"]
    [finding] = findings
    assert (finding.rule, finding.tensor, finding.observed) == ("NV104", name, dtype)


def test_nv104_sees_block_scales_converted_to_bfloat16(clone: CheckpointEditor) -> None:
    name = f"{EXPERT}.weight_scale"
    bfloat16(clone, name, clone.entry(name).shape)
    [finding] = only(clone, "NV104")
    assert (finding.tensor, finding.expected) == (name, "F8_E4M3")


def test_nv104_sees_an_excluded_linear_left_in_fp8(clone: CheckpointEditor) -> None:
    name = "model.layers.1.self_attn.q_a_proj.weight"
    shape = clone.entry(name).shape
    clone.replace(name, b"\x38" * (shape[0] * shape[1]), dtype="F8_E4M3")
    clone.add(
        name.replace("weight", "weight_scale_inv"),
        np.ones((1, 2), "<f4").tobytes(),
        dtype="F32",
        shape=(1, 2),
    )
    [finding] = only(clone, "NV104")
    assert (finding.tensor, finding.observed) == (name, "F8_E4M3")


def test_nv104_sees_a_linear_of_an_fp8_model_in_bfloat16(
    golden: SimpleNamespace, clone_of: Callable[[Path], CheckpointEditor]
) -> None:
    clone = clone_of(golden.fp8)
    name = "model.layers.1.self_attn.q_a_proj.weight"
    bfloat16(clone, name, clone.entry(name).shape)
    clone.drop(f"{name}_scale_inv")
    [finding] = only(clone, "NV104")
    assert (finding.tensor, finding.expected) == (name, "F8_E4M3")


def test_nv105_names_the_quantised_weight_that_is_excluded(clone: CheckpointEditor) -> None:
    quantise(clone, "model.layers.2.self_attn.q_b_proj")
    [finding] = only(clone, "NV105")
    assert finding.tensor == "model.layers.2.self_attn.q_b_proj.weight"


def test_nv105_sees_an_exclude_pattern_that_covers_too_much(clone: CheckpointEditor) -> None:
    with clone.edit_json(HF_QUANT) as config:
        config["quantization"]["exclude_modules"].append("model.layers.4.mlp.shared_experts*")
    findings = only(clone, "NV105")
    assert [f.tensor for f in findings] == [
        f"model.layers.4.mlp.shared_experts.{name}_proj.weight" for name in ("down", "gate", "up")
    ]


def test_nv106_names_the_expert_that_met_no_calibration_token(clone: CheckpointEditor) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        unquantise(clone, f"model.layers.2.mlp.experts.7.{name}")
    findings = only(clone, "NV106")
    assert {f.tensor for f in findings} == {
        f"model.layers.2.mlp.experts.7.{name}_proj.weight" for name in ("gate", "up", "down")
    }
    assert all((f.observed, f.expected) == ("BF16", "NVFP4") for f in findings)


def test_nv106_needs_no_map_where_a_sibling_is_quantised(clone: CheckpointEditor) -> None:
    unquantise(clone, EXPERT)
    with clone.edit_json("config.json") as config:
        config["architectures"] = ["SomebodysForCausalLM"]
    result = run(clone)
    [finding] = [f for f in result.findings if f.severity is Severity.ERROR]
    assert (finding.rule, finding.tensor) == ("NV106", f"{EXPERT}.weight")
    assert {f.rule for f in result.findings} == {"NV106", "NV606"}


def test_nv106_is_silent_where_an_exclude_pattern_covers_the_module(
    clone: CheckpointEditor,
) -> None:
    unquantise(clone, EXPERT)
    with clone.edit_json(HF_QUANT) as config:
        config["quantization"]["exclude_modules"].append(EXPERT)
    # NV605: engines build all experts of a layer alike, so one cannot be left out.
    found = run(clone).findings
    assert {f.rule for f in found} == {"NV605"}
    assert any("sglang does not exclude 1 module" in f.message for f in found)


@pytest.mark.parametrize(
    ("part", "lacking"),
    [
        ("weight_scale", ["block-scales"]),
        ("weight_scale_2", ["global-scale"]),
        ("weight", ["codes"]),
    ],
)
def test_nv107_names_the_part_that_is_missing(
    clone: CheckpointEditor, part: str, lacking: list[str]
) -> None:
    clone.drop(f"{EXPERT}.{part}")
    [finding] = only(clone, "NV107")
    assert finding.expected == lacking
    assert finding.tensor is not None
    assert finding.tensor.startswith(EXPERT)
    assert finding.shard == clone.entry(finding.tensor).shard


def test_nv107_counts_both_missing_scales_as_one_defect(clone: CheckpointEditor) -> None:
    clone.drop(f"{EXPERT}.weight_scale")
    clone.drop(f"{EXPERT}.weight_scale_2")
    [finding] = only(clone, "NV107")
    assert finding.expected == ["block-scales", "global-scale"]


def test_nv107_sees_scales_left_beside_a_weight_that_was_exchanged(
    clone: CheckpointEditor,
) -> None:
    rows, half = clone.entry(f"{EXPERT}.weight").shape
    bfloat16(clone, f"{EXPERT}.weight", (rows, 2 * half))
    [finding] = only(clone, "NV107")
    assert finding.expected == ["codes"]


def test_a_partner_that_the_index_names_is_not_called_missing(clone: CheckpointEditor) -> None:
    clone.drop(f"{EXPERT}.weight_scale", index=False)
    [finding] = only(clone, "NV003")
    assert finding.tensor == f"{EXPERT}.weight_scale"


@pytest.mark.parametrize("which", ["ct", "bf16"])
def test_nv109_tells_once_that_the_mtp_layer_was_dropped(
    golden: SimpleNamespace, clone_of: Callable[[Path], CheckpointEditor], which: str
) -> None:
    clone = clone_of(getattr(golden, which))
    for name in [*clone.entries()]:
        if name.startswith(f"model.layers.{LAST}."):
            clone.drop(name)
    result = run(clone)
    [finding] = [f for f in result.findings if f.severity is Severity.ERROR]
    assert finding.rule == "NV109"
    assert finding.tensor is not None
    assert finding.tensor.startswith("model.layers.")
    assert finding.count == finding.expected


def test_nv109_names_what_an_incomplete_mtp_layer_lacks(clone: CheckpointEditor) -> None:
    clone.drop(f"model.layers.{LAST}.eh_proj.weight")
    [finding] = only(clone, "NV109")
    assert finding.tensor == f"model.layers.{LAST}.eh_proj.weight"


def test_nv109_names_an_mtp_weight_quantised_against_the_exclude_list(
    clone: CheckpointEditor,
) -> None:
    module = f"model.layers.{LAST}.mlp.shared_experts.up_proj"
    quantise(clone, module)
    [finding] = only(clone, "NV109")
    assert finding.tensor == f"{module}.weight"


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("bf16", {"NV109"}),
        ("llm-compressor", {"NV109"}),
        ("modelopt-default", {"NV104", "NV109"}),
        ("modelopt-mlp-only", {"NV104", "NV109"}),
        ("modelopt-deepseek-example", {"NV602"}),
    ],
)
def test_the_real_headers_of_each_producer_owe_these_errors(
    headers_only: Callable[[str], Path], name: str, rules: set[str]
) -> None:
    result = run(headers_only(name))
    assert errors(result) == rules
    wrong = [f.tensor for f in result.findings if f.rule == "NV104"]
    assert all(tensor and tensor.endswith("e_score_correction_bias") for tensor in wrong)
