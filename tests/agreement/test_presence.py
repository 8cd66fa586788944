"""What one run has and another lacks: said in every case, and never passed over by a verdict."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nvfp4check.activations import FINAL_HIDDEN_FILE, Run, layer_file, write_tensors
from nvfp4check.agreement import assert_agrees
from nvfp4check.agreement.agree import AgreeOptions, AgreeResult, Judge, agree
from nvfp4check.agreement.document import agree_document
from nvfp4check.agreement.statistics import Decision
from nvfp4check.cli.main import main
from nvfp4check.findings import CheckError
from nvfp4check.report.formats import Format
from nvfp4check.report.render import render

WriteLogits = Callable[..., Run]


@pytest.fixture
def whole(write_logits: WriteLogits) -> Callable[..., Run]:
    """Write a run of two prompts, with a layer and logits, the same each time."""

    def write(name: str, *, tokens: int = 12, prompts: tuple[str, ...] = ("a", "b")) -> Run:
        generator = torch.Generator().manual_seed(1)
        rows = {prompt: torch.randn(tokens, 30, generator=generator) for prompt in prompts}
        run = write_logits(name, rows)
        states = {f"{prompt}/hidden": values[:, :8].clone() for prompt, values in rows.items()}
        write_tensors(layer_file(run.path, 0), states)
        return run

    return write


def without(run: Run, *names: str) -> Run:
    """Take files away from a run."""
    for name in names:
        (run.path / name).unlink()
    return Run.open(run.path)


def messages(result: AgreeResult) -> list[tuple[str, str]]:
    return [(problem.run, problem.message) for problem in result.problems]


NO_LOGITS = "no logits were recorded, and the reference has them: they are not compared"


def test_logits_that_the_candidate_lacks_are_missed(whole: Callable[..., Run]) -> None:
    reference, candidate = whole("a"), without(whole("b"), "logits.safetensors")

    result = agree(reference, candidate)

    assert messages(result) == [("candidate", NO_LOGITS)]
    assert result.verdict is Decision.PASS  # of what was compared, which the exit code knows
    assert [problem.message for problem in result.skipped] == [NO_LOGITS]
    with pytest.raises(AssertionError, match=NO_LOGITS):
        assert_agrees(candidate, reference)
    assert_agrees(candidate, reference, allow_skips=True)


def test_states_that_the_candidate_lacks_are_missed_as_logits_are(
    whole: Callable[..., Run],
) -> None:
    reference, candidate = (without(whole(name), "logits.safetensors") for name in "ab")
    write_tensors(reference.path / FINAL_HIDDEN_FILE, {"a": torch.ones(12, 4)})

    assert messages(agree(reference, candidate)) == [("candidate", NO_LOGITS)]


def test_logits_that_the_reference_lacks_are_not_asked_for(whole: Callable[..., Run]) -> None:
    assert messages(agree(without(whole("a"), "logits.safetensors"), whole("b"))) == []


@pytest.mark.parametrize("lacking", ["reference", "candidate"])
def test_a_limit_on_logits_that_a_run_lacks_cannot_be_checked(
    lacking: str, whole: Callable[..., Run]
) -> None:
    runs = {name: whole(name) for name in ("reference", "candidate")}
    without(runs[lacking], "logits.safetensors")

    with pytest.raises(CheckError, match=f"{lacking} holds none; record them with"):
        agree(runs["reference"], runs["candidate"], AgreeOptions(max_kl=1.0))
    reported = AgreeOptions(max_kl=1.0, judge=Judge.NONE)
    assert agree(runs["reference"], runs["candidate"], reported).logits is None


def test_the_command_does_not_pass_over_logits_that_are_missing(
    whole: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    reference, candidate = whole("a"), without(whole("b"), "logits.safetensors")
    line = ["agree", str(reference.path), str(candidate.path)]

    assert main(line) == 2
    assert f"note, candidate: {NO_LOGITS}" in capsys.readouterr().out
    assert main([*line, "--allow-skips"]) == 0


def test_logits_with_other_rows_than_tokens_fail_though_none_is_left_to_compare(
    whole: Callable[..., Run],
) -> None:
    reference, candidate = whole("a"), whole("b")
    rows = {prompt: torch.zeros(24, 30) for prompt in ("a", "b")}
    write_tensors(candidate.path / "logits.safetensors", rows)

    result = agree(reference, candidate)

    assert result.verdict is Decision.FAIL
    assert [problem.kind for problem in result.problems] == ["rows", "rows"]


def test_what_a_noise_run_lacks_has_no_floor_and_is_said(whole: Callable[..., Run]) -> None:
    bare = without(whole("bare"), "logits.safetensors", "layers/000.safetensors")

    result = agree(whole("a"), whole("b"), AgreeOptions(noise=(whole("full"), bare)))

    end = "so that they have no floor by it"
    assert messages(result) == [
        ("noise", f"{bare.path} lacks layers, {end}"),
        ("noise", f"{bare.path} lacks logits, {end}"),
    ]
    assert result.skipped == ()


@pytest.mark.parametrize("option", ["noise", "forced"])
def test_a_floor_or_a_split_of_fewer_prompts_is_refused(
    option: str, whole: Callable[..., Run]
) -> None:
    short = whole("short", prompts=("a",))
    given = AgreeOptions(noise=(short,)) if option == "noise" else AgreeOptions(forced=short)

    with pytest.raises(CheckError, match=f"--{option} .*lacks 1 of the 2 prompts .*first 'b'"):
        agree(whole("a"), whole("b"), given)


def best_of(run: Run, keep: int) -> Run:
    """Replace a run's logits by the best few of each position."""
    tensors = {}
    for prompt in run.prompts:
        rows = run.logits(prompt)
        values, tokens = rows.topk(keep)
        tensors |= {
            f"{prompt}/values": values,
            f"{prompt}/tokens": tokens.int(),
            f"{prompt}/logsumexp": rows.logsumexp(-1),
        }
    write_tensors(run.path / "logits.safetensors", tensors)
    return Run.open(run.path)


