"""What cannot be computed is refused before the first layer, or reported where it shows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nvfp4check.findings import CheckError
from nvfp4check.forward.options import ForwardOptions, KvCache
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3.linear import LinearMode

Edit = Callable[[dict[str, torch.Tensor], dict[str, object]], object]
EXPERT = "model.layers.2.mlp.experts.7.up_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, c: t.pop(f"{EXPERT}.weight"), rf"{EXPERT}\.weight"),
        (lambda t, c: t.pop(f"{EXPERT}.weight_scale_2"), "lacks its global-scale"),
        (
            lambda t, c: t.update({f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"][:, 1:]}),
            r"expected F8_E4M3 \[64, 16\]",
        ),
        (
            lambda t, c: t.update({"model.norm.weight": torch.ones(7)}),
            r"model\.norm\.weight: shape \[7\], expected \[256\]",
        ),
        (lambda t, c: c.update(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
        (lambda t, c: c.pop("kv_lora_rank"), "lacks kv_lora_rank"),
        (lambda t, c: c.update(scoring_func="softmax"), "softmax"),
        (
            lambda t, c: c.update(hidden_size="256"),
            "hidden_size '256', expected a whole number from 1 on",
        ),
        (lambda t, c: c.update(num_hidden_layers=10**9), "promises 1,000,000,000 layers"),
        (lambda t, c: c.update(n_group=0), "n_group 0"),
        (lambda t, c: c.update(rope_theta=-1), "rope_theta -1"),
        (lambda t, c: c["rope_scaling"].update(factor="40"), r"rope_scaling\.factor '40'"),
        (lambda t, c: c.update(qk_rope_head_dim=15), "expected an even number"),
    ],
    ids=[
        "expert",
        "global-scale",
        "scale-shape",
        "norm",
        "architecture",
        "config",
        "scoring",
        "string",
        "layers",
        "groups",
        "theta",
        "factor",
        "odd",
    ],
)
def test_a_checkpoint_that_cannot_be_computed_is_refused_before_the_first_layer(
    prompts: list[Prompt], edited: Callable[..., Path], edit: Edit, message: str, tmp_path: Path
) -> None:
    checkpoint = edited(edit)

    with pytest.raises(CheckError, match=message):
        run_forward(checkpoint, prompts, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_value_that_is_not_finite_is_reported_with_layer_and_token(
    prompts: list[Prompt], edited: Callable[..., Path], tmp_path: Path
) -> None:
    def poison(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
        tensors["model.layers.3.self_attn.o_proj.weight_scale"].view(torch.uint8)[4, 2] = 0x7F

    checkpoint = edited(poison)

    with pytest.raises(
        CheckError, match="layer 3: the state after it: not finite for 42 of 42 tokens"
    ):
        run_forward(checkpoint, prompts, tmp_path / "run")


def test_scores_of_the_router_that_are_not_finite_are_not_chosen_by(
    prompts: list[Prompt], edited: Callable[..., Path], tmp_path: Path
) -> None:
    def poison(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
        tensors["model.layers.2.mlp.gate.e_score_correction_bias"][3] = float("nan")

    with pytest.raises(CheckError, match="layer 2: the router's scores: not finite for 42 of 42"):
        run_forward(edited(poison), prompts, tmp_path / "run")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({f"{EXPERT}.input_scale": torch.zeros(())}), "expected a positive"),
        (lambda t: t.update({f"{EXPERT}.input_scale": torch.ones(2)}), "2 elements, expected one"),
        (
            lambda t: t.update({f"{EXPERT}.weight_scale_2": torch.ones((), dtype=torch.int32)}),
            "stored as I32; this forward takes",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.k_scale": torch.tensor(-1.0)}),
            r"k_scale: -1\.0, expected a positive",
        ),
    ],
    ids=["zero", "two", "integer", "cache"],
)
def test_scales_that_mean_nothing_are_refused(
    edit: Callable[[dict[str, torch.Tensor]], object],
    message: str,
    edited: Callable[..., Path],
    prompts: list[Prompt],
    tiny: Path,
    tmp_path: Path,
) -> None:
    checkpoint = edited(lambda tensors, config: edit(tensors))
    shutil.copy(tiny / "nvfp4" / "hf_quant_config.json", checkpoint)
    many = [Prompt(id="p", tokens=tuple(range(200)))]  # every expert is read

    with pytest.raises(CheckError, match=message):
        run_forward(checkpoint, many, tmp_path / "run")


def test_a_directory_that_cannot_be_written_is_reported(
    tiny: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckError, match="cannot be written: Not a directory"):
        run_forward(tiny / "bf16", prompts, tmp_path / "file" / "run")


def test_too_little_memory_is_refused_with_what_is_needed(
    tiny: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    with pytest.raises(CheckError, match=r"--max-memory is 0\.10"):
        run_forward(
            tiny / "bf16", prompts, tmp_path / "run", ForwardOptions(max_memory=int(0.1 * 2**30))
        )
    assert not (tmp_path / "run").exists()


def test_unquantized_is_refused_for_a_quantised_checkpoint(
    tiny: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    with pytest.raises(CheckError, match="weights are quantised, first"):
        run_forward(
            tiny / "fp8", prompts, tmp_path / "run", ForwardOptions(mode=LinearMode.UNQUANTIZED)
        )


@pytest.mark.parametrize(
    ("algo", "message"),
    [("NVFP4", "'NVFP4', which engines have for other attention"), ("INT8", "'INT8'; FP8 is")],
)
def test_a_cache_format_that_is_not_defined_is_refused_and_left_out_when_told(
    algo: str, message: str, edited: Callable[..., Path], prompts: list[Prompt], tmp_path: Path
) -> None:
    checkpoint = edited(lambda tensors, config: None)
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": algo}
    document = {"producer": {"name": "modelopt", "version": "0.47"}, "quantization": quantization}
    (checkpoint / "hf_quant_config.json").write_text(json.dumps(document))

    with pytest.raises(CheckError, match=f"{message}.*--kv-cache none"):
        run_forward(checkpoint, prompts, tmp_path / "run")
    run_forward(checkpoint, prompts, tmp_path / "run", ForwardOptions(kv_cache=KvCache.NONE))
