"""FP8 weights with one scale, or one a row: alone, and as the attention beside NVFP4 experts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nvfp4check.agreement.agree import agree
from nvfp4check.agreement.statistics import Decision
from nvfp4check.checkpoint.naming import Layout, LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.quant_config import QuantConfig
from nvfp4check.engine.local import LocalEngine
from nvfp4check.findings import CheckError
from nvfp4check.forward.fp8_inputs import fp8_activations
from nvfp4check.forward.options import Activations, Arithmetic, ForwardOptions
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import LinearMode
from nvfp4ref.deepseek_v3.model import forward
from nvfp4ref.deepseek_v3.weights import StateDict, model_weights
from nvfp4ref.fp8 import Fp8Activations

Tensors = dict[str, torch.Tensor]

MODELOPT = {"producer": {"name": "modelopt", "version": "0.47.0"}}


def quantized(weight: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements and scales: [] of a weight, or [N, 1] of its rows."""
    amax = weight.float().abs().amax(dim=1, keepdim=True) if per_row else weight.float().abs().max()
    scale = amax / 448
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def attention_in_fp8(tensors: Tensors, *, per_row: bool, input_scales: bool) -> None:
    """Store every BF16 linear of attention, and the head, in FP8."""
    for name in list(tensors):
        linear = (".self_attn." in name and name.endswith("_proj.weight")) or "lm_head" in name
        if (linear or "with_mqa.weight" in name) and tensors[name].dtype == torch.bfloat16:
            module = name.removesuffix(".weight")
            tensors[name], tensors[f"{module}.weight_scale"] = quantized(tensors[name], per_row)
            if input_scales:
                tensors[f"{module}.input_scale"] = torch.tensor(0.02)


def compressed_tensors(strategy: str, dynamic: bool) -> dict[str, Any]:
    """A quantization_config in which every linear is FP8."""
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "input_activations": {"num_bits": 8, "strategy": strategy, "dynamic": dynamic},
            }
        },
    }


@pytest.fixture
def mixed(edited: Callable[..., Path]) -> Path:
    """NVFP4 experts beside attention in FP8 with stored input scales, as ModelOpt mixes them."""
    checkpoint = edited(
        lambda tensors, config: attention_in_fp8(tensors, per_row=False, input_scales=True)
    )
    layers = {"model.layers.1.mlp": {"quant_algo": "NVFP4", "group_size": 16}}
    quantization = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    document = {**MODELOPT, "quantization": quantization}
    (checkpoint / "hf_quant_config.json").write_text(json.dumps(document))
    return checkpoint


@pytest.fixture
def per_token(edited: Callable[..., Path]) -> Path:
    """BF16 experts beside attention in FP8 by row, its input by token."""

    def edit(tensors: Tensors, config: dict[str, object]) -> None:
        attention_in_fp8(tensors, per_row=True, input_scales=False)
        config["quantization_config"] = compressed_tensors("token", dynamic=True)

    return edited(edit, "bf16")


def reference(
    checkpoint: Path,
    tensors: Tensors,
    prompts: list[Prompt],
    options: ForwardOptions,
    activations: Fp8Activations,
) -> list[torch.Tensor]:
    config = DeepseekV3Config.from_dict(json.loads((checkpoint / "config.json").read_text()))
    mode = options.mode or LinearMode.STORED
    source = StateDict(tensors, mode, fp8_activations=activations)
    tokens = [torch.tensor(prompt.tokens) for prompt in prompts]
    weights = model_weights(source, config)
    return forward(tokens, weights, config, options.arithmetic.dtype)[0]


