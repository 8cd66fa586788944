"""Candidates held against derived bounds: correct ones stay inside, if they are what they say."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4check.activations import (
    HIDDEN,
    RUN_FILE,
    SETTLED,
    Run,
    bounds_file,
    layer_file,
    write_info,
    write_tensors,
)
from nvfp4check.agreement.agree import AgreeOptions, AgreeResult, agree
from nvfp4check.agreement.assertion import assert_agrees
from nvfp4check.agreement.document import agree_document
from nvfp4check.agreement.layers import VALUE_POINTS
from nvfp4check.agreement.statistics import Decision
from nvfp4check.forward.options import Activations, Arithmetic, ForwardOptions, Perturbation
from nvfp4check.forward.streaming import run_forward
from nvfp4check.report.agree_html import agree_html
from nvfp4check.report.agree_text import agree_text
from nvfp4check.tokens import Prompt

BoundedRun = Callable[[str], Run]
Candidate = Callable[..., Run]
CHECKPOINTS = ("bf16", "fp8", "nvfp4")


def ratios(result: AgreeResult) -> dict[tuple[int, str], float]:
    return {h.agreement.key: h.bound.ratio for h in result.layers if h.bound is not None}


@pytest.mark.parametrize("arithmetic", ["float64", "bfloat16"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_another_correct_arithmetic_stays_within_every_bound(
    checkpoint: str, arithmetic: str, bounded_run: BoundedRun, candidate_run: Candidate
) -> None:
    result = agree(bounded_run(checkpoint), candidate_run(checkpoint, arithmetic))

    assert result.verdict is Decision.PASS
    assert result.bounds.dtype == ("bfloat16" if arithmetic == "bfloat16" else "float32")
    assert [c.what for c in result.criteria] == ["layers within their derived bounds"]
    found = ratios(result)
    assert {point for _, point in found} == set(VALUE_POINTS)
    assert {layer for layer, _ in found} == set(range(5))
    assert max(found.values()) < 1
    assert all(h.held_against == "bound" and h.diverges is False for h in result.layers)


def test_bounds_of_an_unquantised_model_are_not_wide_by_orders_of_magnitude(
    bounded_run: BoundedRun, candidate_run: Candidate
) -> None:
    result = agree(bounded_run("bf16"), candidate_run("bf16", "bfloat16"))

    assert all(0.025 < ratio < 0.5 for ratio in ratios(result).values())


def test_a_reference_in_bfloat16_has_bounds_that_a_float32_candidate_keeps(
    bounded_run: BoundedRun, candidate_run: Candidate
) -> None:
    reference = candidate_run("nvfp4", "bfloat16", given=False, bounds=("float32",))
    given = run_like("nvfp4", reference, Arithmetic.FLOAT32)

    result = agree(reference, given)

    assert result.verdict is Decision.PASS
    assert result.bounds.dtype == "float32"


def run_like(checkpoint: str, reference: Run, arithmetic: Arithmetic) -> Run:
    """Compute the prompts of a run again, each layer with that run's states."""
    prompts = [
        Prompt(id=prompt, tokens=tuple(reference.tokens(prompt).tolist()))
        for prompt in reference.prompts
    ]
    options = ForwardOptions(
        activations=Activations.ALL, arithmetic=arithmetic, inputs=reference.path
    )
    folder = reference.path.with_name(f"{reference.path.name}-{arithmetic}-again")
    tiny = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3"
    return run_forward(tiny / checkpoint, prompts, folder, options).run


def test_only_the_first_layer_is_held_where_inputs_are_not_given(
    bounded_run: BoundedRun, candidate_run: Candidate
) -> None:
    result = agree(bounded_run("nvfp4"), candidate_run("nvfp4", "bfloat16", given=False))

    whole = {h.agreement.layer for h in result.layers if h.held_against == "bound"}
    assert whole == {0}
    assert result.verdict is Decision.UNDECIDED


def test_a_prefix_whose_states_are_equal_is_held_and_no_token_after_it(
    bounded_run: BoundedRun, tmp_path: Path
) -> None:
    reference = bounded_run("bf16")
    other = copied(reference, tmp_path / "other")
    file = layer_file(other.path, 1)
    tensors = load_file(file)
    name = f"prompt1/{HIDDEN}"
    tensors[name][4] *= 1 + 2**-20
    write_tensors(file, tensors)

    result = agree(reference, Run.open(other.path))

    tokens = sum(prompt.tokens for prompt in reference.info.prompts)
    lost = len(reference.tokens("prompt1")) - 4
    held = {h.agreement.key: h.bound.tokens for h in result.layers if h.bound is not None}
    assert held[1, "hidden"] == tokens
    assert held[2, "attn_output"] == tokens - lost
    assert held[3, "attn_output"] == tokens


