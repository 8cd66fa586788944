"""Layers of multi-token prediction held against derived bounds: sound ones inside, faults out."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4check.activations import RUN_FILE, STRADDLES, Run, bounds_file, layer_file, write_tensors
from nvfp4check.agreement.agree import AgreeOptions, AgreeResult, agree
from nvfp4check.agreement.document import agree_document
from nvfp4check.agreement.layers import VALUE_POINTS
from nvfp4check.agreement.statistics import Decision
from nvfp4check.forward import layers as forward_layers
from nvfp4check.forward.journal import Journal
from nvfp4check.forward.options import (
    Activations,
    Arithmetic,
    ForwardOptions,
    Logits,
    Perturbation,
)
from nvfp4check.forward.streaming import _Pass, run_forward
from nvfp4check.report.agree_html import agree_html
from nvfp4check.report.agree_text import agree_text
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3.mtp import mtp_layer

TINY = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3"
PROMPTS = [
    Prompt(id=f"p{n}", tokens=tuple((37 * i * i + 5 * i + n) % 1024 for i in range(n)))
    for n in (24, 1, 13)
]
BOUNDS = ("float32", "bfloat16")
KEPT = ForwardOptions(activations=Activations.ALL, mtp=True)
Golden = Callable[[str], Run]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Compute a checkpoint with bounds, once a module."""
    done: dict[str, Run] = {}
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("golden")

    def run(checkpoint: str) -> Run:
        if checkpoint not in done:
            location = two_layers(folder / "model") if checkpoint == "two" else TINY / checkpoint
            options = replace(KEPT, bounds=BOUNDS)
            done[checkpoint] = run_forward(location, PROMPTS, folder / checkpoint, options).run
        return done[checkpoint]

    return run


def two_layers(folder: Path) -> Path:
    """The tiny model with a second layer of prediction, which has the block of another layer."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted((TINY / "bf16").glob("*.safetensors")):
        tensors |= load_file(shard)
    for name in [name for name in tensors if name.startswith("model.layers.5.")]:
        other = name.replace("layers.5.", "layers.4.")
        tensors[name.replace("layers.5.", "layers.6.")] = tensors.get(other, tensors[name]).clone()
    config = json.loads((TINY / "bf16" / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 2}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def again(reference: Run, folder: Path, options: ForwardOptions = KEPT, **more: Any) -> Run:
    """Compute the reference's checkpoint with its states."""
    location = str(reference.info.checkpoint["location"])
    given = replace(options, inputs=reference.path, **more)
    return run_forward(location, PROMPTS, folder, given).run


def predicted(result: AgreeResult) -> dict[tuple[int, str], float]:
    return {
        h.agreement.key: h.bound.ratio
        for h in result.layers
        if h.bound is not None and h.agreement.layer >= 5
    }


@pytest.mark.parametrize("arithmetic", [Arithmetic.FLOAT64, Arithmetic.BFLOAT16])
@pytest.mark.parametrize("checkpoint", ["fp8", "nvfp4", "two"])
def test_another_correct_arithmetic_stays_within_the_bounds_of_prediction(
    checkpoint: str, arithmetic: Arithmetic, golden: Golden, tmp_path: Path
) -> None:
    reference = golden(checkpoint)
    candidate = again(reference, tmp_path / "run", arithmetic=arithmetic)

    result = agree(reference, candidate)

    found = predicted(result)
    layers = (5, 6) if checkpoint == "two" else (5,)
    assert set(found) == {
        (n, point) for n in layers for point in (*VALUE_POINTS, "eh_proj", "logits")
    }
    assert max(found.values()) < 1
    assert found[5, "eh_proj"] > 0.05
    assert result.verdict is Decision.PASS
    rows = sum(reference.rows(layers[-1], prompt) for prompt in reference.prompts)
    assert rows == 37 - layers[-1] * 2 + 8
    held = next(h for h in result.layers if h.agreement.key == (layers[-1], "eh_proj"))
    assert held.bound is not None
    assert (held.bound.tokens, held.bound.whole) == (rows, True)


