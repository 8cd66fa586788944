"""Dumps that lie: each way is planted and found, and a sound run is left alone."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from nvfp4check.activations import Run, layer_file, write_info, write_tensors
from nvfp4check.agreement.agree import AgreeOptions, agree
from nvfp4check.agreement.integrity import Integrity, check_runs
from nvfp4check.agreement.shifted import shift_of
from nvfp4check.agreement.statistics import Decision
from nvfp4check.findings import CheckError

WriteRun = Callable[..., Run]
Tensors = dict[int, dict[str, dict[str, torch.Tensor]]]
PROMPTS = {"p": 9, "q": 6}
WIDTH = 12


def model(noise: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Three layers whose states are the sums of what was added to them."""
    points: Tensors = {layer: {} for layer in range(3)}
    for number, (prompt, tokens) in enumerate(PROMPTS.items()):
        generator = torch.Generator().manual_seed(number)
        state = torch.randn(tokens, WIDTH, generator=generator).to(dtype)
        for layer in range(3):
            for point in ("attn_output", "mlp_output"):
                value = torch.randn(tokens, WIDTH, generator=generator)
                value = (value * (1 + noise * torch.randn(tokens, WIDTH))).to(dtype)
                state = state + value
                points[layer].setdefault(point, {})[prompt] = value
            points[layer].setdefault("hidden", {})[prompt] = state
    return points


def checked(write_run: WriteRun, candidate: Tensors, reference: Tensors | None = None) -> Integrity:
    runs = write_run("reference", reference or model()), write_run("candidate", candidate)
    return check_runs(*runs, tuple(PROMPTS))


def kinds(found: Integrity) -> set[str]:
    return {problem.kind for problem in found.problems}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sound_run_has_no_problem(write_run: WriteRun, dtype: torch.dtype) -> None:
    assert checked(write_run, model(1e-3, dtype), model(0, dtype)).problems == []


def test_states_computed_wider_than_they_are_stored_are_sound(write_run: WriteRun) -> None:
    wide = model(0, torch.float64)
    stored: Tensors = {
        layer: {
            point: {prompt: value.bfloat16() for prompt, value in by_prompt.items()}
            for point, by_prompt in by_point.items()
        }
        for layer, by_point in wide.items()
    }

    assert checked(write_run, stored, wide).problems == []


def test_a_buffer_that_another_layer_left_is_found(write_run: WriteRun) -> None:
    lying = model()
    lying[2]["attn_output"]["p"] = lying[1]["attn_output"]["p"]

    found = checked(write_run, lying)

    repeated = [problem for problem in found.problems if problem.kind == "repeated"]
    assert [(p.layer, p.point, p.prompt) for p in repeated] == [(2, "attn_output", "p")]
    assert "sum" in kinds(found)
    assert found.fatal


def test_a_buffer_that_another_prompt_left_is_found(write_run: WriteRun) -> None:
    lying = model()
    lying[1]["mlp_output"]["q"] = lying[1]["mlp_output"]["p"][:6].clone()
    reference = model()
    for points in (lying, reference):  # prompts of the same length, under other tokens
        for by_point in points.values():
            for by_prompt in by_point.values():
                by_prompt["p"] = by_prompt["p"][:6]
    run = write_run("candidate", lying)
    other = {"p": torch.arange(6), "q": torch.arange(6) + 50}
    write_tensors(run.path / "tokens.safetensors", other)
    base = write_run("reference", reference)
    write_tensors(base.path / "tokens.safetensors", other)

    found = check_runs(base, run, tuple(PROMPTS))

    assert [p.prompt for p in found.problems if p.kind == "repeated"] == ["q"]


def test_the_same_prompt_under_two_names_is_no_lie(write_run: WriteRun) -> None:
    points = model()
    for by_point in points.values():
        for by_prompt in by_point.values():
            by_prompt["q"] = by_prompt["p"].clone()
    for name in ("reference", "candidate"):
        run = write_run(name, points)
        write_tensors(run.path / "tokens.safetensors", {"p": torch.arange(9), "q": torch.arange(9)})

    assert check_runs(run, run, tuple(PROMPTS)).problems == []


def test_a_row_that_was_copied_again_is_found(write_run: WriteRun) -> None:
    lying = model()
    lying[1]["attn_output"]["p"][5] = lying[1]["attn_output"]["p"][4]

    found = checked(write_run, lying)

    (problem,) = [problem for problem in found.problems if problem.kind == "repeated"]
    assert "row 5 is bit for bit row 4" in problem.message