@pytest.mark.parametrize("dtype", Arithmetic)
@pytest.mark.parametrize("mode", [LinearMode.STORED, LinearMode.WEIGHT_ONLY])
@pytest.mark.parametrize("name", ["mixed", "per_token"])
def test_a_streamed_run_has_the_values_of_the_reference(
    name: str,
    mode: LinearMode,
    dtype: Arithmetic,
    request: pytest.FixtureRequest,
    prompts: list[Prompt],
    keep_all: ForwardOptions,
    stored_tensors: Callable[[Path], Tensors],
    tmp_path: Path,
) -> None:
    checkpoint = request.getfixturevalue(name)
    options = replace(keep_all, mode=mode, arithmetic=dtype)
    tensors = stored_tensors(checkpoint)
    expected = reference(checkpoint, tensors, prompts, options, Fp8Activations.PER_TOKEN)

    run = run_forward(checkpoint, prompts, tmp_path / "run", options).run

    for prompt, logits in zip(run.prompts, expected, strict=True):
        assert torch.equal(run.logits(prompt), logits.to(run.logits(prompt).dtype))


def test_inputs_are_quantised_where_stored_says_so(
    per_token: Path,
    prompts: list[Prompt],
    keep_all: ForwardOptions,
    tmp_path: Path,
) -> None:
    stored = run_forward(per_token, prompts, tmp_path / "stored", keep_all).run
    options = replace(keep_all, mode=LinearMode.WEIGHT_ONLY)
    plain = run_forward(per_token, prompts, tmp_path / "plain", options).run

    assert stored.info.mode == "stored"
    a, b = (run.point(0, "a", "attn_output") for run in (stored, plain))
    # An element of the input moves by up to 2**-4 of it; attention is no longer than its inputs.
    assert 0 < float((a - b).norm() / b.norm()) < 2**-3
    assert torch.equal(stored.point(0, "a", "attn_input"), plain.point(0, "a", "attn_input"))


def test_a_worker_takes_the_input_as_the_run_does(
    edited: Callable[..., Path],
    prompts: list[Prompt],
    keep_all: ForwardOptions,
    bytes_of: Callable[[Path], dict[str, str]],
    tmp_path: Path,
) -> None:
    def edit(tensors: Tensors, config: dict[str, object]) -> None:
        for name in [name for name in tensors if ".mlp.experts." in name and ".5." not in name]:
            scale = name.replace(".weight", ".weight_scale")
            tensors[name], tensors[scale] = quantized(tensors[name], per_row=True)
        config["quantization_config"] = compressed_tensors("token", dynamic=True)

    checkpoint = edited(edit, "bf16")
    run_forward(checkpoint, prompts, tmp_path / "plain", keep_all)
    run_forward(checkpoint, prompts, tmp_path / "items", replace(keep_all, engine=LocalEngine()))

    assert bytes_of(tmp_path / "items") == bytes_of(tmp_path / "plain")


def fp8_weight(*, input_scale: bool = False) -> LogicalWeight:
    parts = {part: None for part in (Part.CODES, Part.SCALE)}
    if input_scale:
        parts[Part.INPUT_SCALE] = None
    made: Any = parts
    return LogicalWeight("m.weight", "m", WeightFormat.FP8, Layout.MODELOPT, made, (8, 8))


