"""FP8 as compressed-tensors and ModelOpt write it, by tiles and by rows, through every command."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4check.checkpoint.audit.sources import Reader, Source
from nvfp4check.checkpoint.diff.run import DiffOptions, diff_checkpoints
from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.inspection import inspect
from nvfp4check.checkpoint.naming import Part, WeightFormat
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.checkpoint.validation import ValidationOptions, ValidationResult, validate
from nvfp4check.findings import CheckError
from nvfp4check.forward.options import ForwardOptions
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3.linear import LinearMode

MODULE = "model.layers.2.self_attn.q_b_proj"
LINEARS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
FORMS = ("ct-tiles", "ct-rows", "modelopt-tiles", "modelopt-rows")


def tiles_of(x: torch.Tensor) -> torch.Tensor:
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % 128, 0, -rows % 128))
    return padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


def converted(x: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements and stored scales; compressed-tensors computes in bfloat16, ModelOpt in float32."""
    values = x if form.startswith("ct") else x.float()
    if form.endswith("tiles"):
        scales = tiles_of(values).abs().amax(dim=(1, 3)) / 448
        elements = (values / spread(scales, x.shape)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return elements, scales[:, None, :, None] if form.startswith("modelopt") else scales
    scales = values.abs().amax(dim=1, keepdim=True) / 448
    elements = (values / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    return elements, scales.flatten() if form.startswith("modelopt") else scales


def declared(form: str) -> dict[str, Any]:
    if form.startswith("modelopt"):
        algo = "fp8_pb_wo" if form.endswith("tiles") else "FP8_PER_CHANNEL_PER_TOKEN"
        return {"quant_method": "modelopt", "quant_algo": algo, "ignore": ["*mlp*", "*eh_proj*"]}
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    if form.endswith("tiles"):
        weights |= {"strategy": "block", "block_structure": [128, 128]}
        inputs |= {"strategy": "group", "group_size": 128}
    else:
        weights |= {"strategy": "channel"}
        inputs |= {"strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["re:.*mlp.*", "re:.*eh_proj", "lm_head", "re:.*shared_head.head"],
    }


@pytest.fixture
def made(golden: SimpleNamespace, tmp_path: Path) -> Callable[[str], Path]:
    """Convert the attention of the bfloat16 golden: `made("ct-tiles")`."""

    def make(form: str) -> Path:
        target = tmp_path / form
        target.mkdir()
        weight_map: dict[str, str] = {}
        for shard in sorted(golden.bf16.glob("*.safetensors")):
            tensors = load_file(shard)
            for name in [
                name for name in tensors if name.removesuffix(".weight").endswith(LINEARS)
            ]:
                tensors[name], tensors[f"{name}_scale"] = converted(tensors[name], form)
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(tensors, target / shard.name)
            weight_map |= dict.fromkeys(tensors, shard.name)
        index = {"metadata": {}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
        config = json.loads((golden.bf16 / "config.json").read_text())
        config["quantization_config"] = declared(form)
        if form.startswith("modelopt"):
            config["quantization_config"]["ignore"] += ["lm_head", "*shared_head.head"]
        (target / "config.json").write_text(json.dumps(config))
        return target

    return make


def run(path: Path, *select: str, **options: Any) -> ValidationResult:
    chosen = {"level": RuleLevel.BYTES, "select": select, **options}
    return validate(open_checkpoint(path), ValidationOptions(**chosen))


@pytest.mark.parametrize("form", FORMS)
def test_a_sound_checkpoint_is_understood(made: Callable[[str], Path], form: str) -> None:
    path = made(form)
    result = run(path, "NV1", "NV6", "NV8", tp=1)
    assert {finding.rule for finding in result.findings} <= {"NV607"}  # there is no tokenizer
    assert not [gap for gap in result.coverage.skipped if "map" in gap.why]
    weight = open_checkpoint(path).weights[f"{MODULE}.weight"]
    tiled = form.endswith("tiles")
    assert weight.format is (WeightFormat.FP8_BLOCK if tiled else WeightFormat.FP8)
    assert weight.parts[Part.SCALE_INV if tiled else Part.SCALE].shape[0] == (2 if tiled else 192)


@pytest.mark.parametrize("form", FORMS)
def test_values_are_elements_times_scales(
    made: Callable[[str], Path], golden: SimpleNamespace, form: str
) -> None:
    checkpoint = open_checkpoint(made(form))
    weight = checkpoint.weights[f"{MODULE}.weight"]
    base = open_checkpoint(golden.bf16)
    elements, scales = converted(base.torch(base.tensors[weight.name]), form)
    flat = scales.squeeze(3).squeeze(1) if scales.ndim == 4 else scales
    rows = spread(flat, elements.shape) if form.endswith("tiles") else flat.reshape(-1, 1)
    expected = elements.float() * rows.float()
    source = Source(Reader(checkpoint), weight)
    for dtype in (torch.float32, torch.bfloat16):
        for start, stop in ((0, 128), (128, 192)):
            assert torch.equal(source.tensor(start, stop, dtype), expected[start:stop].to(dtype))
    detail = inspect(checkpoint, weight.name).weight
    assert detail is not None
    shown = detail.values[1][:5]
    assert shown == tuple(expected[1, :5].double().tolist())


@pytest.mark.parametrize("form", FORMS)
def test_a_conversion_of_the_base_is_recognised_and_one_wrong_element_is_not(
    made: Callable[[str], Path], golden: SimpleNamespace, form: str
) -> None:
    path = made(form)
    base = open_checkpoint(golden.bf16)
    assert [f for f in run(path, "NV7", base=base).findings] == []
    edited = CheckpointEditor(path)
    edited.raw(f"{MODULE}.weight")[3, 5] ^= 1
    [finding] = run(path, "NV7", base=base).findings
    assert (finding.rule, finding.tensor, finding.count) == ("NV704", f"{MODULE}.weight", 1)
    edited.raw(f"{MODULE}.weight")[3, 5] ^= 1
    dtype = "<u2" if form.startswith("ct") else "<f4"
    edited.array(f"{MODULE}.weight_scale", dtype).reshape(-1)[1] += 1  # by a unit, or twice the int
    [finding] = run(path, "NV7", base=base).findings
    assert (finding.rule, finding.tensor) == ("NV704", f"{MODULE}.weight")
    assert finding.count is not None
    assert finding.count > 50


@pytest.mark.parametrize("form", FORMS)
def test_a_difference_from_the_base_is_rounding_and_a_swapped_row_is_not(
    made: Callable[[str], Path], golden: SimpleNamespace, form: str
) -> None:
    def compared() -> dict[str, Any]:
        options = DiffOptions(only="model.layers.2.self_attn.*")
        found = diff_checkpoints(open_checkpoint(golden.bf16), open_checkpoint(path), options)
        return {w.name.removesuffix(".weight"): w for w in found.weights}

    path = made(form)
    found = compared()
    changed = {name for name, weight in found.items() if weight.cls == "format-changed"}
    assert {name.rpartition(".")[2] for name in changed} == {*LINEARS}
    assert all(found[name].bound_holds for name in changed)
    codes = CheckpointEditor(path).raw(f"{MODULE}.weight")
    codes[[0, 1]] = codes[[1, 0]]
    assert compared()[MODULE].bound_holds is False


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "zero"), (-1.0, "negative"), (np.nan, "not finite")]
)
def test_a_bad_scale_is_found(
    made: Callable[[str], Path], form: str, value: float, said: str
) -> None:
    path = made(form)
    scales = CheckpointEditor(path).raw(f"{MODULE}.weight_scale").reshape(-1)
    word = torch.tensor([value], dtype=torch.bfloat16 if form.startswith("ct") else torch.float32)
    raw = word.view(torch.uint8).numpy()
    scales[len(raw) : 2 * len(raw)] = raw
    [finding] = run(path, "NV8").findings
    assert (finding.rule, finding.tensor) == ("NV801", f"{MODULE}.weight_scale")
    assert said in finding.message


