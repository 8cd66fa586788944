import math

import numpy as np
import pytest
import torch

from nvfp4check.agreement.logits import compare_logits, top_k
from nvfp4check.findings import CheckError


def _numpy_kl(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        shifted = x.astype(np.longdouble) - x.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(reference), log_softmax(candidate)
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(-1), dtype=np.float64)


def test_the_divergence_is_that_of_plain_numpy_in_long_double() -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(50, 300, generator=generator) * 5
    candidate = reference + torch.randn(50, 300, generator=generator) * 0.1

    found = compare_logits(reference, candidate)

    expected = torch.from_numpy(_numpy_kl(reference.numpy(), candidate.numpy()))
    assert (found.kl - expected).abs().max() <= 300 * 2.0**-52  # 300 terms, each below one


@pytest.mark.parametrize("token", [300, 2**40, -2])
def test_a_token_outside_the_vocabulary_is_refused_before_memory_is_read(token: int) -> None:
    logits = torch.zeros(3, 300)
    with pytest.raises(CheckError, match=f"token {token} is none of the 300"):
        compare_logits(logits, logits, torch.tensor([0, token, 5]))


def test_a_run_agrees_with_itself_exactly() -> None:
    logits = torch.randn(20, 100, generator=torch.Generator().manual_seed(2))

    found = compare_logits(logits, logits.clone(), torch.arange(20))

    assert found.kl.count_nonzero() == found.jsd.count_nonzero() == 0
    assert found.top1.min() == found.top10_overlap.min() == 1
    assert found.delta_p[:-1].count_nonzero() == 0
    assert found.delta_p[-1].isnan()


def test_a_huge_logit_does_not_overflow() -> None:
    reference = torch.tensor([[3e4, 0.0]])
    candidate = torch.tensor([[0.0, 0.0]])

    assert compare_logits(reference, candidate).kl.item() == pytest.approx(math.log(2), rel=2**-50)


def test_the_jensen_shannon_divergence_of_disjoint_distributions_is_ln_2() -> None:
    reference = torch.tensor([[0.0, -torch.inf]])
    candidate = torch.tensor([[-torch.inf, 0.0]])

    found = compare_logits(reference, candidate)

    assert found.kl.item() == math.inf
    assert found.jsd.item() == pytest.approx(math.log(2), rel=2**-50)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_contaminated_position_is_marked_and_the_others_are_not(poison: float) -> None:
    reference = torch.zeros(3, 4)
    candidate = reference.clone()
    candidate[1, 2] = poison

    found = compare_logits(reference, candidate)

    assert found.contaminated.tolist() == [False, True, False]
    assert found.kl.isnan().tolist() == [False, True, False]


def test_of_equal_logits_the_lower_index_comes_first() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0]])

    assert top_k(logits, 2).tolist() == [[1, 2], [0, 1]]
    assert top_k(logits, 4).tolist() == [[1, 2, 3, 0], [0, 1, 2, 3]]


def test_top_k_is_the_stable_sort_on_tie_rich_data() -> None:
    logits = torch.randint(0, 6, (200, 40), generator=torch.Generator().manual_seed(3)).float()

    expected = logits.argsort(dim=-1, descending=True, stable=True)[:, :10]

    assert torch.equal(top_k(logits, 10), expected)


def test_the_chunk_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    reference, candidate = torch.randn(2, 17, 33, generator=generator)
    whole = compare_logits(reference, candidate, torch.arange(17))

    monkeypatch.setattr("nvfp4check.agreement.logits.CHUNK_ELEMENTS", 40)
    pieces = compare_logits(reference, candidate, torch.arange(17))

    assert torch.equal(whole.kl, pieces.kl)
    assert torch.equal(whole.nll_candidate[:-1], pieces.nll_candidate[:-1])


def test_the_next_token_is_the_one_after_the_position() -> None:
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]))

    found = compare_logits(logits, logits.flip(-1), torch.tensor([0, 1, 0]))

    assert found.delta_p[:2].tolist() == pytest.approx([0.8, 0.6], rel=2**-20)  # float32 logits


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="padded vocabulary"):
        compare_logits(torch.zeros(2, 4), torch.zeros(2, 5))
