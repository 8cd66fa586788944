"""What the best few log-probabilities of two sides say about their distributions.

T positions, N tokens known of each side. C are the tokens known on both sides, R all others.

Contract:
    kl          a lower bound: tokens of R are taken together, which by the log-sum inequality never
                raises a divergence: sum over C of p log(p / q) + pR log(pR / qR)
    kl upper    there is none: a token that the candidate does not list may have any probability
                down to zero. `kl_if_bounded` takes every unlisted token's log(p / q) to be at most
                the largest of C, and is an estimate under that assumption, no bound
    jsd         a lower bound, for the same reason
    rounding    log-probabilities are float32: log p is off by 2**-24 |log p|, and p by as much
                of itself. What this can add to the sum over C is taken off the bound
    pR, qR      1 - sum over C, off by the errors of those p. The bound takes the worst of that
                interval
    top1        exact; top 5 and top 10 are exact where both sides list as many, else NaN
    nll         exact where the server gives the token that follows, or lists it; else NaN
"""

from dataclasses import dataclass

import torch

from nvfp4check.agreement.logits import LOG_2, PositionMetrics, log_totals, overlap

#: Unit roundoff of float32, in which log-probabilities are given.
ROUNDOFF = 2.0**-24


@dataclass(frozen=True, slots=True, kw_only=True)
class TopRows:
    """The best tokens of each position, by falling log-probability."""

    #: int64 [T, N]; -1 stands for no token.
    tokens: torch.Tensor
    #: float64 [T, N]; -inf where there is no token.
    logprobs: torch.Tensor
    #: Log-probability of the token that follows, float64 [T]; NaN where unknown.
    following: torch.Tensor
    #: How many of the columns are this side's best; the rest were looked up for the other side.
    ranked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TopMetrics:
    """The metrics of positions, and how far they are known."""

    #: kl, kl_reverse and jsd are lower bounds.
    metrics: PositionMetrics
    #: The divergence if no unlisted token is worse than the worst listed one, [T].
    kl_if_bounded: torch.Tensor
    #: Probability of the tokens that are not known on both sides, [T].
    tail_reference: torch.Tensor
    tail_candidate: torch.Tensor
    #: Whether so little is unknown that it may be rounding, so that kl is no mere bound, bool [T].
    exact: torch.Tensor


def look_up(logits: torch.Tensor, best: torch.Tensor, wanted: torch.Tensor) -> TopRows:
    """Return a side with full logits [T, V] as its `best` tokens [T, k] and those `wanted` [T, N].

    `wanted` may hold -1.
    """
    totals = log_totals(logits).unsqueeze(-1)
    known = wanted.clamp(min=0)
    again = (wanted.unsqueeze(-1) == best.unsqueeze(-2)).any(-1) | (wanted < 0)
    tokens = torch.cat((best, torch.where(again, -1, wanted)), dim=1)
    others = torch.where(again, -torch.inf, logits.gather(1, known).double() - totals)
    ranked = logits.gather(1, best).double() - totals
    return TopRows(
        tokens=tokens,
        logprobs=torch.cat((ranked, others), dim=1),
        following=torch.full((len(best),), torch.nan, dtype=torch.float64),
        ranked=best.shape[1],
    )