def declared(tmp_path: Path, config: dict[str, Any], hf: dict[str, Any] | None) -> QuantConfig:
    save_file({"m.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    if hf is not None:
        document = {**MODELOPT, "quantization": hf}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(document))
    return open_checkpoint(tmp_path).quantization


NOT_QUANTIZED = compressed_tensors("token", dynamic=True)
NOT_QUANTIZED["config_groups"]["group_0"].pop("input_activations")


@pytest.mark.parametrize(
    ("config", "hf", "expected"),
    [
        ({}, {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, Fp8Activations.PER_TOKEN),
        ({}, {"quant_algo": "W8A16"}, Fp8Activations.NONE),
        (
            {"quantization_config": compressed_tensors("token", dynamic=True)},
            None,
            Fp8Activations.PER_TOKEN,
        ),
        ({"quantization_config": NOT_QUANTIZED}, None, Fp8Activations.NONE),
    ],
)
def test_the_input_is_taken_as_declared(
    config: dict[str, Any], hf: dict[str, Any] | None, expected: Fp8Activations, tmp_path: Path
) -> None:
    quantization = declared(tmp_path, config, hf)

    assert fp8_activations(fp8_weight(), quantization) is expected
    assert fp8_activations(fp8_weight(input_scale=True), quantization) is Fp8Activations.STATIC


@pytest.mark.parametrize(
    ("config", "hf"),
    [
        ({}, None),
        ({}, {"quant_algo": "FP8"}),
        ({"quantization_config": compressed_tensors("tensor", dynamic=True)}, None),
        ({"quantization_config": compressed_tensors("token", dynamic=False)}, None),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, None),
    ],
    ids=["nothing", "modelopt-without", "by-tensor", "static-without", "dynamic"],
)
def test_an_input_scale_that_would_depend_on_the_batch_is_refused(
    config: dict[str, Any], hf: dict[str, Any] | None, tmp_path: Path
) -> None:
    with pytest.raises(CheckError, match=r"m\.weight: FP8 without an input scale .* weight-only"):
        fp8_activations(fp8_weight(), declared(tmp_path, config, hf))


def test_a_checkpoint_whose_inputs_are_unknown_runs_weight_only_and_is_refused_stored(
    edited: Callable[..., Path], prompts: list[Prompt], tmp_path: Path
) -> None:
    checkpoint = edited(
        lambda tensors, config: attention_in_fp8(tensors, per_row=True, input_scales=False), "bf16"
    )

    run_forward(checkpoint, prompts, tmp_path / "w", ForwardOptions(mode=LinearMode.WEIGHT_ONLY))
    with pytest.raises(CheckError, match="--mode weight-only"):
        run_forward(checkpoint, prompts, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda scale: torch.ones(3, 1),
            r"weight_scale: shape \[3, 1\], expected one scale, or one for each of the 1024 rows",
        ),
        (lambda scale: scale.to(torch.float64), r"lm_head\.weight_scale: stored as F64"),
    ],
)
def test_scales_of_another_form_are_refused(
    edit: Callable[[torch.Tensor], torch.Tensor],
    message: str,
    edited: Callable[..., Path],
    prompts: list[Prompt],
    tmp_path: Path,
) -> None:
    def broken(tensors: Tensors, config: dict[str, object]) -> None:
        attention_in_fp8(tensors, per_row=False, input_scales=True)
        tensors["lm_head.weight_scale"] = edit(tensors["lm_head.weight_scale"])

    with pytest.raises(CheckError, match=message):
        run_forward(edited(broken, "bf16"), prompts, tmp_path / "run")


@pytest.mark.parametrize("name", ["mixed", "per_token"])
def test_correct_arithmetic_stays_within_the_bounds_of_such_a_layer(
    name: str, request: pytest.FixtureRequest, prompts: list[Prompt], tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue(name)
    options = ForwardOptions(activations=Activations.ALL, bounds=("bfloat16",))
    bounded = run_forward(checkpoint, prompts, tmp_path / "reference", options).run
    given = ForwardOptions(
        activations=Activations.ALL, arithmetic=Arithmetic.BFLOAT16, inputs=bounded.path
    )
    candidate = run_forward(checkpoint, prompts, tmp_path / "candidate", given).run

    result = agree(bounded, candidate)

    assert result.verdict is Decision.PASS
    assert all(held.held_against == "bound" for held in result.layers)
    ratios = {h.agreement.key: h.bound.ratio for h in result.layers if h.bound is not None}
    assert 0.01 < ratios[0, "attn_output"] < 1


def test_scales_by_token_have_no_bounds_of_several_ranks(
    per_token: Path, prompts: list[Prompt], keep_all: ForwardOptions, tmp_path: Path
) -> None:
    options = replace(keep_all, bounds=("bfloat16/tp2",))

    with pytest.raises(CheckError, match="each of several ranks does by its own share"):
        run_forward(per_token, prompts, tmp_path / "run", options)