@pytest.mark.parametrize("shift", [1, -1])
def test_rows_of_the_neighbouring_token_are_found(write_run: WriteRun, shift: int) -> None:
    lying = model(1e-3)
    lying[1]["mlp_output"]["p"] = lying[1]["mlp_output"]["p"].roll(shift, 0)

    found = checked(write_run, lying)

    shifted = [problem for problem in found.problems if problem.kind == "shifted"]
    assert [(p.layer, p.point, p.prompt) for p in shifted] == [(1, "mlp_output", "p")]
    assert f"row t {'-' if shift > 0 else '+'} 1" in shifted[0].message


def test_rows_that_are_merely_wrong_are_not_called_shifted() -> None:
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(40, 16, generator=generator, dtype=torch.float64)

    assert shift_of(reference, reference) == 0
    assert shift_of(reference, torch.randn(40, 16, generator=generator)) == 0
    assert shift_of(reference, reference * 0) == 0


def test_a_state_that_is_not_the_sum_of_its_parts_is_found(write_run: WriteRun) -> None:
    lying = model()
    lying[1]["hidden"]["q"][3] += 1e-4

    found = checked(write_run, lying)

    sums = [(p.layer, p.prompt) for p in found.problems if p.kind == "sum"]
    assert sums == [(1, "q"), (2, "q")]


def test_noise_put_on_the_state_is_no_lie(write_run: WriteRun) -> None:
    run = write_run("reference", model())
    noisy = model()
    noisy[1]["hidden"]["q"] *= 1.001
    candidate = write_run("candidate", noisy)
    write_info(candidate.path, replace(candidate.info, perturb="ulp:bfloat16"))

    assert check_runs(run, Run.open(candidate.path), tuple(PROMPTS)).problems == []


def test_a_missing_point_is_found_and_left_out(write_run: WriteRun) -> None:
    lying = model()
    del lying[1]["mlp_output"]["q"]

    found = checked(write_run, lying)

    (problem,) = found.problems
    assert (problem.kind, problem.run, problem.fatal) == ("missing", "candidate", False)
    assert found.skip == {(1, "mlp_output", "q")}


def test_a_missing_layer_is_found(write_run: WriteRun) -> None:
    lying = model()
    del lying[1]

    found = checked(write_run, lying)

    assert [(p.kind, p.layer) for p in found.problems] == [("missing", 1)]


@pytest.mark.parametrize("rows", [18, 10, 8])
def test_more_or_fewer_rows_than_tokens_are_found(write_run: WriteRun, rows: int) -> None:
    reference, lying = write_run("reference", model()), write_run("candidate", model())
    tensors = {
        f"{prompt}/{point}": value
        for point, by_prompt in model()[1].items()
        for prompt, value in by_prompt.items()
    }
    tensors["p/attn_output"] = torch.randn(rows, WIDTH)
    write_tensors(layer_file(lying.path, 1), tensors)

    found = check_runs(reference, lying, tuple(PROMPTS))

    (problem,) = [problem for problem in found.problems if problem.kind == "rows"]
    assert f"{rows} rows for 9 tokens" in problem.message
    assert ("multi-token prediction" in problem.message) == (rows == 18)
    assert (1, "attn_output", "p") in found.skip


def test_a_shard_of_a_row_is_found(write_run: WriteRun) -> None:
    lying = model()
    lying[1]["attn_output"]["p"] = lying[1]["attn_output"]["p"][:, :6]

    found = checked(write_run, lying)

    (problem,) = [problem for problem in found.problems if problem.kind == "width"]
    assert "reference [9, 12], candidate [9, 6]" in problem.message


def test_layers_of_multi_token_prediction_are_left_out_and_said(write_run: WriteRun) -> None:
    run = write_run("reference", model())
    write_info(run.path, replace(run.info, config={"num_hidden_layers": 2}))
    run = Run.open(run.path)

    result = agree(run, run)

    assert {point.agreement.layer for point in result.layers} == {0, 1}
    assert {problem.kind for problem in result.problems} == {"layers"}
    assert result.verdict is Decision.PASS


