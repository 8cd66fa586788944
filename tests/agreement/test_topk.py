"""What lists of best tokens allow to say: bounds that hold, and numbers that are exact."""

import pytest
import torch

from nvfp4check.agreement.logits import compare_logits, following, top_k
from nvfp4check.agreement.topk import TopMetrics, TopRows, compare_top, look_up

VOCABULARY = 50


def pair(seed: int, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(40, VOCABULARY, generator=generator, dtype=torch.float64) * 3
    other = torch.randn(40, VOCABULARY, generator=generator, dtype=torch.float64) * spread
    return reference, reference + other


def listed(logits: torch.Tensor, count: int) -> TopRows:
    """The best tokens as a server gives them: log-probabilities in float32."""
    tokens = top_k(logits, count)
    logprobs = logits.log_softmax(-1).gather(1, tokens).float().double()
    unknown = torch.full((len(logits),), torch.nan, dtype=torch.float64)
    return TopRows(tokens=tokens, logprobs=logprobs, following=unknown, ranked=count)


def compared(count: int, seed: int, spread: float = 0.3) -> TopMetrics:
    reference, candidate = pair(seed, spread)
    after = following(40, torch.arange(40) % VOCABULARY)
    return compare_top(listed(reference, count), listed(candidate, count), after)


@pytest.mark.parametrize("count", [1, 2, 5, 20, 49])
@pytest.mark.parametrize("spread", [1e-7, 0.01, 0.3, 5.0])
def test_the_bounds_never_exceed_the_truth(count: int, spread: float) -> None:
    for seed in range(5):
        found = compared(count, seed, spread)
        truth = compare_logits(*pair(seed, spread))
        for name in ("kl", "kl_reverse"):
            bound, true = getattr(found.metrics, name), getattr(truth, name)
            assert (bound <= true + 2**-52).all()
        # Float32 log-probabilities move JSD by their own rounding.
        assert (found.metrics.jsd <= truth.jsd + 2**-21).all()


def test_the_bound_grows_with_what_is_known_and_ends_at_the_truth() -> None:
    truth = compare_logits(*pair(1))
    means = [float(compared(count, 1).metrics.kl.mean()) for count in (1, 5, 20, VOCABULARY)]

    assert means == sorted(means)
    assert means[0] > 0
    assert means[-1] == pytest.approx(float(truth.kl.mean()), rel=2e-5)  # less the rounding
    assert compared(VOCABULARY, 1).exact.all()
    assert not compared(20, 1).exact.any()


@pytest.mark.parametrize("name", ["top1", "top5_overlap", "top10_overlap", "confidence"])
def test_ranks_and_confidence_are_exact(name: str) -> None:
    found, truth = compared(20, 2).metrics, compare_logits(*pair(2))

    assert (getattr(found, name) - getattr(truth, name)).abs().max() < 2**-22


def test_an_overlap_of_more_tokens_than_are_listed_is_not_claimed() -> None:
    found = compared(5, 3).metrics

    assert not found.top5_overlap.isnan().any()
    assert found.top10_overlap.isnan().all()


def test_a_following_token_that_is_not_listed_is_not_guessed() -> None:
    found, truth = compared(5, 4).metrics, compare_logits(*pair(4), torch.arange(40) % VOCABULARY)

    known = ~found.nll_reference.isnan()
    assert 0 < int(known.sum()) < 39
    assert (found.nll_reference - truth.nll_reference)[known].abs().max() < 2**-20


def test_full_logits_look_up_what_the_other_side_lists() -> None:
    reference, candidate = pair(5)
    best = listed(candidate, 20)
    full = look_up(reference, top_k(reference, 5), best.tokens)

    found = compare_top(full, best, following(40, None))

    # All 20 of the candidate's tokens are known on both sides, though the reference ranked but 5.
    p = reference.softmax(-1).gather(1, best.tokens).sum(-1)
    assert (found.tail_reference - (1 - p)).abs().max() < 2**-40
    assert (found.metrics.kl <= compare_logits(reference, candidate).kl + 2**-52).all()


def test_a_list_without_a_token_counts_for_nothing() -> None:
    reference, candidate = pair(6)
    rows = listed(candidate, 3)
    tokens, logprobs = rows.tokens.clone(), rows.logprobs.clone()
    tokens[:, 2], logprobs[:, 2] = -1, -torch.inf
    short = TopRows(tokens=tokens, logprobs=logprobs, following=rows.following, ranked=3)

    found = compare_top(listed(reference, 3), short, following(40, None))

    assert found.metrics.kl.isfinite().all()
    assert (found.metrics.kl <= compare_logits(reference, candidate).kl + 2**-52).all()
