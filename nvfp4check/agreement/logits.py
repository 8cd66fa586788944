"""How far two next-token distributions lie apart, position by position.

T positions, V vocabulary entries; a and b are the logits of reference and candidate less the
largest of their row, p and q the probabilities.

Contract:
    p         exp(a) / Z with Z = sum exp(a), in float64 whatever the stored type
    kl        sum p (a - b) + log Zb - log Za in nats, which is sum p (log p - log q); terms with
              p = 0 are 0, and one with p > 0 and q = 0 makes it infinite. Rounding is below
              1e-14: no term is larger than the spread of the logits
    jsd       (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2, at most ln 2
    top k     the k largest logits; of equal ones the lower index comes first
    delta p   q - p of the token that really follows; absent at the last position
    NaN, +inf in either side: the position is contaminated, listed and left out of every mean

Positions are read in blocks and computed a few rows at a time, small enough to stay in the cache of
a core, so memory does not grow with T.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

#: Elements of one side that are computed at one time: a few float64 copies stay in the cache.
CHUNK_ELEMENTS = 1 << 17

#: Elements of one side that are read at one time.
BLOCK_ELEMENTS = 1 << 23

#: Gives the logits of positions first to stop, [stop - first, V].
Rows = Callable[[int, int], torch.Tensor]

LOG_2 = 0.6931471805599453


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

    def rows(side: torch.Tensor) -> Rows:
        return lambda first, stop: side[first:stop]

    positions, vocabulary = reference.shape
    return compare_rows(rows(reference), rows(candidate), positions, vocabulary, tokens)


def compare_rows(
    reference: Rows,
    candidate: Rows,
    positions: int,
    vocabulary: int,
    tokens: torch.Tensor | None = None,
    block: int | None = None,
) -> PositionMetrics:
    """Compare logits that are read `block` positions at a time."""
    after = following(positions, tokens)
    block = block or max(1, BLOCK_ELEMENTS // max(1, vocabulary))
    step = max(1, CHUNK_ELEMENTS // max(1, vocabulary))
    chunks = []
    for first in range(0, positions, block):
        stop = min(first + block, positions)
        left, right = reference(first, stop), candidate(first, stop)
        for start in range(0, stop - first, step):
            end = min(start + step, stop - first)
            its_next = after[first + start : first + end]
            chunks.append(_compare_chunk(left[start:end], right[start:end], its_next))
    if not chunks:
        empty = torch.empty(0, max(1, vocabulary))
        chunks = [_compare_chunk(empty, empty, after)]
    return concatenate(chunks)


def following(positions: int, tokens: torch.Tensor | None) -> torch.Tensor:
    """Return the token after each position, -1 where there is none."""
    after = torch.full((positions,), -1, dtype=torch.int64)
    if tokens is not None and positions:
        after[:-1] = tokens[1:positions]
    return after


def concatenate(parts: list[PositionMetrics]) -> PositionMetrics:
    """Return the positions of all parts in order."""
    return PositionMetrics(
        **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(parts[0])}
    )


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of a chunk."""

    #: Logits less the largest of the row, float64 [T, V].
    logits: torch.Tensor
    #: exp of them.
    weights: torch.Tensor
    #: Sum of the weights and its logarithm, [T, 1].
    total: torch.Tensor
    log_total: torch.Tensor
    #: The ten best tokens.
    best: torch.Tensor
    broken: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor) -> "_Side":
        largest = rows.amax(-1, keepdim=True)  # NaN where the row holds one
        broken = ~largest.isfinite().squeeze(-1)
        logits = rows.double() - largest.double()
        weights = logits.exp()
        total = weights.sum(-1, keepdim=True)
        return cls(logits, weights, total, total.log(), top_k(rows, 10), broken)

    def log_probability(self, token: torch.Tensor) -> torch.Tensor:
        """Return log p of one token a row, [T]."""
        return (self.logits.gather(-1, token.unsqueeze(-1)) - self.log_total).squeeze(-1)


