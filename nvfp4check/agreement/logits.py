"""How far two next-token distributions lie apart, position by position.

T positions, V vocabulary entries; a and b are the logits of reference and candidate less the
largest of their row, p and q the probabilities.

Contract:
    p         exp(a) / Z with Z = sum exp(a), in float64 whatever the stored type
    kl        sum p (log p - log q) in nats; terms with p = 0 are 0, and one with p > 0 and a
              candidate's logit of -inf makes it infinite
    jsd       (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2, at most ln 2
    rounding  `nvfp4check.agreement.rows` says how far these may be off: a divergence of 1e-20 is
              still known to some digits
    top k     the k largest logits; of equal ones the lower index comes first
    delta p   q - p of the token that really follows; absent at the last position
    NaN, +inf in either side, or nothing above -inf: the position is contaminated, listed and left
              out of every mean

Positions are read in blocks, and a block's rows are shared out among threads, so memory does not
grow with T.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import torch

from nvfp4check.agreement import rows as columns
from nvfp4check.agreement.rows import NUMBERS, compare_pairs, survey_rows
from nvfp4check.findings import CheckError

#: Elements of one side that are brought into the form the compiled code takes at one time.
CHUNK_ELEMENTS = 1 << 20

#: Elements of one side that are read at one time.
BLOCK_ELEMENTS = 1 << 23

#: Tokens whose order is compared.
RANKS = 10

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
    """Compare logits that are read `block` positions at a time.

    Raises:
        CheckError: A token is none of the vocabulary.
    """
    after = following(positions, tokens)
    outside = after[(after < -1) | (after >= vocabulary)]
    if outside.numel():
        raise CheckError(
            f"token {int(outside[0])} is none of the {vocabulary:,} that the logits are over; the "
            "tokens of the run are not those of its model"
        )
    block = block or max(1, BLOCK_ELEMENTS // max(1, vocabulary))
    numbers = torch.full((positions, NUMBERS), torch.nan, dtype=torch.float64)
    best = torch.zeros(2, positions, min(RANKS, vocabulary), dtype=torch.int64)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, positions, block):
            stop = min(first + block, positions)
            left, right = reference(first, stop), candidate(first, stop)
            work = [
                pool.submit(
                    _compare,
                    left[part],
                    right[part],
                    after[first:stop][part],
                    numbers[first:stop][part],
                    best[:, first:stop][:, part],
                )
                for part in _shares(stop - first, threads)
            ]
            for done in work:
                done.result()
    return _metrics(numbers, best, after)


def _shares(rows: int, threads: int) -> Iterator[slice]:
    """Share rows out evenly."""
    for share in range(threads):
        first, stop = (rows * edge // threads for edge in (share, share + 1))
        if stop > first:
            yield slice(first, stop)


def _compare(
    reference: torch.Tensor,
    candidate: torch.Tensor,
    after: torch.Tensor,
    numbers: torch.Tensor,
    best: torch.Tensor,
) -> None:
    """Compare some rows, a few at a time, and write what is found."""
    dtype = torch.promote_types(_wide(reference), _wide(candidate))
    for part in _pieces(reference):
        left, right = (side[part].to(dtype).contiguous() for side in (reference, candidate))
        compare_pairs(
            left.numpy(),
            right.numpy(),
            after[part].numpy(),
            numbers[part].numpy(),
            best[0, part].numpy(),
            best[1, part].numpy(),
        )


def _wide(logits: torch.Tensor) -> torch.dtype:
    """Return the type that logits are computed with: float32 holds every value of a smaller one."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _pieces(logits: torch.Tensor) -> Iterator[slice]:
    """Cut rows into pieces."""
    step = max(1, CHUNK_ELEMENTS // max(1, logits.shape[1]))
    for first in range(0, len(logits), step):
        yield slice(first, min(first + step, len(logits)))


def _metrics(numbers: torch.Tensor, best: torch.Tensor, after: torch.Tensor) -> PositionMetrics:
    """Return the metrics of what the compiled code wrote."""
    left, right = best
    broken = numbers[:, columns.KL].isnan()
    nll_reference = numbers[:, columns.NLL_REFERENCE]
    nll_candidate = numbers[:, columns.NLL_CANDIDATE]

    def clean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(broken, torch.nan, values.double())

    return PositionMetrics(
        kl=numbers[:, columns.KL],
        kl_reverse=numbers[:, columns.KL_REVERSE],
        jsd=numbers[:, columns.JSD],
        top1=clean(left[:, 0] == right[:, 0]),
        top5_overlap=clean(overlap(left[:, :5], right[:, :5])),
        top10_overlap=clean(overlap(left, right)),
        confidence=numbers[:, columns.CONFIDENCE],
        nll_reference=nll_reference,
        nll_candidate=nll_candidate,
        delta_p=(-nll_candidate).exp() - (-nll_reference).exp(),
        top_token_reference=clean(left[:, 0]),
        top_token_candidate=clean(right[:, 0]),
    )


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


def overlap(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Return which share of the reference's tokens [T, k] is among the candidate's, [T]."""
    common = (reference.unsqueeze(-1) == candidate.unsqueeze(-2)).any(-1)
    return common.double().mean(-1)


def top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Return the indices of the k largest of each row, ties by lower index, int64 [T, min(k, V)].

    torch.topk leaves the order of equal values open; bfloat16 logits have many.
    """
    return _survey(logits, k)[1]


def log_totals(logits: torch.Tensor) -> torch.Tensor:
    """Return log sum exp of each row, float64 [T]; NaN where log p would be."""
    return _survey(logits, 1)[0]


def _survey(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    best = torch.zeros(len(logits), min(k, logits.shape[1]), dtype=torch.int64)
    totals = torch.empty(len(logits), dtype=torch.float64)
    for part in _pieces(logits):
        wide = logits[part].to(_wide(logits)).contiguous()
        survey_rows(wide.numpy(), totals[part].numpy(), best[part].numpy())
    return totals, best
