"""The logits of two runs compared, in whatever form each of them has them."""

from dataclasses import dataclass, field, replace

import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.integrity import Problem, rows_message
from nvfp4check.agreement.logits import (
    PositionMetrics,
    compare_rows,
    concatenate,
    following,
    log_totals,
    top_k,
)
from nvfp4check.agreement.shifted import shifted_choices
from nvfp4check.agreement.sources import Full, Logits, Source, Top, opened_logits
from nvfp4check.agreement.topk import TopMetrics, TopRows, compare_top, look_up

#: How many tokens of full logits stand beside those that a server lists.
RANKED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What a list of the best tokens leaves open, the mean of all positions."""

    #: Probability of the tokens that are not known on both sides.
    reference: float
    candidate: float
    #: Mean KL if no unlisted token is worse than the worst listed one.
    kl_if_bounded: float
    #: Whether nothing is left open, so that KL is known and not only bounded from below.
    exact: bool


@dataclass
class Positions:
    """The metrics of every position."""

    metrics: dict[str, PositionMetrics] = field(default_factory=dict)
    #: None where full logits were compared.
    tail: Tail | None = None
    vocabulary: int | None = None


def compare_positions(
    reference: Run,
    candidate: Run,
    prompts: tuple[str, ...],
    head: str | None = None,
    problems: list[Problem] | None = None,
) -> Positions | None:
    """Compare the logits of each prompt; None where those of none can be compared.

    `problems` hears of what was not as it should be.
    """
    found = Positions()
    heard = problems if problems is not None else []
    tops: list[TopMetrics] = []
    with opened_logits(reference, head) as left, opened_logits(candidate, head) as right:
        if not left.there or not right.there:
            return None
        for prompt in (prompt for prompt in prompts if left.tokens(prompt)):
            sources = _sources(left, right, prompt, heard)
            if sources is None:
                continue
            tokens = reference.tokens(prompt)
            one, other = sources
            if isinstance(one, Full) and isinstance(other, Full):
                found.vocabulary = min(one.vocabulary, other.vocabulary)
                found.metrics[prompt] = _full(one, other, tokens, prompt, heard)
            else:
                top = _top(one, other, tokens)
                tops.append(top)
                found.metrics[prompt] = top.metrics
    if tops:
        found.tail = _tail(tops)
    heard.extend(
        shifted_choices(
            {
                prompt: (metrics.top_token_reference, metrics.top_token_candidate)
                for prompt, metrics in found.metrics.items()
            }
        )
    )
    return found if found.metrics else None


def _sources(
    left: Logits, right: Logits, prompt: str, problems: list[Problem]
) -> tuple[Source, Source] | None:
    sources: list[Source] = []
    for name, logits in (("reference", left), ("candidate", right)):
        if not logits.has(prompt):
            problems.append(
                Problem(
                    kind="missing",
                    run=name,
                    prompt=prompt,
                    message=f"logits of prompt {prompt!r} were not recorded",
                    fatal=False,
                )
            )
            return None
        source = logits.of(prompt)
        tokens = logits.tokens(prompt)
        if source.positions != tokens:
            problems.append(
                Problem(
                    kind="rows",
                    run=name,
                    prompt=prompt,
                    message=f"logits of prompt {prompt!r}: "
                    f"{rows_message(source.positions, tokens)}",
                )
            )
            return None
        sources.append(source)
    return sources[0], sources[1]


def _full(
    left: Full, right: Full, tokens: torch.Tensor, prompt: str, problems: list[Problem]
) -> PositionMetrics:
    vocabulary = min(left.vocabulary, right.vocabulary)
    sides = {"reference": _Cut(left, vocabulary), "candidate": _Cut(right, vocabulary)}
    metrics = compare_rows(
        sides["reference"].rows,
        sides["candidate"].rows,
        left.positions,
        vocabulary,
        tokens,
        block=max(left.block, right.block),
    )
    known = {(problem.kind, problem.run) for problem in problems if not problem.fatal}
    broken = metrics.contaminated.nonzero().flatten().tolist()
    for name, side in sides.items():
        found = [side.cut_off(), side.narrow(), side.nonfinite(prompt, broken)]
        for kind, message, fatal in (one for one in found if one is not None):
            if fatal or kind == "nonfinite" or (kind, name) not in known:
                problems.append(
                    Problem(kind=kind, run=name, prompt=prompt, message=message, fatal=fatal)
                )
    return metrics


class _Cut:
    """The logits of a side as far as both have entries, and what was seen of them."""

    def __init__(self, source: Full, vocabulary: int) -> None:
        self._source = source
        self._vocabulary = vocabulary
        #: Probability of the entries that are cut off, and where the best token is among them.
        self._lost: list[torch.Tensor] = []
        self._best: list[torch.Tensor] = []
        self._dtype = torch.float32

    def rows(self, first: int, stop: int) -> torch.Tensor:
        """Return rows, cut."""
        whole = self._source.rows(first, stop)
        self._dtype = whole.dtype
        kept, rest = whole[:, : self._vocabulary], whole[:, self._vocabulary :]
        if rest.shape[1]:
            self._lost.append((log_totals(rest) - log_totals(whole)).exp())
            self._best.append(rest.amax(1) > kept.amax(1))
        return kept

    def cut_off(self) -> tuple[str, str, bool] | None:
        """Say what was cut off: padding, unless a best token is among it."""
        if not self._lost:
            return None
        size = f"logits of {self._source.vocabulary} entries where the other run has "
        best, lost = int(torch.cat(self._best).sum()), torch.cat(self._lost)
        if best:
            message = (
                f"{size}{self._vocabulary}, and the best token of {best} of {len(lost)} positions "
                "is none of these: another vocabulary, and no padding"
            )
            return "vocabulary", message, True
        share = float(lost.nanmean())
        message = f"{size}{self._vocabulary}: padding, cut off, with {share:.2g} of the probability"
        return "vocabulary", message, False

    def narrow(self) -> tuple[str, str, bool] | None:
        """Say that logits were rounded to few bits when they were stored."""
        if self._dtype.itemsize >= torch.float32.itemsize:
            return None
        kind, unit = str(self._dtype).removeprefix("torch."), torch.finfo(self._dtype).eps / 2
        message = (
            f"logits are stored as {kind}, each rounded by up to {unit:.2g} of itself: what that "
            "changes counts as a difference"
        )
        return "rounded", message, False

    def nonfinite(self, prompt: str, broken: list[int]) -> tuple[str, str, bool] | None:
        """Say where the first NaN or infinity is, among positions where either side has one."""
        for position in broken:
            row = self._source.rows(position, position + 1)[0, : self._vocabulary]
            bad = row.isnan() | row.isposinf()
            if not bad.any() and not row.isneginf().all():
                continue
            what = "nothing above -inf"
            if bad.any():
                token = int(bad.nonzero()[0])
                what = f"{float(row[token])} for token {token}"
            message = f"logits of prompt {prompt!r}, position {position}, hold {what}"
            more = f": the first of {len(broken)} such positions of the prompt, of either run"
            return "nonfinite", f"{message}{more if len(broken) > 1 else ''}", False
        return None


def _top(left: Source, right: Source, tokens: torch.Tensor) -> TopMetrics:
    """Compare where a side has only its best tokens."""
    after = following(left.positions, tokens)
    blocks = [source.block for source in (left, right) if isinstance(source, Full)]
    step = max(blocks, default=max(1, left.positions))
    parts = []
    for first in range(0, left.positions, step):
        stop = min(first + step, left.positions)
        here = after[first:stop]
        parts.append(
            compare_top(
                _rows(left, right, first, stop, here), _rows(right, left, first, stop, here), here
            )
        )
    joined = _joined(parts)
    if _whole(left, right) or _whole(right, left):
        return replace(joined, exact=torch.ones_like(joined.exact))
    return joined


def _whole(full: Source, top: Source) -> bool:
    """Tell whether a list of best tokens names every token that the other side has."""
    if not isinstance(full, Full) or not isinstance(top, Top):
        return False
    return bool(((top.rows.tokens >= 0).sum(-1) >= full.vocabulary).all())


def _rows(side: Source, other: Source, first: int, stop: int, after: torch.Tensor) -> TopRows:
    """Return the positions of a side; one with full logits looks up the other's tokens."""
    if isinstance(side, Top):
        return _cut(side.rows, first, stop)
    logits = side.rows(first, stop)
    wanted = after.unsqueeze(-1)
    if isinstance(other, Top):
        wanted = torch.cat((_cut(other.rows, first, stop).tokens, wanted), dim=1)
        # A token is looked up once: what stands to its left already is not wanted again.
        earlier = torch.tril(wanted.unsqueeze(-1) == wanted.unsqueeze(-2), diagonal=-1)
        wanted = torch.where(earlier.any(-1), -1, wanted)
    wanted = torch.where(wanted < logits.shape[1], wanted, -1)
    return look_up(logits, top_k(logits, RANKED), wanted)


def _cut(rows: TopRows, first: int, stop: int) -> TopRows:
    return TopRows(
        tokens=rows.tokens[first:stop],
        logprobs=rows.logprobs[first:stop],
        following=rows.following[first:stop],
        ranked=rows.ranked,
    )


def _joined(parts: list[TopMetrics]) -> TopMetrics:
    return TopMetrics(
        metrics=concatenate([part.metrics for part in parts]),
        kl_if_bounded=torch.cat([part.kl_if_bounded for part in parts]),
        tail_reference=torch.cat([part.tail_reference for part in parts]),
        tail_candidate=torch.cat([part.tail_candidate for part in parts]),
        exact=torch.cat([part.exact for part in parts]),
    )


def _tail(tops: list[TopMetrics]) -> Tail:
    def mean(name: str) -> float:
        values = torch.cat([getattr(top, name) for top in tops])
        return float(values[~values.isnan()].mean())

    return Tail(
        reference=mean("tail_reference"),
        candidate=mean("tail_candidate"),
        kl_if_bounded=mean("kl_if_bounded"),
        exact=all(bool(top.exact.all()) for top in tops),
    )