@pytest.mark.parametrize(
    ("form", "shape", "expected"),
    [
        ("ct-tiles", (1, 2), [2, 1]),
        ("modelopt-tiles", (1, 1, 2, 1), [2, 1]),
        ("ct-rows", (2, 96), [192, 1]),
        ("modelopt-rows", (1, 192), [192, 1]),
    ],
)
def test_scales_of_another_shape_are_one_defect(
    made: Callable[[str], Path], form: str, shape: tuple[int, ...], expected: list[int]
) -> None:
    path = made(form)
    CheckpointEditor(path).reshape(f"{MODULE}.weight_scale", shape)
    [finding] = run(path, "NV1", "NV8").findings
    assert (finding.rule, finding.tensor) == ("NV801", f"{MODULE}.weight_scale")
    assert finding.expected == expected


def test_deepseeks_fp8_under_other_names_is_the_same_model(
    clone_of: Callable[[Path], CheckpointEditor], golden: SimpleNamespace, tmp_path: Path
) -> None:
    clone = clone_of(golden.fp8)
    for name in [name for name in clone.entries() if name.endswith("_scale_inv")]:
        clone.rename(name, name.removesuffix("_inv"))
    with clone.edit_json("config.json") as config:
        config["quantization_config"] = {
            **declared("ct-tiles"),
            "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*eh_proj", "re:.*shared_head.head"],
        }
    assert run(clone.path, "NV1", "NV8").findings == ()
    found = diff_checkpoints(open_checkpoint(golden.fp8), open_checkpoint(clone.path))
    assert {*found.summary} == {"identical", "same-values"}
    prompts = [Prompt(id="x", tokens=(0, 41, 574))]
    theirs = run_forward(golden.fp8, prompts, tmp_path / "theirs").run.logits("x")
    assert torch.equal(run_forward(clone.path, prompts, tmp_path / "ours").run.logits("x"), theirs)

    with clone.edit_json("config.json") as config:
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    ours = run_forward(clone.path, prompts, tmp_path / "weights").run.logits("x")
    only = ForwardOptions(mode=LinearMode.WEIGHT_ONLY)
    theirs = run_forward(golden.fp8, prompts, tmp_path / "theirs-weights", only).run.logits("x")
    assert torch.equal(ours, theirs)

    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    with clone.edit_json("config.json") as config:
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = inputs
    with pytest.raises(CheckError, match=r"FP8 in tiles, activations by token; .*--mode weight"):
        run_forward(clone.path, prompts, tmp_path / "refused")
