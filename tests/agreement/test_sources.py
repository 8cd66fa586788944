"""Logits from full rows, from states and a head, and the assertion and fixture for engines."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvfp4check.activations import Run
from nvfp4check.agreement import assert_agrees
from nvfp4check.agreement.agree import AgreeOptions, agree
from nvfp4check.findings import CheckError
from nvfp4check.forward.options import ForwardOptions, KvCache, Logits
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt

TinyRun = Callable[..., Run]
TINY = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3"


@pytest.fixture
def states(tiny_prompts: list[Prompt], tmp_path: Path) -> Run:
    options = ForwardOptions(kv_cache=KvCache.NONE, logits=Logits("hidden"))
    return run_forward(TINY / "bf16", tiny_prompts, tmp_path / "states", options).run


def test_states_and_the_head_give_the_logits(tiny_run: TinyRun, states: Run) -> None:
    result = agree(tiny_run("bf16"), states, AgreeOptions(max_kl=1e-10))

    assert result.logits is not None
    assert result.logits.kl.mean < 1e-10
    assert result.verdict.value == "pass"


def test_states_are_compared_in_small_blocks_as_in_one(
    tiny_run: TinyRun, states: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = agree(tiny_run("nvfp4"), states).logits
    monkeypatch.setattr("nvfp4check.agreement.sources._STATE_ELEMENTS", 3 * 1024)

    pieces = agree(tiny_run("nvfp4"), states).logits

    assert whole is not None
    assert pieces is not None
    assert pieces.kl.mean == pytest.approx(whole.kl.mean, rel=1e-6)


def test_states_of_an_unknown_checkpoint_ask_for_the_head(tiny_run: TinyRun, states: Run) -> None:
    lost = Run(states.path, replace(states.info, checkpoint={}))

    with pytest.raises(CheckError, match="--head"):
        agree(tiny_run("bf16"), lost)
    assert agree(tiny_run("bf16"), lost, AgreeOptions(head=str(TINY / "bf16"))).logits is not None


def test_a_top_k_run_is_compared_with_full_logits(
    tiny_run: TinyRun, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    options = ForwardOptions(kv_cache=KvCache.NONE, logits=Logits("topk", 20))
    best = run_forward(TINY / "nvfp4", tiny_prompts, tmp_path / "best", options).run
    full = agree(tiny_run("bf16"), tiny_run("nvfp4")).logits

    found = agree(tiny_run("bf16"), best)

    assert found.logits is not None
    assert full is not None
    assert 0 < found.logits.kl.mean < full.kl.mean
    assert found.logits.mean("top1") == full.mean("top1")
    assert found.positions is not None
    assert found.positions.tail is not None
    assert not found.positions.tail.exact


def test_a_run_agrees_with_its_golden_and_a_wrong_one_says_where(tiny_run: TinyRun) -> None:
    reference, wrong = tiny_run("bf16"), tiny_run("nvfp4")

    assert_agrees(reference, reference)
    assert_agrees(wrong, reference, max_kl=0.5)
    with pytest.raises(AssertionError, match=r"part at layer 0, attn_output, prompt 'prompt0'"):
        assert_agrees(wrong, reference)
    with pytest.raises(AssertionError, match=r"mean KL: fail, found 0\.0\d+, limit 0\.001"):
        assert_agrees(wrong, reference, max_kl=0.001)


def test_positions_too_few_to_tell_are_no_agreement(write_logits: Callable[..., Run]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 9, generator=generator)
    other = logits + torch.randn(2, 9, generator=generator) * 0.1

    with pytest.raises(AssertionError, match="undecided"):
        assert_agrees(write_logits("b", {"p": other}), write_logits("a", {"p": logits}), max_kl=0.1)