def copied(run: Run, folder: Path) -> Run:
    """A copy without bounds, as another engine's run would be."""
    shutil.copytree(run.path, folder)
    shutil.rmtree(folder / "bounds")
    write_info(folder, replace(run.info, bounds=()))
    return Run.open(folder)


def test_one_token_beyond_its_bound_is_named_and_fails(
    bounded_run: BoundedRun, candidate_run: Candidate, tmp_path: Path
) -> None:
    reference = bounded_run("nvfp4")
    other = copied_candidate(candidate_run("nvfp4", "float64"), tmp_path / "other")
    file = layer_file(other, 3)
    tensors = load_file(file)
    tensors["prompt2/attn_output"][5] *= 1.01
    write_tensors(file, tensors)

    result = agree(reference, Run.open(other))

    assert result.verdict is Decision.FAIL
    divergence = result.divergence
    assert divergence is not None
    assert (divergence.layer, divergence.point) == (3, "attn_output")
    assert (divergence.place.prompt, divergence.place.token) == ("prompt2", 5)
    assert divergence.held_against == "bound"
    (held,) = [h for h in result.layers if h.agreement.key == (3, "attn_output")]
    assert held.bound is not None
    assert (held.bound.exceeding, held.bound.first) == (1, divergence.place)
    with pytest.raises(AssertionError, match="1 of 146 tokens lie beyond their bound"):
        assert_agrees(other, reference)


def test_bounds_that_are_declared_and_not_there_are_missed(
    bounded_run: BoundedRun, tmp_path: Path
) -> None:
    reference = copied_candidate(bounded_run("bf16"), tmp_path / "reference")
    shutil.rmtree(reference / "bounds")

    result = agree(Run.open(reference), bounded_run("bf16"))

    assert [problem.message for problem in result.skipped] == [
        "its run.json declares bounds for float32, bfloat16, bfloat16/tp4, and it holds none"
    ]


def test_a_token_whose_bound_is_infinite_is_not_held(
    bounded_run: BoundedRun, candidate_run: Candidate, tmp_path: Path
) -> None:
    reference = copied_candidate(bounded_run("bf16"), tmp_path / "reference")
    file = bounds_file(reference, 2)
    tensors = load_file(file)
    tensors["prompt1/attn_output/bfloat16"][3] = torch.inf
    write_tensors(file, tensors)

    result = agree(Run.open(reference), candidate_run("bf16", "bfloat16"))

    (held,) = [h for h in result.layers if h.agreement.key == (2, "attn_output")]
    assert held.bound is not None
    assert (held.bound.whole, held.bound.tokens) == (False, held.agreement.tokens - 1)
    assert held.held_against == "nothing"
    assert result.verdict is Decision.UNDECIDED


def copied_candidate(run: Run, folder: Path) -> Path:
    shutil.copytree(run.path, folder)
    return folder


def test_other_experts_are_free_where_the_choice_may_change_and_a_fault_where_not(
    bounded_run: BoundedRun, candidate_run: Candidate, tmp_path: Path
) -> None:
    reference = bounded_run("nvfp4")
    name = f"passage0/{SETTLED}/float32"
    loose = copied_candidate(reference, tmp_path / "loose")
    bounds = load_file(bounds_file(loose, 2))
    settled = bounds[name].bool()
    assert settled.all()
    other = copied_candidate(candidate_run("nvfp4", "float64"), tmp_path / "other")
    tensors = load_file(layer_file(other, 2))
    chosen = tensors["passage0/router_experts"][7]
    chosen[0] = next(e for e in range(16) if e not in chosen.tolist())
    tensors["passage0/mlp_output"][7] *= 1.5
    tensors[f"passage0/{HIDDEN}"][7] *= 1.5
    tensors["passage0/router_weights"][7] = 0.25
    write_tensors(layer_file(other, 2), tensors)
    bounds[name][7] = 0
    save_file(bounds, bounds_file(loose, 2))

    wrong = agree(reference, Run.open(other))
    legal = agree(Run.open(loose), Run.open(other))

    assert wrong.divergence is not None
    assert (wrong.divergence.layer, wrong.divergence.point) == (2, "router_experts")
    assert wrong.divergence.held_against == "bound"
    assert wrong.divergence.place.token == 7
    assert wrong.verdict is Decision.FAIL
    assert legal.verdict is Decision.PASS
    free = {h.agreement.key: h.bound.free for h in legal.layers if h.bound is not None}
    assert free[2, "mlp_output"] == free[2, HIDDEN] == free[2, "router_weights"] == 1
    assert free[2, "attn_output"] == free[3, "mlp_output"] == 0
    assert "1 have no bound" not in agree_text(agree_document(wrong))
    assert "3 have no bound, as they chose other experts" in agree_text(agree_document(legal))


