import json
from pathlib import Path
from typing import Any

import pytest

from nvfp4check.checkpoint.expected import expected_tensors
from nvfp4check.checkpoint.synth_config import SynthFormat, make_config, read_config
from nvfp4check.findings import CheckError

CONFIGS = Path(__file__).parents[2] / "goldens/configs"
V31 = "nvidia--DeepSeek-V3.1-NVFP4"


def published(name: str = V31, file: str = "config.json") -> dict[str, Any]:
    document: dict[str, Any] = json.loads((CONFIGS / f"{name}_{file}").read_text())
    return document


def test_nothing_asked_leaves_the_files_as_they_are() -> None:
    config, hf = published(), published(file="hf_quant_config.json")
    made = make_config(config, hf)
    assert made.config == config
    assert made.hf_quant_config == hf


def test_nvfp4_of_the_full_model_quantises_what_the_published_one_does() -> None:
    hf = published(file="hf_quant_config.json")
    made = make_config(published(), None, format=SynthFormat.NVFP4)
    real = make_config(published(), hf).quantization
    expected = expected_tensors(made.config, made.quantization)
    assert expected.required == 180_547
    assert [made.quantization.algo_of(m) for m in expected.linears] == [
        real.algo_of(m) for m in expected.linears
    ]


def test_fp8_of_the_full_model_has_the_tensors_of_the_published_one() -> None:
    made = make_config(published(), None, format=SynthFormat.FP8)
    assert expected_tensors(made.config, made.quantization).required == 91_991


def test_bf16_declares_nothing() -> None:
    made = make_config(published("deepseek-ai--DeepSeek-V3"), None, format=SynthFormat.BF16)
    assert "quantization_config" not in made.config
    assert made.quantization.producer is None


def test_a_changed_size_keeps_the_format() -> None:
    hf = published(file="hf_quant_config.json")
    assert make_config(published(), hf, layers=2).quantization.is_nvfp4
    fp8 = make_config(published("deepseek-ai--DeepSeek-V3"), None, layers=2)
    assert fp8.quantization.producer == "deepseek-fp8"


def test_the_exclude_patterns_follow_the_layers() -> None:
    hf = published(file="hf_quant_config.json")
    made = make_config(published(), hf, layers=5)
    assert made.hf_quant_config is not None
    exclude = made.hf_quant_config["quantization"]["exclude_modules"]
    assert "model.layers.5*" in exclude
    assert not any(pattern.startswith("model.layers.6") for pattern in exclude)


@pytest.mark.parametrize(
    ("experts", "groups", "top_groups", "top_experts"),
    [(256, 8, 4, 8), (16, 8, 4, 8), (6, 2, 2, 6), (1, 1, 1, 1)],
)
def test_groups_and_chosen_experts_fit_the_experts(
    experts: int, groups: int, top_groups: int, top_experts: int
) -> None:
    config = make_config(published(), None, experts=experts, format=SynthFormat.BF16).config
    assert (config["n_group"], config["topk_group"]) == (groups, top_groups)
    assert config["num_experts_per_tok"] == top_experts


@pytest.mark.parametrize("size", [{"layers": 0}, {"experts": 0}, {"experts": -3}])
def test_a_size_that_makes_no_sense_is_refused(size: dict[str, int]) -> None:
    with pytest.raises(CheckError, match="1 or more"):
        make_config(published(), None, format=SynthFormat.BF16, **size)


def test_columns_that_fill_no_blocks_cannot_be_nvfp4() -> None:
    config = {**published(), "moe_intermediate_size": 40}
    with pytest.raises(CheckError, match="40 columns are no multiple of 16"):
        make_config(config, None, format=SynthFormat.NVFP4)


def test_a_method_that_cannot_be_remade_asks_for_a_format() -> None:
    config = {**published(), "quantization_config": {"quant_method": "awq"}}
    with pytest.raises(CheckError, match="give --format"):
        make_config(config, None, layers=2)


@pytest.mark.parametrize(
    ("content", "why"), [("[1]", "holds a list"), ("{", "is not JSON"), (None, "cannot be read")]
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, content: str | None, why: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckError, match=why):
        read_config(tmp_path)
