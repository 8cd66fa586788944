import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import agree
from nvfp4check.agreement.criteria import AgreeOptions
from nvfp4check.agreement.document import agree_document
from nvfp4check.agreement.statistics import (
    Decision,
    Kind,
    decide_at_least,
    decide_at_most,
    estimate,
    times_as_many,
)
from nvfp4check.bench.coverage import GUESS, SHAPES, SOURCES, covered
from nvfp4check.report.agree_words import criterion_sentence

WriteLogits = Callable[[str, Mapping[str, torch.Tensor]], Run]

ALPHA = 0.05
TRIALS = 150

#: Four standard errors of the share of wrong verdicts above the promised one.
MOST_WRONG = ALPHA + 4 * math.sqrt(ALPHA * (1 - ALPHA) / TRIALS)

#: What makes their mean is in few samples: a limit is kept there by what was seen.
UNSEEN = ("log-normal 2.5, r 0.7", "disasters, 1 in 1,000")

BY_NAME = {source.name: source for source in SOURCES}


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvfp4check.agreement.statistics.RESAMPLES", 300)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("source", "shape"),
    [
        ("log-normal 1, r 0.3", "4 x 500"),
        ("log-normal 2.5", "3 x 20"),
        ("log-normal 2.5, r 0.7", "5 x 100"),
        ("gamma 0.2", "5 x 100"),
        ("Pareto 2", "20 x 100"),
        ("Pareto 2, r 0.7", "20 x 100"),
        ("neighbours correlate", "20 x 100"),
        ("disasters, 1 in 1,000", "3 x 20"),
        ("disasters, 1 in 1,000", "20 x 100"),
        ("top-1 of 97 %, r 0.1", "20 x 100"),
    ],
)
def test_a_verdict_is_wrong_no_more_often_than_alpha(source: str, shape: str) -> None:
    found = covered(BY_NAME[source], shape, TRIALS)

    assert found.wary_wrong <= MOST_WRONG
    assert found.wrong_fail <= MOST_WRONG
    if source not in UNSEEN:
        assert found.wrong_pass <= MOST_WRONG


@pytest.mark.parametrize(
    ("source", "shape"),
    [
        ("log-normal 2.5", "3 x 20"),
        ("Pareto 2, r 0.7", "20 x 100"),
        ("disasters, 1 in 1,000", "3 x 20"),
    ],
)
def test_a_t_interval_would_be_wrong_more_often(source: str, shape: str) -> None:
    random, draw = np.random.default_rng(0), BY_NAME[source].draw
    wrong = 0
    for _ in range(TRIALS):
        prompts = [draw(random, length) for length in SHAPES[shape]]
        found = estimate(prompts, 0, by_prompt=False)
        wrong += found.upper_bound(ALPHA) < BY_NAME[source].true

    assert wrong / TRIALS > MOST_WRONG


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("source", ["log-normal 1", "gamma 0.2", "Pareto 3", "log-normal 1, r 0.1"])
def test_twenty_prompts_of_a_light_tail_pass_a_generous_limit(source: str) -> None:
    found = covered(BY_NAME[source], "20 x 100", 60)

    assert found.right_pass >= 0.9


def _kl(count: int, length: int, seed: int) -> list[torch.Tensor]:
    random = np.random.default_rng(seed)
    return [BY_NAME["log-normal 1"].draw(random, length) for _ in range(count)]


def test_what_is_too_rare_to_be_seen_forbids_a_pass_of_few_positions() -> None:
    """What happens at 1 position in 20 is missing from 60 of them with a chance of alpha."""
    found = estimate(_kl(3, 20, 0), 0, Kind.POSITIVE, by_prompt=True)
    rare = 1 - ALPHA ** (1 / 60)

    assert found.ceiling(ALPHA, GUESS) > rare * GUESS
    assert found.upper_bound(ALPHA) < 0.25 < found.ceiling(ALPHA, GUESS)
    assert decide_at_most(found, 0.25, ALPHA) is Decision.PASS
    assert decide_at_most(found, 0.25, ALPHA, GUESS) is Decision.UNDECIDED


def test_more_positions_leave_less_room_for_what_is_rare() -> None:
    few, many = (
        estimate(_kl(count, 100, 1), 0, Kind.POSITIVE, by_prompt=True) for count in (20, 200)
    )
    allowances = [each.ceiling(ALPHA, GUESS) - each.upper_bound(ALPHA) for each in (few, many)]

    assert 0 < allowances[1] < allowances[0] / 5


def test_a_prompt_that_makes_up_the_mean_forbids_a_pass() -> None:
    prompts = _kl(5, 2000, 2)
    even = estimate(prompts, 0, Kind.POSITIVE, by_prompt=True)
    one = estimate([*prompts[:4], prompts[4] * 40], 0, Kind.POSITIVE, by_prompt=True)

    assert decide_at_most(even, 2.5 * even.mean, ALPHA, GUESS) is Decision.PASS
    assert decide_at_most(one, 2.5 * one.mean, ALPHA, GUESS) is Decision.UNDECIDED


