"""Bounds asked for on the command line, written beside the points, and refused where not theirs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvfp4check.activations import SETTLED, STRADDLES, UNCACHED, Run, bounds_file, layer_file
from nvfp4check.cli.main import main
from nvfp4check.engine.local import LocalEngine
from nvfp4check.findings import CheckError
from nvfp4check.forward.bounds.recording import parse_bounds
from nvfp4check.forward.options import (
    Activations,
    Arithmetic,
    ForwardOptions,
    LayerRange,
    Perturbation,
)
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt

TWO_LAYERS = ForwardOptions(activations=Activations.ALL, layers=LayerRange(0, 2))
PROMPTS = [Prompt(id="a/slash", tokens=(5, 9, 300)), Prompt(id="b", tokens=(7,))]


def test_the_command_line_writes_bounds_and_takes_inputs(tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "p", "tokens": [3, 1, 4]}))

    def forward(*arguments: str) -> int:
        common = (str(tiny / "nvfp4"), "--prompts", str(prompts), "--activations", "all")
        return main(("forward", *common, *arguments))

    reference, candidate = tmp_path / "reference", tmp_path / "candidate"
    assert forward("--bounds", "float32, bfloat16,float32", "--out", str(reference)) == 0
    assert forward("--inputs", str(reference), "--dtype", "bfloat16", "--out", str(candidate)) == 0

    run = Run.open(reference)
    assert run.info.bounds == ("float32", "bfloat16")
    assert run.info.inputs is None
    assert sorted(run.bounded(0)) == sorted(
        f"p/{point}/{dtype}"
        for dtype in ("float32", "bfloat16")
        for point in (*run.points(0), STRADDLES, UNCACHED)
    )
    for dtype in ("float32", "bfloat16"):
        bound = run.bound(1, "p", "hidden", dtype)
        assert bound.dtype == torch.float64
        assert bound.shape == (3,)
        assert (bound > 0).all()
        assert run.bound(1, "p", SETTLED, dtype).dtype == torch.uint8
    wide, narrow = (run.bound(1, "p", "hidden", d) for d in ("bfloat16", "float32"))
    assert (wide > narrow).all()
    assert Run.open(candidate).info.inputs is not None


def test_a_run_with_bounds_holds_the_same_bytes_otherwise(tiny: Path, tmp_path: Path) -> None:
    plain = run_forward(tiny / "fp8", PROMPTS, tmp_path / "plain", TWO_LAYERS).run
    options = replace(TWO_LAYERS, bounds=("float16",))

    bounded = run_forward(tiny / "fp8", PROMPTS, tmp_path / "bounded", options).run

    for layer in (0, 1):
        ours, theirs = (layer_file(run.path, layer) for run in (plain, bounded))
        assert ours.read_bytes() == theirs.read_bytes()
    assert (bounded.bound(1, "a/slash", "mlp_output", "float16") > 0).all()
    assert bounded.bounded(5) == frozenset()


@pytest.mark.parametrize("text", ["", " , ", "float8", "float32,double"])
def test_dtypes_that_cannot_be_declared_are_refused(text: str) -> None:
    with pytest.raises(CheckError, match="give any of float32, bfloat16, float16"):
        parse_bounds(text)


def test_bounds_are_refused_where_the_run_is_no_reference(tiny: Path, tmp_path: Path) -> None:
    noisy = replace(TWO_LAYERS, bounds=("float32",), perturbation=Perturbation("bfloat16"))
    spread = replace(TWO_LAYERS, bounds=("float32",), engine=LocalEngine(1))

    for options, why in ((noisy, "--perturb is no reference"), (spread, "give --engine local")):
        with pytest.raises(CheckError, match=why):
            run_forward(tiny / "nvfp4", PROMPTS, tmp_path / "run", options)
        assert not (tmp_path / "run").exists()


def test_layers_begin_with_the_given_states_in_the_dtype_of_the_run(
    tiny: Path, tmp_path: Path
) -> None:
    golden = run_forward(tiny / "bf16", PROMPTS, tmp_path / "golden", TWO_LAYERS).run
    options = replace(TWO_LAYERS, arithmetic=Arithmetic.BFLOAT16, inputs=golden.path)

    run = run_forward(tiny / "bf16", PROMPTS, tmp_path / "run", options).run

    for prompt in golden.prompts:
        parts = [run.point(1, prompt, p) for p in ("attn_output", "mlp_output", "hidden")]
        attention, mlp, hidden = parts
        given = golden.point(0, prompt, "hidden").to(torch.bfloat16)
        assert torch.equal(hidden, (given + attention) + mlp)
        assert not torch.equal(run.point(0, prompt, "hidden"), given)


def test_inputs_of_other_tokens_are_refused(tiny: Path, tmp_path: Path) -> None:
    golden = run_forward(tiny / "bf16", PROMPTS, tmp_path / "golden", TWO_LAYERS).run
    options = replace(TWO_LAYERS, inputs=golden.path)
    others = [Prompt(id="b", tokens=(8,))]

    with pytest.raises(CheckError, match="has not the same tokens for prompt 'b'"):
        run_forward(tiny / "bf16", others, tmp_path / "run", options)


def test_bounds_of_a_run_in_two_parts_are_those_of_one(tiny: Path, tmp_path: Path) -> None:
    options = replace(TWO_LAYERS, bounds=("bfloat16",))
    whole = run_forward(tiny / "nvfp4", PROMPTS, tmp_path / "whole", options).run
    first = replace(options, layers=LayerRange(0, 1))
    run_forward(tiny / "nvfp4", PROMPTS, tmp_path / "parts", first)

    resumed = replace(options, resume=True)
    parts = run_forward(tiny / "nvfp4", PROMPTS, tmp_path / "parts", resumed).run

    for layer in (0, 1):
        ours, theirs = (bounds_file(run.path, layer) for run in (whole, parts))
        assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(CheckError, match="cannot be continued: bounds"):
        run_forward(
            tiny / "nvfp4", PROMPTS, tmp_path / "parts", replace(resumed, bounds=("float32",))
        )
