"""After an error that CUDA keeps, nothing is blamed on what comes after it."""

from collections.abc import Iterator

import pytest
import torch

from nvfp4check.cli.kernels_runs import Question, asked, document
from nvfp4check.properties import law as laws
from nvfp4check.properties.law import (
    Case,
    Failure,
    Property,
    Runner,
    Setting,
    Verdict,
    context_lost,
)


def keeps_its_error(device: object = None) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_context_is_lost_where_waiting_for_the_gpu_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", keeps_its_error)
    assert not context_lost("cpu")
    assert not context_lost("cuda")  # of which nothing was asked yet

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not context_lost("cuda:0")

    monkeypatch.setattr(torch.cuda, "synchronize", keeps_its_error)
    assert context_lost("cuda:0")


def three(setting: Setting) -> Iterator[Case]:
    yield Case("three", {"size": 3})


def smaller(case: Case, failure: Failure) -> Iterator[Case]:
    if case.inputs["size"]:
        yield Case("smaller", {"size": case.inputs["size"] - 1})


def breaks(runner: Runner, case: Case) -> Failure:
    return Failure(message="broken", case=case)


@pytest.mark.parametrize(("lost", "said"), [(False, "size = 0"), (True, "size = 3")])
def test_the_case_that_lost_the_context_is_shown_and_no_smaller_one(
    monkeypatch: pytest.MonkeyPatch, lost: bool, said: str
) -> None:
    monkeypatch.setattr(laws, "context_lost", lambda device: lost)
    tried = Property(
        name="breaks",
        operation="swizzle",
        law="",
        generate=three,
        check=breaks,
        shrink=smaller,
    )

    outcome = tried.run(lambda block_scales: block_scales, Setting())

    assert outcome.verdict is Verdict.FAIL
    assert outcome.message.endswith(said)


def test_without_another_process_what_comes_after_is_skipped_and_not_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked_of: list[str] = []
    monkeypatch.setattr(laws, "context_lost", lambda device: asked_of.append(device) or True)
    question = Question(op="swizzle", impl="reference")

    found = document(question, asked(question))

    first, *rest = found["properties"]
    assert first["verdict"] == "pass"
    assert {one["verdict"] for one in rest} == {"skip"}
    assert "left the GPU unusable" in rest[0]["message"]
    assert set(asked_of) == {"cpu"}