@pytest.mark.parametrize("limit", [0.03, 0.025, 0.0195])
def test_as_many_prompts_like_these_as_are_said_to_decide_do(limit: float) -> None:
    prompts = _kl(20, 50, 3)
    found = estimate(prompts, 0, Kind.POSITIVE, by_prompt=True)
    assert decide_at_most(found, limit, ALPHA, GUESS) is Decision.UNDECIDED

    times = times_as_many(found, limit, ALPHA, GUESS)

    assert times is not None
    decided = {
        count: decide_at_most(
            estimate(prompts * count, 0, Kind.POSITIVE, by_prompt=True), limit, ALPHA, GUESS
        )
        for count in (math.ceil(times), math.ceil(times / 4))
    }
    assert decided.pop(math.ceil(times)) is (Decision.FAIL if found.mean > limit else Decision.PASS)
    assert set(decided.values()) <= {Decision.UNDECIDED}


def test_as_many_agreeing_positions_as_are_said_to_decide_do() -> None:
    found = estimate([torch.ones(10, dtype=torch.float64)] * 6, 0, Kind.SHARE, by_prompt=True)
    assert decide_at_least(found, 0.98, ALPHA) is Decision.UNDECIDED

    times = times_as_many(found, 0.98, ALPHA)

    assert times is not None
    count = math.ceil(6 * times)
    more = estimate([torch.ones(10, dtype=torch.float64)] * count, 0, Kind.SHARE, by_prompt=True)
    assert decide_at_least(more, 0.98, ALPHA) is Decision.PASS


def test_a_limit_at_the_mean_is_decided_by_no_number_of_prompts() -> None:
    found = estimate(_kl(4, 50, 5), 0, Kind.POSITIVE, by_prompt=True)

    assert times_as_many(found, found.mean, ALPHA, GUESS) is None


def _runs(write_logits: WriteLogits) -> tuple[Run, Run]:
    generator = torch.Generator().manual_seed(6)
    logits = {f"p{i}": torch.randn(30, 64, generator=generator) for i in range(8)}
    near = {name: x + 0.1 * torch.randn(30, 64, generator=generator) for name, x in logits.items()}
    return write_logits("a", logits), write_logits("b", near)


def test_the_sentence_says_what_is_allowed_for_and_how_many_prompts_would_decide(
    write_logits: WriteLogits,
) -> None:
    document = agree_document(
        agree(*_runs(write_logits), AgreeOptions(max_kl=0.02, rare_kl=math.log(64)))
    )
    (criterion,) = document["criteria"]
    sentence = criterion_sentence(criterion, document["alpha"])

    assert criterion["decision"] == "undecided"
    assert criterion["rare_kl"] == pytest.approx(math.log(64))
    assert criterion["bounds"][1] > 0.02
    assert criterion["prompts_needed"] > 8
    assert "too rare to be in this sample" in sentence
    assert f"some {criterion['prompts_needed']:,} prompts like these would decide" in sentence


def test_a_limit_speaks_of_positions_like_these_and_says_which_may_be_missing(
    write_logits: WriteLogits,
) -> None:
    document = agree_document(agree(*_runs(write_logits), AgreeOptions(max_kl=0.02)))
    (criterion,) = document["criteria"]

    assert criterion["decision"] == "pass"
    assert criterion["allowance"] == 0
    # 95 of 100 samples of 240 positions hold one of a kind that is as frequent as that
    assert (1 - criterion["unseen_share"]) ** 240 == pytest.approx(0.05)
    assert "rarer than 1 in 80 there may be none" in criterion_sentence(criterion, 0.05)


def test_equal_logits_keep_any_limit(write_logits: WriteLogits) -> None:
    reference, _ = _runs(write_logits)

    assert agree(reference, reference, AgreeOptions(max_kl=0.0)).verdict is Decision.PASS


@pytest.mark.usefixtures("few_resamples")
def test_a_tail_heavier_on_one_side_does_not_rank_the_other_last() -> None:
    """Both candidates have the same mean KL; one of them has it from few positions."""
    random = np.random.default_rng(0)
    heavy, light = BY_NAME["log-normal 2.5"].draw, BY_NAME["log-normal 1"].draw
    wrong = {Kind.DIFFERENCE: 0, Kind.MEAN: 0}
    for _ in range(TRIALS):
        apart = [heavy(random, 100) - light(random, 100) for _ in range(20)]
        for kind in wrong:
            low, high = estimate(apart, 0, kind, by_prompt=True).interval() or (0.0, 0.0)
            wrong[kind] += not low <= 0 <= high

    assert wrong[Kind.DIFFERENCE] / TRIALS <= MOST_WRONG
    assert wrong[Kind.MEAN] / TRIALS > MOST_WRONG
