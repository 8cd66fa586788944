"""Smoothed checkpoints, by ModelOpt's arithmetic: what keeps the product passes, and nothing else.

One layer of a Llama: norms, and linears whose columns were divided by what their input is
multiplied by, at run time (o_proj), in the norm before (q, k, v, gate, up) or in the linear before
(down_proj, by rows of up_proj). The real producer is in tests/oracles/test_modelopt_awq.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.validation import ValidationOptions, ValidationResult, validate
from nvfp4check.findings import Verdict
from nvfp4ref.conventions import Convention
from nvfp4ref.nvfp4 import global_decode_scale, quantize

LAYER = "model.layers.0"
ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
INPUT_NORM, POST_NORM = f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm"
QKV = [f"{ATTENTION}.{leaf}_proj" for leaf in "qkv"]
GATE_UP = [f"{MLP}.{leaf}_proj" for leaf in ("gate", "up")]
OUT, DOWN, UP = f"{ATTENTION}.o_proj", f"{MLP}.down_proj", f"{MLP}.up_proj"

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], None]


def base_weights(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.manual_seed(0)
    shapes = {
        **dict.fromkeys(QKV, (64, 128)),
        OUT: (128, 64),
        **dict.fromkeys(GATE_UP, (256, 128)),
        DOWN: (128, 256),
    }
    linears = {
        name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    norms = {name: 0.2 + torch.rand(128, generator=generator) for name in (INPUT_NORM, POST_NORM)}
    return {name: weight.to(dtype) for name, weight in (linears | norms).items()}


def factors(size: int, seed: int) -> torch.Tensor:
    """Factors between a third and three, float32, as a search gives them."""
    return 3 ** (2 * torch.rand(size, generator=torch.manual_seed(seed)) - 1)


def smoothed(base: Tensors) -> tuple[Tensors, Tensors]:
    """Smooth as ModelOpt does: searched factors, averaged over linears that engines fuse."""
    weights = {name: weight.clone() for name, weight in base.items()}
    dtype = base[OUT].dtype
    stored: Tensors = {}

    def divide(name: str, seed: int) -> torch.Tensor:
        by = factors(weights[name].shape[1], seed)
        weights[name] = (weights[name] * (1.0 / by)).to(dtype)
        return by.to(dtype)

    for norm, linears in ((INPUT_NORM, QKV), (POST_NORM, GATE_UP)):
        old = [divide(name, seed) for seed, name in enumerate(linears)]
        mean = torch.stack(old).mean(0)
        for name, was in zip(linears, old, strict=True):
            again = weights[name].float() * was.float() / mean.float()
            weights[name] = again.to(dtype)
        weights[norm] = (weights[norm] * mean).to(dtype)
    weights[UP] *= divide(DOWN, 7)[:, None]
    stored[f"{OUT}.pre_quant_scale"] = divide(OUT, 8)
    return weights, stored


@pytest.fixture
def audit(tmp_path: Path) -> Callable[..., ValidationResult]:
    """Quantise the linears of what was smoothed, write both checkpoints and audit."""

    def run(
        smooth: Change | None = None,
        stored: Change | None = None,
        dtype: torch.dtype = torch.bfloat16,
        written: Callable[[Tensors], Tensors] = lambda tensors: tensors,
        architecture: str = "LlamaForCausalLM",
        **more: Any,
    ) -> ValidationResult:
        base = base_weights(dtype)
        weights, factored = smoothed(base)
        if smooth is not None:
            smooth(weights)
        tensors = dict(factored)
        for name, weight in weights.items():
            if weight.dim() < 2:
                tensors[f"{name}.weight"] = weight
                continue
            group = next((g for g in (QKV, GATE_UP) if name in g), [name])
            amax = torch.stack([weights[member].abs().amax() for member in group]).amax()
            decode = global_decode_scale(amax, Convention.MODELOPT)
            codes, scales = quantize(weight, decode, Convention.MODELOPT)
            tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scales}
            tensors[f"{name}.weight_scale_2"] = decode
        if stored is not None:
            stored(tensors)
        theirs = {f"{name}.weight": weight for name, weight in base.items()}
        for folder, content in (("ours", tensors), ("base", theirs)):
            (tmp_path / folder).mkdir(exist_ok=True)
            save_file(
                {n: t.contiguous() for n, t in written(content).items()},
                tmp_path / folder / "model.safetensors",
            )
            config = {"architectures": [architecture]}
            (tmp_path / folder / "config.json").write_text(json.dumps(config))
        options = ValidationOptions(
            base=open_checkpoint(tmp_path / "base"),
            journal=tmp_path / "j",
            select=("NV7",),
            **more,
        )
        return validate(open_checkpoint(tmp_path / "ours"), options)

    return run


def found(result: ValidationResult) -> set[tuple[str, str]]:
    return {(f.rule, f"{f.tensor}".removesuffix(".weight")) for f in result.findings}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_smoothing_that_keeps_the_product_passes(
    audit: Callable[..., ValidationResult], dtype: torch.dtype
) -> None:
    result = audit(dtype=dtype)

    assert result.findings == ()
    assert result.verdict is Verdict.PASS
    assert result.audit is not None
    assert {
        name.rpartition("_proj")[0][-4:]: a.way for name, a in result.audit.weights.items()
    } == {
        "tn.q": "smoothed-by-the-norm",
        "tn.k": "smoothed-by-the-norm",
        "tn.v": "smoothed-by-the-norm",
        "tn.o": "smoothed",
        "gate": "smoothed-by-the-norm",
        "p.up": "smoothed-by-the-linear",
        "down": "smoothed-by-the-linear",
    }
    document = result.to_json()["audit"]
    assert document["copied"] == {"smoothed": 2}
    assert document["conventions"] == []
    assert document["quantized"]["off"] == document["quantized"]["beyond"] == 0


def flip(name: str) -> Change:
    def change(tensors: Tensors) -> None:
        codes = tensors[f"{name}.weight"]
        codes[5, 9] ^= 0x08
        codes[5, 9] |= 0x07  # a code of a large magnitude with the other sign

    return change


@pytest.mark.parametrize("name", [QKV[0], OUT, GATE_UP[0], UP, DOWN])
def test_one_wrong_code_of_a_smoothed_weight_is_seen(
    audit: Callable[..., ValidationResult], name: str
) -> None:
    assert found(audit(stored=flip(name))) == {("NV701", name)}


def test_factors_stored_as_their_reciprocals_are_seen(
    audit: Callable[..., ValidationResult],
) -> None:
    def invert(tensors: Tensors) -> None:
        tensors[f"{OUT}.pre_quant_scale"] = tensors[f"{OUT}.pre_quant_scale"].reciprocal()

    assert ("NV701", OUT) in found(audit(stored=invert))


def test_factors_that_were_lost_are_seen(audit: Callable[..., ValidationResult]) -> None:
    def lose(tensors: Tensors) -> None:
        tensors[f"{OUT}.pre_quant_scale"].fill_(1)

    assert ("NV701", OUT) in found(audit(stored=lose))


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_factors_that_are_no_factors_are_a_gap(
    audit: Callable[..., ValidationResult], value: float
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{OUT}.pre_quant_scale"][3] = value

    result = audit(stored=spoil)

    assert result.verdict is Verdict.INCOMPLETE
    assert "not all positive and finite" in result.coverage.skipped[0].why


def test_a_linear_that_does_not_undo_the_norms_factors_is_named(
    audit: Callable[..., ValidationResult],
) -> None:
    kept = base_weights()[QKV[1]]
    result = audit(smooth=lambda weights: weights.update({QKV[1]: kept}))
    changed = [f for f in result.findings if f.rule == "NV704"]

    assert found(result) - {("NV705", f"{name}.weight_scale_2") for name in QKV} == {
        ("NV704", INPUT_NORM)
    }
    assert f"2 of the linears it feeds undo, as {QKV[0]}.weight" in changed[0].message
    assert f"1 do not, as {QKV[1]}.weight" in changed[0].message


def test_a_norm_that_was_changed_alone_is_no_smoothing(
    audit: Callable[..., ValidationResult],
) -> None:
    def change(weights: Tensors) -> None:
        base = base_weights()
        weights.update({name: base[name] for name in (INPUT_NORM, *QKV)})
        weights[INPUT_NORM] = weights[INPUT_NORM] * 1.0078125

    result = audit(smooth=change)

    assert found(result) == {("NV704", INPUT_NORM)}
    assert "undo" not in result.findings[0].message


def test_rows_multiplied_by_other_factors_than_columns_lost_are_seen(
    audit: Callable[..., ValidationResult],
) -> None:
    def once_more(weights: Tensors) -> None:
        weights[UP] *= factors(256, 7).to(torch.bfloat16)[:, None]

    rules = {rule for rule, _ in found(audit(smooth=once_more))}

    assert "NV701" in rules


def test_a_smoothed_norm_is_a_gap_where_no_linear_behind_it_was_sampled(
    audit: Callable[..., ValidationResult],
) -> None:
    gaps = 0
    for seed in range(4):  # one of two groups of linears is drawn, and one of three of the rest
        result = audit(sample=0.5, seed=seed)
        assert result.findings == ()
        norms = [gap for gap in result.coverage.skipped if "norm" in gap.what]
        assert (result.verdict is Verdict.INCOMPLETE) == bool(norms)
        gaps += len(norms)
    assert gaps


@pytest.mark.parametrize(
    ("architecture", "passes"), [("Gemma2ForCausalLM", True), ("LlamaForCausalLM", False)]
)
def test_norms_that_multiply_by_one_more_than_their_weight_are_read_so(
    audit: Callable[..., ValidationResult], architecture: str, passes: bool
) -> None:
    """As Gemma 2 names and stores them; its post_attention_layernorm feeds no linear."""

    def gemma(tensors: Tensors) -> Tensors:
        changed = dict(tensors)
        before = changed.pop(f"{POST_NORM}.weight")
        changed[f"{LAYER}.pre_feedforward_layernorm.weight"] = before - 1
        changed[f"{INPUT_NORM}.weight"] = changed[f"{INPUT_NORM}.weight"] - 1
        changed[f"{POST_NORM}.weight"] = torch.ones(128)
        return changed

    result = audit(dtype=torch.float32, written=gemma, architecture=architecture)

    assert (result.findings == ()) is passes
    assert result.audit is not None
    ways = {result.audit.weights[f"{name}.weight"].way for name in (*QKV, *GATE_UP)}
    assert ("smoothed-by-the-norm" in ways) is passes
