"""NV601 to NV608: each fires on its planted fault, alone, and names the file."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules import RULES
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.checkpoint.validation import ValidationOptions, ValidationResult, validate
from nvfp4check.findings import Finding, Severity, Verdict

CONFIG, HF_QUANT, GENERATION = "config.json", "hf_quant_config.json", "generation_config.json"
TOKENIZER = "tokenizer.json"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
STRUCTURE = {"NV101", "NV102", "NV103", "NV104", "NV109"}


def run(path: Path | CheckpointEditor) -> ValidationResult:
    directory = path.path if isinstance(path, CheckpointEditor) else path
    return validate(open_checkpoint(directory), ValidationOptions(level=RuleLevel.HEADERS))


def only(path: Path | CheckpointEditor, rule: str) -> list[Finding]:
    """Give the findings of a checkpoint, and see that no other rule has any."""
    result = run(path)
    assert {finding.rule for finding in result.findings} == {rule}
    return list(result.findings)


def both_configs(clone: CheckpointEditor, **changes: object) -> None:
    """Let config.json say what hf_quant_config.json says, as newer exports do; then change it."""
    hf = json.loads((clone.path / HF_QUANT).read_text())["quantization"]
    scheme = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group = {"weights": scheme, "input_activations": scheme, "targets": ["Linear"]}
    with clone.edit_json(CONFIG) as config:
        config["quantization_config"] = {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "config_groups": {"group_0": group},
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "ignore": hf["exclude_modules"],
            **changes,
        }


def test_nv601_wants_a_quantisation_config(clone: CheckpointEditor) -> None:
    clone.drop_file(HF_QUANT)
    [finding] = only(clone, "NV601")
    assert (finding.severity, finding.count) == (Severity.ERROR, 212)


def test_a_quantisation_config_that_cannot_be_read_is_not_missing(clone: CheckpointEditor) -> None:
    clone.write_file(HF_QUANT, "{")
    [finding] = only(clone, "NV010")
    assert finding.shard == HF_QUANT


def test_nv602_names_the_fp8_config_that_was_left(clone: CheckpointEditor) -> None:
    with clone.edit_json(CONFIG) as config:
        config["quantization_config"] = FP8
    [finding] = only(clone, "NV602")
    assert (finding.shard, finding.observed, finding.count) == (CONFIG, "fp8", 212)


@pytest.mark.parametrize(
    "declared",
    [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"bits": 4}, FP8],
    ids=["bitsandbytes", "unnamed", "fp8"],
)
def test_nv602_needs_no_second_config(clone: CheckpointEditor, declared: dict[str, Any]) -> None:
    clone.drop_file(HF_QUANT)
    with clone.edit_json(CONFIG) as config:
        config["quantization_config"] = declared
    [finding] = only(clone, "NV602")
    assert finding.shard == CONFIG


def test_an_fp8_checkpoint_may_say_that_it_is_fp8(golden: SimpleNamespace) -> None:
    assert run(golden.fp8).findings == ()


def test_two_configs_of_one_export_agree(clone: CheckpointEditor) -> None:
    both_configs(clone)
    assert run(clone).findings == ()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"quant_algo": "NVFP4_AWQ"}, "quant_algo"),
        ({"kv_cache_scheme": None}, "kv_cache_quant_algo"),
        ({"ignore": ["lm_head"]}, "exclude lists"),
    ],
)
def test_nv603_names_the_field_that_contradicts(
    clone: CheckpointEditor, changes: dict[str, Any], field: str
) -> None:
    both_configs(clone, **changes)
    [finding] = only(clone, "NV603")
    assert finding.shard == CONFIG
    assert field in finding.message


def test_nv603_compares_what_patterns_cover_and_not_their_spelling(
    clone: CheckpointEditor,
) -> None:
    hf = json.loads((clone.path / HF_QUANT).read_text())["quantization"]
    patterns = [name for name in hf["exclude_modules"] if name != "model.layers.5*"]
    both_configs(clone, ignore=[*patterns, "model.layers.5", "model.layers.5.*"])
    assert run(clone).findings == ()


def test_nv603_names_a_layer_that_only_one_config_quantises(clone: CheckpointEditor) -> None:
    layers = {"a.b": {"quant_algo": "NVFP4", "group_size": 16}}
    both_configs(clone, quant_algo="MIXED_PRECISION", quantized_layers=layers)
    with clone.edit_json(HF_QUANT) as hf:
        hf["quantization"]["quant_algo"] = "MIXED_PRECISION"
        hf["quantization"]["quantized_layers"] = {"a.c": {"quant_algo": "NVFP4", "group_size": 16}}
    findings = [f for f in run(clone).findings if f.rule == "NV603"]
    [finding] = findings
    assert finding.count == 2
    assert "a.b, a.c" in finding.message


@pytest.mark.parametrize("size", [32, 8, 128, "16", 16.0, True, 0])
def test_nv604_names_a_group_size_that_is_not_16(clone: CheckpointEditor, size: object) -> None:
    with clone.edit_json(HF_QUANT) as hf:
        hf["quantization"]["group_size"] = size
    found = [f for f in run(clone).findings if f.severity is Severity.ERROR]
    [finding] = [f for f in found if f.rule == "NV604"]
    assert (finding.shard, finding.expected) == (HF_QUANT, 16)
    # A value of the wrong type is a flaw of form as well.
    assert {f.rule for f in found} <= {"NV604", "NV010"}
    assert ("NV010" in {f.rule for f in found}) == (type(size) is not int or size == 0)


def test_nv604_names_a_missing_group_size(clone: CheckpointEditor) -> None:
    with clone.edit_json(HF_QUANT) as hf:
        del hf["quantization"]["group_size"]
    [finding] = only(clone, "NV604")
    assert finding.message.endswith("is missing, expected 16; vLLM refuses the file without it")


def test_nv604_looks_into_config_groups(clone: CheckpointEditor) -> None:
    scheme = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 32}
    groups = {"group_0": {"weights": scheme, "input_activations": scheme, "targets": ["Linear"]}}
    both_configs(clone, config_groups=groups)
    rules = {f.rule for f in run(clone).findings}
    assert rules == {"NV603", "NV604"}


def test_nv605_names_the_pattern_that_covers_nothing(clone: CheckpointEditor) -> None:
    with clone.edit_json(HF_QUANT) as hf:
        hf["quantization"]["exclude_modules"].append("model.layers.*.self_atn*")
    [finding] = only(clone, "NV605")
    assert (finding.observed, finding.severity) == ("model.layers.*.self_atn*", Severity.WARNING)
    assert finding.shard == HF_QUANT


def test_nv605_names_a_pattern_that_vllm_reads_as_a_substring(clone: CheckpointEditor) -> None:
    with clone.edit_json(HF_QUANT) as hf:
        hf["quantization"]["exclude_modules"].append("layers.5.mlp.experts.1")
    result = run(clone)
    assert {f.rule for f in result.findings} == {"NV605"}
    assert any("covers no module" in f.message for f in result.findings)


def test_nv605_tells_how_engines_differ_on_a_pattern_without_a_wildcard(
    clone: CheckpointEditor,
) -> None:
    with clone.edit_json(HF_QUANT) as hf:
        hf["quantization"]["exclude_modules"].append("model.layers.1.mlp.experts.1")
    found = run(clone).findings
    differing = [f for f in found if f.rule == "NV605"]
    # To vLLM an expert stands for its whole layer; SGLang does not look below the named module.
    assert any("vllm also excludes 45 modules" in f.message for f in differing)
    assert any("sglang does not exclude 3 modules" in f.message for f in differing)
    assert {f.rule for f in found} == {"NV105", "NV605"}


@pytest.mark.parametrize("architectures", [["SomebodysForCausalLM"], [], None, "text", [3]])
def test_nv606_says_what_was_skipped_and_the_rest_runs(
    clone: CheckpointEditor, architectures: object
) -> None:
    with clone.edit_json(CONFIG) as config:
        config["architectures"] = architectures
    result = run(clone)
    assert [f.rule for f in result.findings] == ["NV606"]
    assert result.verdict is Verdict.INCOMPLETE
    assert {gap.what[:5] for gap in result.coverage.skipped} == STRUCTURE
    assert set(result.coverage.rules) == {
        rule.id for rule in RULES.values() if rule.level is RuleLevel.HEADERS
    } - {"NV110", "NV620"}


def test_nv606_without_a_config(clone: CheckpointEditor) -> None:
    clone.drop_file(CONFIG)
    [finding] = only(clone, "NV606")
    assert "is missing" in finding.message


def test_nv607_wants_a_tokenizer(clone: CheckpointEditor) -> None:
    clone.drop_file(TOKENIZER)
    [finding] = only(clone, "NV607")
    assert finding.severity is Severity.WARNING


def test_nv607_wants_the_tokenizers_config(clone: CheckpointEditor) -> None:
    clone.drop_file("tokenizer_config.json")
    [finding] = only(clone, "NV607")
    assert finding.expected == "tokenizer_config.json"


def test_nv607_names_an_id_beyond_the_embedding(clone: CheckpointEditor) -> None:
    with clone.edit_json(TOKENIZER) as tokenizer:
        tokenizer["added_tokens"].append({"id": 1024, "content": "<|late|>"})
    [finding] = only(clone, "NV607")
    assert (finding.tensor, finding.observed) == ("model.embed_tokens.weight", 1024)


def test_nv607_reads_the_vocabulary_too(clone: CheckpointEditor) -> None:
    with clone.edit_json(TOKENIZER) as tokenizer:
        tokenizer["model"]["vocab"]["late"] = 5000
    [finding] = only(clone, "NV607")
    assert finding.observed == 5000


def test_nv607_says_that_a_tokenizer_cannot_be_read(clone: CheckpointEditor) -> None:
    clone.write_file(TOKENIZER, "[]")
    [finding] = only(clone, "NV607")
    assert finding.shard == TOKENIZER


@pytest.mark.parametrize("temperature", [0.0, 0.49, 0.71, 1.0, "0.6", True, [0.6], None])
def test_nv608_names_a_temperature_outside_the_advice(
    clone: CheckpointEditor, temperature: object
) -> None:
    with clone.edit_json(GENERATION) as generation:
        generation["temperature"] = temperature
    [finding] = only(clone, "NV608")
    assert (finding.shard, finding.severity) == (GENERATION, Severity.WARNING)


@pytest.mark.parametrize("temperature", [0.5, 0.6, 0.7])
def test_nv608_is_silent_within_the_advice(clone: CheckpointEditor, temperature: float) -> None:
    with clone.edit_json(GENERATION) as generation:
        generation["temperature"] = temperature
    assert run(clone).findings == ()


def test_nv608_is_silent_where_nothing_is_sampled(clone: CheckpointEditor) -> None:
    clone.write_file(GENERATION, '{"do_sample": false}')
    assert run(clone).findings == ()


PUBLISHED = sorted(
    path.name.removesuffix("_config.json")
    for path in (Path(__file__).parents[2] / "goldens" / "configs").glob("*_config.json")
    if not path.name.endswith("_hf_quant_config.json")
)
#: Published configurations that do not say 16, or not where they declare NVFP4.
WITHOUT_GROUP_SIZE = {
    "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4",
    "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4",
}

#: hf_quant_config.json says an FP8 KV cache, config.json of an older export says none.
CONTRADICTING = {"nvidia--Qwen3.6-35B-A3B-NVFP4"}


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_published_configuration_is_read_and_judged(
    goldens: Path,
    clone_of: Callable[[Path], CheckpointEditor],
    golden: SimpleNamespace,
    model: str,
) -> None:
    clone = clone_of(golden.bf16)
    for file in (CONFIG, HF_QUANT):
        source = goldens / "configs" / f"{model}_{file}"
        if source.exists():
            clone.write_file(file, source.read_bytes())
    result = run(clone)
    architecture = json.loads((clone.path / CONFIG).read_text())["architectures"][0]
    known = architecture in ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM")
    rules = {f.rule for f in result.findings}
    assert ("NV606" in rules) == (not known)
    assert {gap.what[:5] for gap in result.coverage.skipped} == (set() if known else STRUCTURE)
    assert ("NV604" in rules) == (model in WITHOUT_GROUP_SIZE)
    assert ("NV603" in rules) == (model in CONTRADICTING)
    assert rules.isdisjoint({"NV010", "NV601", "NV602", "NV608"})