def swapped(halves: list[torch.Tensor], weights: Any) -> list[torch.Tensor]:
    """The state first, then the token."""
    return halves[::-1]


def without_norm(halves: list[torch.Tensor], weights: Any) -> list[torch.Tensor]:
    """The state as it came: normed once where it should be twice."""
    return [halves[0], (halves[1] / weights.hnorm.to(halves[1].dtype))]


def exchanged(halves: list[torch.Tensor], weights: Any) -> list[torch.Tensor]:
    """Each norm with the weight of the other."""
    enorm, hnorm = (weight.to(halves[0].dtype) for weight in (weights.enorm, weights.hnorm))
    return [halves[0] / enorm * hnorm, halves[1] / hnorm * enorm]


def zeroed(halves: list[torch.Tensor], weights: Any) -> list[torch.Tensor]:
    """No embedding at position 0, as vLLM and SGLang have it."""
    first = halves[0].clone()
    first[0] = 0
    return [first, halves[1]]


@pytest.mark.parametrize("fault", [swapped, without_norm, exchanged, zeroed])
def test_a_fault_before_eh_proj_exceeds_its_bound_and_is_named(
    fault: Callable[[list[torch.Tensor], Any], list[torch.Tensor]],
    golden: Golden,
    tmp_path: Path,
) -> None:
    reference = golden("bf16")

    def wrong(*args: Any, **more: Any) -> Any:
        weights = args[4]

        def eh_proj(x: torch.Tensor) -> torch.Tensor:
            halves = list(x.chunk(2, dim=-1))
            return weights.eh_proj(torch.cat(fault(halves, weights), dim=-1))

        return mtp_layer(*args[:4], replace(weights, eh_proj=eh_proj), *args[5:], **more)

    with patch.object(forward_layers, "mtp_layer", wrong):
        candidate = again(reference, tmp_path / "run", arithmetic=Arithmetic.BFLOAT16)

    result = agree(reference, candidate)

    assert result.verdict is Decision.FAIL
    assert result.divergence is not None
    assert (result.divergence.layer, result.divergence.point) == (5, "eh_proj")
    assert result.divergence.held_against == "bound"
    assert predicted(result)[5, "eh_proj"] > 3
    assert {h.agreement.layer for h in result.layers if h.diverges} == {5}
    assert "layer 5, eh_proj" in agree_text(agree_document(result))
    assert "eh_proj" in agree_html(agree_document(result))


@pytest.mark.parametrize(("kept", "point"), [("full", "logits"), ("hidden", "final_hidden")])
def test_a_head_without_its_norm_exceeds_its_bound(kept: str, point: str, tmp_path: Path) -> None:
    options, real = replace(KEPT, logits=Logits.parse(kept)), _Pass._normed
    bounded, location = replace(options, bounds=("bfloat16",)), TINY / "bf16"
    reference = run_forward(location, PROMPTS, tmp_path / "golden", bounded).run
    narrow = replace(options, arithmetic=Arithmetic.BFLOAT16)
    sound = again(reference, tmp_path / "sound", narrow)

    def without(self: _Pass, hidden: torch.Tensor, name: str, run: Any) -> torch.Tensor:
        return hidden if "shared_head" in name else real(self, hidden, name, run)

    with patch.object(_Pass, "_normed", without):
        wrong = again(reference, tmp_path / "wrong", narrow)

    within, beyond = (agree(reference, run) for run in (sound, wrong))

    assert predicted(within)[5, point] < 1
    assert within.verdict is Decision.PASS
    assert predicted(beyond)[5, point] > 1
    assert beyond.divergence is not None
    assert (beyond.divergence.layer, beyond.divergence.point) == (5, point)