def test_a_candidate_that_should_compute_something_else_is_not_held(
    bounded_run: BoundedRun,
    candidate_run: Candidate,
    tiny_run: Callable[..., Run],
    tiny_prompts: list[Prompt],
    tmp_path: Path,
) -> None:
    reference = bounded_run("nvfp4")
    reasons = {
        "it is of another checkpoint": candidate_run("bf16", "bfloat16"),
        "its cache is none, the reference's stored": tiny_run("nvfp4"),
    }
    noisy = copied(reference, tmp_path / "noisy")
    write_info(noisy.path, replace(noisy.info, perturb=str(Perturbation("bfloat16"))))
    reasons["it has noise on its states"] = Run.open(noisy.path)
    narrow = copied(reference, tmp_path / "narrow")
    write_info(narrow.path, replace(narrow.info, dtype="float8_e5m2"))
    reasons[
        "its dtype is 'float8_e5m2', and the bounds are for float32, bfloat16, bfloat16/tp4"
    ] = Run.open(narrow.path)

    for reason, candidate in reasons.items():
        result = agree(reference, candidate)

        assert result.bounds.points == {}
        (note,) = [p for p in result.problems if p.kind == "bounds"]
        assert reason in note.message
        assert not note.fatal
        assert not result.skipped


def test_runs_of_the_same_states_have_the_same_inputs_and_others_have_not(
    bounded_run: BoundedRun, candidate_run: Candidate, tmp_path: Path
) -> None:
    reference, given = bounded_run("bf16"), candidate_run("bf16", "bfloat16")
    forged = copied_candidate(given, tmp_path / "forged")
    digests = given.info.inputs
    assert digests is not None
    write_info(forged, replace(given.info, inputs={**digests, "prompt0": "sha256:0"}))

    held = {
        run.path.name: agree(reference, run).bounds.points[3, "attn_output"].tokens
        for run in (given, Run.open(forged))
    }

    tokens = sum(prompt.tokens for prompt in reference.info.prompts)
    assert held[given.path.name] == tokens
    assert held["forged"] == tokens - len(reference.tokens("prompt0"))


def test_a_noise_floor_judges_what_has_no_bound(
    bounded_run: BoundedRun, candidate_run: Candidate, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    reference = bounded_run("bf16")
    options = ForwardOptions(
        activations=Activations.ALL, perturbation=Perturbation("bfloat16"), seed=1
    )
    noise = run_forward(
        Path(str(reference.info.checkpoint["location"])), tiny_prompts, tmp_path / "noise", options
    ).run

    result = agree(
        reference, candidate_run("bf16", "float64", given=False), AgreeOptions(noise=(noise,))
    )

    against = {h.agreement.layer: h.held_against for h in result.layers}
    assert against == {
        0: "bound",
        1: "noise floor",
        2: "noise floor",
        3: "noise floor",
        4: "noise floor",
    }
    assert result.verdict is Decision.PASS


def test_the_document_and_the_pages_say_what_was_held(
    bounded_run: BoundedRun, candidate_run: Candidate
) -> None:
    result = agree(bounded_run("nvfp4"), candidate_run("nvfp4", "bfloat16"))

    document = agree_document(result)

    assert document["bounds"]["dtype"] == "bfloat16"
    assert document["bounds"]["held"] > 4000
    assert document["bounds"]["exceeding"] == 0
    assert 0 < document["bounds"]["risk"] < 0.01
    (point,) = [p for p in document["layers"] if (p["layer"], p["point"]) == (1, "attn_output")]
    assert point["held_against"] == "bound"
    assert point["relative_error"] < point["bound"]
    assert 0 < point["bound_ratio"] < 1
    assert set(point["bound_worst"]) == {"prompt", "token"}
    text = agree_text(document)
    assert "Derived bounds (bfloat16)" in text
    assert "Layers: every point is within its bound." in text
    assert "bound of hidden" in agree_html(document)


def test_a_run_without_bounds_is_judged_as_before(bounded_run: BoundedRun, tmp_path: Path) -> None:
    plain = copied(bounded_run("bf16"), tmp_path / "plain")
    assert (plain.path / RUN_FILE).is_file()

    result = agree(plain, plain)

    assert result.bounds.dtype is None
    assert agree_document(result)["bounds"] is None
    assert [c.what for c in result.criteria] == ["equal bit for bit at every point compared"]


def test_bounds_are_the_same_whatever_else_is_declared(
    bounded_run: BoundedRun, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    reference = bounded_run("nvfp4")
    options = ForwardOptions(activations=Activations.ALL, bounds=("bfloat16",))
    location = Path(str(reference.info.checkpoint["location"]))
    alone = run_forward(location, tiny_prompts, tmp_path / "alone", options).run

    for layer in reference.layers:
        ours, theirs = (load_file(bounds_file(run.path, layer)) for run in (reference, alone))
        for name, value in theirs.items():
            assert torch.equal(ours[name], value)
    assert layer_file(alone.path, 2).read_bytes() == layer_file(reference.path, 2).read_bytes()