def compare_top(reference: TopRows, candidate: TopRows, after: torch.Tensor) -> TopMetrics:
    """Compare positions whose best tokens both sides list; `after` [T] is what followed."""
    same = reference.tokens.unsqueeze(-1) == candidate.tokens.unsqueeze(-2)
    same &= (reference.tokens >= 0).unsqueeze(-1)  # (T, N, M)
    in_both = same.any(-1)
    log_p = torch.where(in_both, reference.logprobs, -torch.inf)
    partner = same.int().argmax(-1)
    log_q = torch.where(in_both, candidate.logprobs.gather(1, partner), -torch.inf)
    p, q = log_p.exp(), log_q.exp()
    tails = 1 - p.sum(-1), 1 - q.sum(-1)
    slack = (_slack(p, log_p), _slack(q, log_q))
    gap = torch.where(in_both & (p > 0) & (q > 0), (log_p - log_q).abs(), 0.0)
    off = _slack(p, log_p, gap, log_q), _slack(q, log_q, gap, log_p)
    ratios = torch.where(in_both & (p > 0), log_p - log_q, 0.0)
    known = (p * ratios).sum(-1)
    reverse = torch.where(q > 0, q * -ratios, 0.0).sum(-1)
    broken = reference.logprobs[:, 0].isnan() | candidate.logprobs[:, 0].isnan()
    next_p, next_q = _next(reference, after), _next(candidate, after)
    ranks = reference.tokens[:, : reference.ranked], candidate.tokens[:, : candidate.ranked]

    def clean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(broken, torch.nan, values.double())

    def common(k: int) -> torch.Tensor:
        if min(reference.ranked, candidate.ranked) < k:
            return torch.full_like(known, torch.nan)
        return clean(overlap(ranks[0][:, :k], ranks[1][:, :k]))

    metrics = PositionMetrics(
        kl=clean((known - off[0] + _least_term(tails, slack)).clamp(min=0.0)),
        kl_reverse=clean((reverse - off[1] + _least_term(tails[::-1], slack[::-1])).clamp(min=0.0)),
        jsd=clean(_jensen_shannon(p, q, tails)),
        top1=clean(ranks[0][:, 0] == ranks[1][:, 0]),
        top5_overlap=common(5),
        top10_overlap=common(10),
        confidence=clean(reference.logprobs[:, 0].exp()),
        nll_reference=clean(-next_p),
        nll_candidate=clean(-next_q),
        delta_p=clean(next_q.exp() - next_p.exp()),
        top_token_reference=clean(ranks[0][:, 0]),
        top_token_candidate=clean(ranks[1][:, 0]),
    )
    worst = ratios.masked_fill(~in_both, -torch.inf).amax(-1).clamp(min=0.0)
    return TopMetrics(
        metrics=metrics,
        kl_if_bounded=clean(known + tails[0].clamp(min=0.0) * worst),
        tail_reference=clean(tails[0].clamp(min=0.0)),
        tail_candidate=clean(tails[1].clamp(min=0.0)),
        exact=(tails[0] <= slack[0]) & (tails[1] <= slack[1]) | broken,
    )


def _slack(
    p: torch.Tensor,
    log_p: torch.Tensor,
    gap: torch.Tensor | None = None,
    log_q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return how far a sum of p, or with `gap` of p * gap, may be off by rounding, [T]."""
    own = torch.where(p > 0, log_p.abs(), 0.0)
    if gap is None or log_q is None:
        return (p * (1 + own)).sum(-1) * ROUNDOFF
    other = torch.where((p > 0) & log_q.isfinite(), log_q.abs(), 0.0)
    return (p * (own + other + (1 + own) * gap)).sum(-1) * ROUNDOFF


def _least_term(
    tails: tuple[torch.Tensor, torch.Tensor], slack: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Return the least of x log(x / y) with x and y as near to the tails as the slack allows.

    It falls with y, and in x it has its minimum at y / e.
    """
    y = (tails[1] + slack[1]).clamp(min=torch.finfo(torch.float64).tiny)
    low, high = (tails[0] - slack[0]).clamp(min=0.0), (tails[0] + slack[0]).clamp(min=0.0)
    x = torch.minimum(torch.maximum(y / torch.e, low), high)
    return torch.where(x > 0, x * (x / y).log(), 0.0)


def _jensen_shannon(
    p: torch.Tensor, q: torch.Tensor, tails: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    p = torch.cat((p, tails[0].clamp(min=0.0).unsqueeze(-1)), dim=-1)
    q = torch.cat((q, tails[1].clamp(min=0.0).unsqueeze(-1)), dim=-1)
    m = (p + q) / 2
    terms: torch.Tensor = (
        torch.special.xlogy(p, p) + torch.special.xlogy(q, q) - 2 * torch.special.xlogy(m, m)
    )
    return (terms.sum(-1) / 2).clamp(0.0, LOG_2)


def _next(side: TopRows, after: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of the token that follows, NaN where it is not known."""
    place = (side.tokens == after.unsqueeze(-1)) & (after >= 0).unsqueeze(-1)
    listed = torch.where(place, side.logprobs, -torch.inf).amax(-1)
    listed = torch.where(place.any(-1), listed, torch.nan)
    return torch.where(side.following.isnan(), listed, side.following)