def test_a_padded_vocabulary_is_cut_and_said(write_logits: WriteRun) -> None:
    logits = torch.randn(6, 10)
    padded = torch.cat((logits, torch.zeros(6, 6)), dim=1)

    result = agree(write_logits("a", {"p": logits}), write_logits("b", {"p": padded}))

    assert [problem.kind for problem in result.problems] == ["vocabulary"]
    assert result.verdict is Decision.PASS
    assert result.positions is not None
    assert result.positions.vocabulary == 10


def test_logits_with_rows_of_multi_token_prediction_are_refused(
    write_logits: WriteRun, write_run: WriteRun
) -> None:
    reference = write_logits("a", {"p": torch.randn(6, 10), "q": torch.randn(4, 10)})
    candidate = write_logits("b", {"p": torch.randn(6, 10), "q": torch.randn(4, 10)})
    rows: Mapping[str, torch.Tensor] = {"p": torch.randn(12, 10), "q": torch.randn(4, 10)}
    write_tensors(candidate.path / "logits.safetensors", rows)

    result = agree(reference, candidate, AgreeOptions(max_kl=100.0))

    (problem,) = result.problems
    assert "multi-token prediction" in problem.message
    assert result.verdict is Decision.FAIL
    assert result.logits is not None
    assert list(result.logits.by_prompt) == ["q"]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_contamination_fails_whatever_the_limits(write_logits: WriteRun, poison: float) -> None:
    logits = torch.randn(60, 10)
    spoilt = logits.clone()
    spoilt[17, 3] = poison

    options = AgreeOptions(max_kl=1.0)
    result = agree(write_logits("a", {"p": logits}), write_logits("b", {"p": spoilt}), options)

    assert result.verdict is Decision.FAIL
    assert result.logits is not None
    assert result.logits.contaminated == 1
    assert result.logits.positions == 59


def test_layers_that_run_json_promises_and_nobody_wrote_are_missed(write_run: WriteRun) -> None:
    reference, candidate = (write_run(name, model()) for name in ("reference", "candidate"))
    for layer in candidate.layers:
        candidate.layer_file(layer).unlink()
    write_info(candidate.path, replace(candidate.info, activations="all"))

    found = check_runs(reference, Run.open(candidate.path), tuple(PROMPTS))

    (problem,) = found.problems
    assert (problem.kind, problem.run) == ("missing", "candidate")
    assert not problem.fatal


def test_a_run_that_promises_no_layers_is_not_missing_any(write_run: WriteRun) -> None:
    reference, candidate = (write_run(name, model()) for name in ("reference", "candidate"))
    for layer in candidate.layers:
        candidate.layer_file(layer).unlink()

    assert check_runs(reference, Run.open(candidate.path), tuple(PROMPTS)).problems == []


def test_layers_that_only_the_reference_has_are_missed_unless_logits_are_judged_alone(
    write_logits: WriteRun,
) -> None:
    reference, candidate = (write_logits(name, {"p": torch.eye(3)}) for name in ("a", "b"))
    write_tensors(layer_file(reference.path, 0), {"p/hidden": torch.eye(3)})

    (missed,) = agree(Run.open(reference.path), candidate).skipped
    limited = agree(Run.open(reference.path), candidate, AgreeOptions(max_kl=0.1))

    assert missed.message.startswith("no layer was recorded, and the reference has 1")
    assert limited.skipped == ()


def test_a_point_without_rows_is_refused_by_name(write_run: WriteRun) -> None:
    sound = write_run("sound", {0: {"hidden": {"p": torch.ones(3, 2)}}})
    flat = write_run("flat", {0: {"hidden": {"p": torch.ones(3)}}})

    with pytest.raises(CheckError, match=r"'p/hidden' has the shape \[3\], expected one row"):
        agree(sound, flat)


@pytest.mark.parametrize(
    ("logits", "found"),
    [
        (torch.ones(3), r"F32 \[3\]"),
        (torch.ones(3, 0), r"F32 \[3, 0\]"),
        (torch.ones(3, 2, dtype=torch.int32), r"I32 \[3, 2\]"),
    ],
)
def test_logits_that_are_none_are_refused(
    logits: torch.Tensor, found: str, write_logits: WriteRun
) -> None:
    sound = write_logits("sound", {"p": torch.ones(3, 8)})

    with pytest.raises(CheckError, match=f"holds {found}, expected real numbers"):
        agree(sound, write_logits("flat", {"p": logits}))