def test_perplexity_says_over_how_many_positions_it_is(whole: Callable[..., Run]) -> None:
    reference, candidate = whole("a"), whole("b")
    after = torch.cat([reference.tokens(prompt)[1:] for prompt in "ab"])
    best = torch.cat([reference.logits(prompt)[:-1].topk(9).indices for prompt in "ab"])
    known = (best == after.unsqueeze(1)).any(1)
    nll = torch.cat([-reference.logits(prompt).log_softmax(-1)[:-1] for prompt in "ab"])
    nll = nll.gather(1, after.unsqueeze(1)).squeeze(1)

    document = agree_document(agree(reference, best_of(candidate, 9)))
    logits: dict[str, Any] = document["logits"]

    assert logits["followed"] == 22
    assert logits["followed_known"] == int(known.sum())
    assert 0 < int(known.sum()) < 22
    assert logits["ppl_reference"] == pytest.approx(float(nll[known].mean().exp()), rel=1e-6)
    said = f"are over {int(known.sum())} of 22 positions that a token follows"
    for format in (Format.TEXT, Format.MARKDOWN, Format.HTML):
        assert said in render(document, format)


def test_perplexity_over_every_position_needs_no_word(whole: Callable[..., Run]) -> None:
    document = agree_document(agree(whole("a"), whole("b")))

    assert document["logits"]["followed"] == document["logits"]["followed_known"] == 22
    assert "that a token follows" not in render(document, Format.TEXT)


def test_a_document_of_before_these_numbers_is_still_shown(whole: Callable[..., Run]) -> None:
    document = json.loads(json.dumps(agree_document(agree(whole("a"), whole("b")))))
    del document["logits"]["followed"], document["logits"]["followed_known"]

    assert render(document, Format.TEXT).startswith("PASS")
