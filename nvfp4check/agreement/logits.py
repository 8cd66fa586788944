"""How far two next-token distributions lie apart, position by position.

T positions, V vocabulary entries.

Contract:
    log p     logit - logsumexp(logits), in float64 whatever the stored type
    kl        sum p (log p - log q) in nats, p the reference; terms with p = 0 are 0, and a term
              with p > 0 and q = 0 makes it infinite
    jsd       (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2, at most ln 2
    top k     the k largest logits; of equal ones the lower index comes first
    delta p   q - p of the token that really follows; absent at the last position
    NaN, +inf in either side: the position is contaminated, listed and left out of every mean

The loop goes over positions in chunks of bounded size; a chunk holds a few float64 copies of
itself, so memory does not grow with T.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

#: Float64 elements in one chunk of one side.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionMetrics:
    """One number a position, each [T]; NaN where a position is contaminated or has no answer."""

    kl: torch.Tensor
    kl_reverse: torch.Tensor
    jsd: torch.Tensor
    #: 1.0 where both sides rank the same token first.
    top1: torch.Tensor
    #: Share of the reference's five (ten) most likely tokens among the candidate's.
    top5_overlap: torch.Tensor
    top10_overlap: torch.Tensor
    #: Probability of the reference's most likely token: its confidence.
    confidence: torch.Tensor
    #: -log p of the token that follows; NaN at a prompt's last position.
    nll_reference: torch.Tensor
    nll_candidate: torch.Tensor
    delta_p: torch.Tensor
    #: The token that each side ranks first, as float64.
    top_token_reference: torch.Tensor
    top_token_candidate: torch.Tensor

    @property
    def contaminated(self) -> torch.Tensor:
        """Positions where a side holds NaN or +inf, bool [T]."""
        return self.top1.isnan()


def compare_logits(
    reference: torch.Tensor, candidate: torch.Tensor, tokens: torch.Tensor | None = None
) -> PositionMetrics:
    """Compare logits [T, V] of the same T positions; `tokens` [T] gives what really followed.

    Raises:
        ValueError: The shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(
            f"logits of shape {tuple(reference.shape)} and {tuple(candidate.shape)}: "
            "cut padded vocabulary entries and added rows first"
        )
    positions, vocabulary = reference.shape
    following = torch.full((positions,), -1, dtype=torch.int64)
    if tokens is not None:
        following[:-1] = tokens[1:positions]
    step = max(1, CHUNK_ELEMENTS // max(1, vocabulary))
    chunks = [
        _compare_chunk(
            reference[start : start + step].double(),
            candidate[start : start + step].double(),
            following[start : start + step],
        )
        for start in range(0, positions, step)
    ]
    if not chunks:
        chunks = [_compare_chunk(reference.double(), candidate.double(), following)]
    return concatenate(chunks)


def concatenate(parts: list[PositionMetrics]) -> PositionMetrics:
    """Return the positions of all parts in order."""
    return PositionMetrics(
        **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(parts[0])}
    )


def _compare_chunk(
    reference: torch.Tensor, candidate: torch.Tensor, following: torch.Tensor
) -> PositionMetrics:
    broken = _contaminated(reference) | _contaminated(candidate)
    top_reference, top_candidate = top_k(reference, 10), top_k(candidate, 10)
    log_p, log_q = reference.log_softmax(-1), candidate.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    has_next = following >= 0
    index = following.clamp(min=0).unsqueeze(-1)
    next_p, next_q = log_p.gather(-1, index).squeeze(-1), log_q.gather(-1, index).squeeze(-1)

    def clean(values: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        valid = ~broken if keep is None else ~broken & keep
        return torch.where(valid, values.double(), torch.nan)

    return PositionMetrics(
        kl=clean(_divergence(p, log_p, log_q)),
        kl_reverse=clean(_divergence(q, log_q, log_p)),
        jsd=clean((_divergence(p, log_p, log_m) + _divergence(q, log_q, log_m)) / 2),
        top1=clean(top_reference[:, 0] == top_candidate[:, 0]),
        top5_overlap=clean(_overlap(top_reference[:, :5], top_candidate[:, :5])),
        top10_overlap=clean(_overlap(top_reference, top_candidate)),
        confidence=clean(p.amax(-1) if p.numel() else p.sum(-1)),
        nll_reference=clean(-next_p, has_next),
        nll_candidate=clean(-next_q, has_next),
        delta_p=clean(next_q.exp() - next_p.exp(), has_next),
        top_token_reference=clean(top_reference[:, 0]),
        top_token_candidate=clean(top_candidate[:, 0]),
    )


def _contaminated(logits: torch.Tensor) -> torch.Tensor:
    empty = (logits == -torch.inf).all(-1)  # no token left: softmax has no answer
    return logits.isnan().any(-1) | (logits == torch.inf).any(-1) | empty


def _divergence(p: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    terms = p * (log_p - log_q)
    return terms.masked_fill_(p == 0, 0.0).sum(-1).clamp_(min=0.0)


def _overlap(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    common = (reference.unsqueeze(-1) == candidate.unsqueeze(-2)).any(-1)
    return common.double().mean(-1)


def top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Return the indices of the k largest of each row, ties by lower index, int64 [T, min(k, V)].

    torch.topk leaves the order of equal values open; bfloat16 logits have many.
    """
    k = min(k, logits.shape[-1])
    values, indices = logits.topk(k, dim=-1)
    order = indices.argsort(dim=-1, stable=True)
    values, indices = values.gather(-1, order), indices.gather(-1, order)
    order = values.argsort(dim=-1, descending=True, stable=True)
    values, indices = values.gather(-1, order), indices.gather(-1, order)
    last = values[:, -1:] if k else values
    for row in _rows_with_a_tie_at_the_end(logits, last, k):
        inside = indices[row][values[row] > last[row]]
        ties = (logits[row] == last[row]).nonzero().squeeze(-1)[: k - len(inside)]
        indices[row] = torch.cat((inside, ties))
    return indices


def _rows_with_a_tie_at_the_end(logits: torch.Tensor, last: torch.Tensor, k: int) -> Iterator[int]:
    if k == 0 or k == logits.shape[-1]:
        return
    yield from ((logits >= last).sum(-1) > k).nonzero().squeeze(-1).tolist()
