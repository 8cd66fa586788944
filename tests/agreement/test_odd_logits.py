"""Logits that are not as they should be: each output says what is wrong, and where."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import AgreeOptions, AgreeResult, agree
from nvfp4check.agreement.document import agree_document
from nvfp4check.agreement.statistics import Decision
from nvfp4check.cli.main import main
from nvfp4check.findings import CheckError
from nvfp4check.report.formats import Format
from nvfp4check.report.render import render

WriteLogits = Callable[..., Run]
Rows = dict[str, torch.Tensor]


@pytest.fixture
def rows() -> Rows:
    """Logits of two prompts, over 30 tokens."""
    generator = torch.Generator().manual_seed(3)
    return {prompt: torch.randn(16, 30, generator=generator) for prompt in "ab"}


@pytest.fixture
def near(rows: Rows) -> Rows:
    """The same with a little noise."""
    generator = torch.Generator().manual_seed(4)
    return {p: x + 0.05 * torch.randn(x.shape, generator=generator) for p, x in rows.items()}


def problems(result: AgreeResult, kind: str) -> list[tuple[str, str, bool]]:
    return [(p.run, p.message, p.fatal) for p in result.problems if p.kind == kind]


def every_format(result: AgreeResult) -> list[str]:
    document = agree_document(result)
    return [render(document, f) for f in (Format.TEXT, Format.MARKDOWN, Format.HTML)]


def padded(rows: Rows, value: float) -> Rows:
    return {p: torch.cat((x, torch.full((len(x), 4), value)), dim=1) for p, x in rows.items()}


def test_padding_is_cut_off_and_its_probability_told(
    write_logits: WriteLogits, rows: Rows, near: Rows
) -> None:
    reference, candidate = write_logits("a", rows), write_logits("b", padded(near, -9.0))
    share = padded(near, -9.0)["a"].double().softmax(-1)[:, 30:].sum(-1).mean()

    result = agree(reference, candidate)

    message = (
        "logits of 34 entries where the other run has 30: padding, cut off, with "
        f"{float(share):.2g} of the probability"
    )
    assert problems(result, "vocabulary") == [("candidate", message, False)]
    assert result.logits is not None
    assert result.logits.kl.mean == agree(reference, write_logits("c", near)).logits.kl.mean  # type: ignore[union-attr]


@pytest.mark.parametrize("wider", ["reference", "candidate"])
def test_another_vocabulary_is_no_padding_where_its_tokens_are_the_best(
    wider: str, write_logits: WriteLogits, rows: Rows, near: Rows
) -> None:
    sides = {"reference": rows, "candidate": near}
    sides[wider] = padded(sides[wider], 0.0)
    sides[wider]["b"][5, 33] = 50.0

    result = agree(*(write_logits(name, side) for name, side in sides.items()))

    assert result.verdict is Decision.FAIL
    ((run, message, fatal),) = [p for p in problems(result, "vocabulary") if p[2]]
    assert (run, fatal) == (wider, True)
    assert "the best token of 1 of 16 positions is none of these: another vocabulary" in message


def test_logits_of_few_bits_are_told_to_be_rounded(write_logits: WriteLogits, rows: Rows) -> None:
    reference = write_logits("a", rows)
    candidate = write_logits("b", {p: x.bfloat16() for p, x in rows.items()})

    result = agree(reference, candidate)

    ((run, message, fatal),) = problems(result, "rounded")
    assert (run, fatal) == ("candidate", False)
    assert message.startswith("logits are stored as bfloat16, each rounded by up to 0.0039 of")
    assert result.logits is not None
    assert 0 < result.logits.kl.mean < 1e-4


def test_one_nan_fails_and_is_named_by_run_prompt_position_and_token(
    write_logits: WriteLogits, rows: Rows, near: Rows
) -> None:
    near["b"][3, 7] = torch.nan
    near["b"][9, 2] = torch.inf

    result = agree(
        write_logits("a", rows), write_logits("b", near), AgreeOptions(max_kl=5.0, alpha=0.4)
    )

    assert result.verdict is Decision.FAIL
    assert problems(result, "nonfinite") == [
        (
            "candidate",
            "logits of prompt 'b', position 3, hold nan for token 7: the first of 2 such positions "
            "of the prompt, of either run",
            False,
        )
    ]
    for shown in every_format(result):
        assert "position 3, hold nan for token 7" in shown
        assert "positions without NaN or infinity: 2 hold some" in shown
        assert "Left out, as holding NaN or infinity: 2 positions." in shown


def test_a_row_that_rules_out_every_token_is_named(
    write_logits: WriteLogits, rows: Rows, near: Rows
) -> None:
    rows["a"][4] = -torch.inf

    ((run, message, _),) = problems(
        agree(write_logits("a", rows), write_logits("b", near)), "nonfinite"
    )

    assert (run, message) == (
        "reference",
        "logits of prompt 'a', position 4, hold nothing above -inf",
    )


@pytest.mark.filterwarnings("error")
def test_an_infinite_divergence_is_called_so(
    write_logits: WriteLogits, rows: Rows, near: Rows
) -> None:
    near["a"][6, 3] = -torch.inf

    result = agree(write_logits("a", rows), write_logits("b", near), AgreeOptions(max_kl=1.0))

    assert result.verdict is Decision.FAIL
    logits: dict[str, Any] = agree_document(result)["logits"]
    assert (logits["kl_mean"], logits["kl_max"], logits["kl_infinite"]) == (None, None, 1)
    assert logits["kl_median"] is not None
    for shown in every_format(result):
        assert "mean KL infinite, limit 1" in shown
        assert "KL is infinite at 1 position: the candidate rules out a token" in shown
    text = every_format(result)[0]
    assert re.search(r"KL\(reference \|\| candidate\), mean +infinite ", text)
    assert re.search(r"KL, largest +infinite", text)
    assert re.search(r"^a +6 +infinite ", text, re.MULTILINE)


def test_prompts_without_tokens_count_for_nothing(
    write_logits: WriteLogits, rows: Rows, near: Rows
) -> None:
    empty = torch.empty(0, 30)
    with_empty = agree(
        write_logits("a", {**rows, "z": empty}), write_logits("b", {**near, "z": empty})
    )
    without = agree(write_logits("c", rows), write_logits("d", near))

    assert agree_document(with_empty)["logits"] == agree_document(without)["logits"]
    assert "32 positions of 2 prompts" in every_format(with_empty)[0]


def test_runs_of_prompts_without_tokens_alone_are_not_compared(write_logits: WriteLogits) -> None:
    runs = [write_logits(name, {"z": torch.empty(0, 30)}) for name in "ab"]

    with pytest.raises(CheckError, match="none of the prompts that both runs have has a token"):
        agree(*runs)


def test_a_pass_that_skipped_something_says_what_its_exit_code_is(
    write_logits: WriteLogits, rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = write_logits("a", rows), write_logits("b", {"a": rows["a"]})
    line = ["agree", *(str(run.path) for run in runs)]

    assert main(line) == 2
    text = capsys.readouterr().out
    assert "Not all was compared: 1 thing that a run lacks" in text
    assert "The exit code is 2 for that, unless --allow-skips is given." in text
    assert "16 positions of 1 prompt, in" in text
    assert main([*line, "--allow-skips", "--format", "markdown"]) == 0
    assert "Not all was compared" in capsys.readouterr().out
