"""Runs that are moved on purpose: noise on the stream, another run's routes."""

from pathlib import Path

import pytest
import torch

from nvfp4check.activations import Run
from nvfp4check.findings import CheckError
from nvfp4check.forward.options import (
    Activations,
    ForwardOptions,
    Perturbation,
)
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt


def perturbed_hidden(
    tiny: Path, tmp_path: Path, name: str, seed: int, prompts: list[Prompt]
) -> Run:
    options = ForwardOptions(
        activations=Activations.HIDDEN, perturbation=Perturbation("bfloat16"), seed=seed
    )
    return run_forward(tiny / "bf16", prompts, tmp_path / name, options).run


def test_noise_is_of_the_size_of_a_rounding_and_follows_from_the_seed(
    tiny: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    plain = run_forward(
        tiny / "bf16", prompts, tmp_path / "plain", ForwardOptions(activations=Activations.HIDDEN)
    ).run
    noisy = perturbed_hidden(tiny, tmp_path, "noisy", 1, prompts)
    again = perturbed_hidden(tiny, tmp_path, "again", 1, prompts[::-1])
    other = perturbed_hidden(tiny, tmp_path, "other", 2, prompts)

    for prompt in plain.prompts:
        before, after = plain.point(0, prompt, "hidden"), noisy.point(0, prompt, "hidden")
        moved = ((after - before) / before).abs()
        # Uniform up to 2**-8, so 2**-9 in the mean; five standard deviations of 256 draws are 18 %.
        assert 0.8 < float(moved.mean()) * 2**9 < 1.2
        assert float(moved.max()) <= 2**-8 * 1.0001
        assert torch.equal(again.point(0, prompt, "hidden"), after)
        assert not torch.equal(other.point(0, prompt, "hidden"), after)


def test_the_routes_of_another_run_are_taken(
    tiny: Path, prompts: list[Prompt], keep_all: ForwardOptions, tmp_path: Path
) -> None:
    quantized = run_forward(tiny / "nvfp4", prompts, tmp_path / "quantized", keep_all).run

    forced = ForwardOptions(activations=Activations.ALL, routing=tmp_path / "quantized")
    base = run_forward(tiny / "bf16", prompts, tmp_path / "forced", forced).run

    for layer in range(1, 5):
        for prompt in base.prompts:
            assert torch.equal(
                base.point(layer, prompt, "router_experts"),
                quantized.point(layer, prompt, "router_experts"),
            )


def test_routes_of_other_tokens_are_refused(
    tiny: Path, prompts: list[Prompt], keep_all: ForwardOptions, tmp_path: Path
) -> None:
    run_forward(tiny / "bf16", prompts, tmp_path / "run", keep_all)
    others = [Prompt(id="a", tokens=(1, 2, 3))]

    with pytest.raises(CheckError, match="not the same tokens for prompt 'a'"):
        run_forward(
            tiny / "bf16", others, tmp_path / "forced", ForwardOptions(routing=tmp_path / "run")
        )


def test_a_run_that_recorded_no_experts_forces_none(
    tiny: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    bare = run_forward(tiny / "bf16", prompts, tmp_path / "bare").run

    options = ForwardOptions(routing=bare.path)
    with pytest.raises(CheckError, match="make it with --activations hidden"):
        run_forward(tiny / "bf16", prompts, tmp_path / "forced", options)