def _compare_chunk(
    reference: torch.Tensor, candidate: torch.Tensor, after: torch.Tensor
) -> PositionMetrics:
    left, right = _Side.of(reference), _Side.of(candidate)
    broken = left.broken | right.broken
    gap = left.logits - right.logits
    shift = (right.log_total - left.log_total).squeeze(-1)
    kl = _weighted(left, gap) + shift
    kl_reverse = -_weighted(right, gap) - shift
    same = (gap == 0).all(-1)  # the divergence from the mean would be its own rounding there
    jsd = torch.where(same, 0.0, _jensen_shannon(left, right))
    has_next = after >= 0
    index = after.clamp(min=0)
    next_p, next_q = left.log_probability(index), right.log_probability(index)

    def clean(values: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        valid = ~broken if keep is None else ~broken & keep
        return torch.where(valid, values.double(), torch.nan)

    return PositionMetrics(
        kl=clean(kl.clamp(min=0.0)),
        kl_reverse=clean(kl_reverse.clamp(min=0.0)),
        jsd=clean(jsd),
        top1=clean(left.best[:, 0] == right.best[:, 0]),
        top5_overlap=clean(overlap(left.best[:, :5], right.best[:, :5])),
        top10_overlap=clean(overlap(left.best, right.best)),
        confidence=clean(1 / left.total.squeeze(-1)),
        nll_reference=clean(-next_p, has_next),
        nll_candidate=clean(-next_q, has_next),
        delta_p=clean(next_q.exp() - next_p.exp(), has_next),
        top_token_reference=clean(left.best[:, 0]),
        top_token_candidate=clean(right.best[:, 0]),
    )


def _weighted(side: _Side, gap: torch.Tensor) -> torch.Tensor:
    """Return the mean of the gap under a side's probabilities, [T]."""
    mean = torch.einsum("tv,tv->t", side.weights, gap)
    unclear = mean.isnan()
    if unclear.any():  # 0 * inf: a token that has no probability has no term
        terms = side.weights[unclear] * gap[unclear]
        mean[unclear] = terms.masked_fill(side.weights[unclear] == 0, 0.0).sum(-1)
    return mean / side.total.squeeze(-1)


def _jensen_shannon(left: _Side, right: _Side) -> torch.Tensor:
    """Return (KL(p, m) + KL(q, m)) / 2 as the entropy of m less the mean entropy of p and q."""
    p, q = left.weights / left.total, right.weights / right.total
    twice = p + q
    # A token without probability on either side: 0 * log 0 is 0.
    of_mixture = torch.einsum("tv,tv->t", twice, twice.clamp(min=torch.finfo(p.dtype).tiny).log())
    entropies = _negative_entropy(left) + _negative_entropy(right)
    return ((entropies - of_mixture) / 2 + LOG_2).clamp(0.0, LOG_2)


def _negative_entropy(side: _Side) -> torch.Tensor:
    return _weighted(side, side.logits) - side.log_total.squeeze(-1)


def overlap(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Return which share of the reference's tokens [T, k] is among the candidate's, [T]."""
    common = (reference.unsqueeze(-1) == candidate.unsqueeze(-2)).any(-1)
    return common.double().mean(-1)


def top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Return the indices of the k largest of each row, ties by lower index, int64 [T, min(k, V)].

    torch.topk leaves the order of equal values open; bfloat16 logits have many.
    """
    width = logits.shape[-1]
    k = min(k, width)
    # One more than asked for shows whether the last place is tied.
    values, indices = logits.topk(min(k + 1, width), dim=-1)
    tied = (values[:, k - 1] == values[:, k]).nonzero().squeeze(-1) if k < width else None
    values, indices = values[:, :k], indices[:, :k]
    order = indices.argsort(dim=-1, stable=True)
    values, indices = values.gather(-1, order), indices.gather(-1, order)
    order = values.argsort(dim=-1, descending=True, stable=True)
    values, indices = values.gather(-1, order), indices.gather(-1, order)
    for row in [] if tied is None else tied.tolist():
        last = values[row, -1]
        inside = indices[row][values[row] > last]
        ties = (logits[row] == last).nonzero().squeeze(-1)[: k - len(inside)]
        indices[row] = torch.cat((inside, ties))
    return indices