def test_prediction_is_held_only_where_its_states_are_the_references(
    golden: Golden, tmp_path: Path
) -> None:
    reference = golden("bf16")
    location = str(reference.info.checkpoint["location"])
    narrow = replace(KEPT, arithmetic=Arithmetic.BFLOAT16)
    own = run_forward(location, PROMPTS, tmp_path / "own", narrow).run
    same = run_forward(location, PROMPTS, tmp_path / "same", KEPT).run

    assert predicted(agree(reference, own)) == {}
    assert len(predicted(agree(reference, same))) == 9


def test_rows_of_another_number_are_told_and_left_out(golden: Golden, tmp_path: Path) -> None:
    reference = golden("bf16")
    other = Path(shutil.copytree(again(reference, tmp_path / "run").path, tmp_path / "other"))
    file = layer_file(other, 5)
    tensors = load_file(file)
    tensors["p13/eh_proj"] = torch.cat((tensors["p13/eh_proj"], tensors["p13/eh_proj"][-1:]))
    write_tensors(file, tensors)

    result = agree(reference, Run.open(other))

    (problem,) = [problem for problem in result.problems if problem.kind == "rows"]
    assert "eh_proj of layer 5, prompt 'p13', is [13, 256]" in problem.message
    assert "expected 12 rows" in problem.message
    assert result.verdict is Decision.FAIL


def test_without_bounds_of_prediction_its_layers_are_not_compared(
    golden: Golden, tmp_path: Path
) -> None:
    plain = Path(shutil.copytree(golden("bf16").path, tmp_path / "plain"))
    bounds_file(plain, 5).unlink()

    result = agree(Run.open(plain), again(golden("bf16"), tmp_path / "run"))

    assert {held.agreement.layer for held in result.layers} == set(range(5))


def test_bounds_of_prediction_stand_beside_its_points(golden: Golden) -> None:
    run = golden("two")

    for layer, prompts in ((5, ("p24", "p13")), (6, ("p24", "p13"))):
        names = run.bounded(layer)
        for dtype in BOUNDS:
            points = {name.split("/")[1] for name in names if name.endswith(f"/{dtype}")}
            assert points - {"settled"} == {
                *(VALUE_POINTS),
                *("eh_proj", "final_hidden", "logits", STRADDLES),
            }
        assert {name.split("/")[0] for name in names} == set(prompts)
        assert run.bound(layer, "p13", "logits", "bfloat16").shape == (13 - layer + 4,)


def test_bounds_of_prediction_that_was_stopped_and_resumed_are_those_of_a_whole_run(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, layer_done = golden("two"), Journal.layer_done
    location, options = str(whole.info.checkpoint["location"]), replace(KEPT, bounds=BOUNDS)

    def stop(journal: Journal, done: int, *state: Any) -> None:
        layer_done(journal, done, *state)
        if done == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "layer_done", stop)
        with pytest.raises(KeyboardInterrupt):
            run_forward(location, PROMPTS, tmp_path / "parts", options)
    resumed = replace(options, resume=True)
    parts = run_forward(location, PROMPTS, tmp_path / "parts", resumed).run

    files = sorted(p.relative_to(whole.path) for p in whole.path.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(parts.path) for p in parts.path.rglob("*") if p.is_file())
    for name in files:
        assert (whole.path / name).read_bytes() == (parts.path / name).read_bytes() or (
            name == Path(RUN_FILE)
        )


def test_a_noise_floor_holds_prediction_too_where_it_has_no_bound(
    golden: Golden, tmp_path: Path
) -> None:
    reference = golden("bf16")
    location = str(reference.info.checkpoint["location"])
    noisy = replace(KEPT, perturbation=Perturbation("bfloat16"), seed=1)
    noise = run_forward(location, PROMPTS, tmp_path / "noise", noisy).run
    wide = replace(KEPT, arithmetic=Arithmetic.FLOAT64)
    own = run_forward(location, PROMPTS, tmp_path / "own", wide).run

    result = agree(reference, own, AgreeOptions(noise=(noise,)))

    against = {h.held_against for h in result.layers if h.agreement.layer == 5}
    assert against == {"noise floor"}
    assert result.verdict is Decision.PASS
