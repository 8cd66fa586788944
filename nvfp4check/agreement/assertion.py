"""Agreement as an assertion, for the tests of an engine."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import AgreeOptions, AgreeResult, agree
from nvfp4check.agreement.criteria import BOUNDS_CRITERION, Criterion
from nvfp4check.agreement.divergence import NOTHING, HeldPoint
from nvfp4check.agreement.problems import Problem
from nvfp4check.agreement.statistics import Decision

#: Problems of one kind that are told in full.
_TOLD = 3


def assert_agrees(
    run: Run | str | Path,
    golden: Run | str | Path,
    *,
    noise: Run | str | Path | Sequence[Run | str | Path] | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    rare_kl: float = 0.0,
    bounds: str | None = None,
    allow_skips: bool = False,
) -> AgreeResult:
    """Assert that a run agrees with a golden.

    With limits the logits are judged, with noise runs the layers and the logits, with bounds in the
    golden the layers, with none of them every bit. A limit on KL speaks of positions like these,
    unless `rare_kl` says how bad others may be that are too rare to be among them. `bounds` names
    one of several that the golden has. What the golden holds and the run lacks fails too, unless
    `allow_skips`.

    Raises:
        AssertionError: It does not agree, or too few positions were given to tell; the message says
            where the runs part.
        CheckError: They cannot be compared.
    """
    __tracebackhide__ = True
    result = agree(
        _opened(golden),
        _opened(run),
        AgreeOptions(
            noise=tuple(map(_opened, _several(noise))),
            max_kl=max_kl,
            min_top1=min_top1,
            rare_kl=rare_kl,
            bounds=bounds,
        ),
    )
    skipped = () if allow_skips else result.skipped
    if result.verdict is not Decision.PASS or skipped:
        raise AssertionError(explanation(result, with_skips=bool(skipped)))
    return result


def explanation(result: AgreeResult, *, with_skips: bool = False) -> str:
    """Say in a few lines why a result is no pass."""
    return "\n  ".join(_lines(result, with_skips=with_skips))


def _lines(result: AgreeResult, *, with_skips: bool) -> Iterator[str]:
    passes = result.verdict is Decision.PASS
    what = "not all of it was recorded" if with_skips and passes else result.verdict.value
    yield f"{result.candidate.path} against {result.reference.path}: {what}"
    yield from map(_criterion, result.criteria)
    if not result.criteria:
        yield "nothing was judged, and the runs are not equal: give max_kl or noise"
    limited = result.options.limited  # a candidate of fewer bits parts from the start
    if result.divergence is not None and not limited:
        yield from _divergence(result)
    if result.logits is not None and not limited and not passes:
        yield (
            f"logits: mean KL {result.logits.kl.mean:.3g}, top-1 agreement "
            f"{result.logits.top1.mean:.2%} over {result.logits.positions:,} positions"
        )
    if any(criterion.what == BOUNDS_CRITERION for criterion in result.criteria):
        open_ = sum(point.held_against == NOTHING for point in result.layers)
        if open_:
            yield (
                f"{open_} of {len(result.layers)} points have no bound, for their inputs are not "
                "the golden's: give capture(inputs=golden), or noise"
            )
    yield from _problems(
        [p for p in result.problems if p.fatal or (with_skips and p.kind == "missing")]
    )
    if with_skips:
        yield "give allow_skips=True where that is meant"


def _criterion(criterion: Criterion) -> str:
    text = f"{criterion.what}: {criterion.decision.value}"
    if criterion.found is None or criterion.limit is None:
        return text
    text += f", found {criterion.found:.6g}, limit {criterion.limit:.6g}"
    if criterion.decision is not Decision.UNDECIDED:
        return text
    if criterion.bounds is None:
        return f"{text}; too few positions to tell"
    low, high = criterion.bounds
    return f"{text}; these positions tell no more than {low:.3g} to {high:.3g}"


def _divergence(result: AgreeResult) -> Iterator[str]:
    found = result.divergence
    if found is None:
        return
    held = f", held against the {found.held_against}" if found.held_against != NOTHING else ""
    yield (
        f"they part at layer {found.layer}, {found.point}, prompt {found.place.prompt!r}, token "
        f"{found.place.token}{held}"
    )
    for point in result.layers:
        if point.agreement.key == (found.layer, found.point):
            yield _extent(point)


def _extent(point: HeldPoint) -> str:
    agreement, bound, alone = point.agreement, point.bound, point.outlier
    text = f"its relative error there is {agreement.relative_error:.3g}"
    if agreement.worst is not None:
        text += (
            f", at worst {agreement.worst_error:.3g} at prompt {agreement.worst.prompt!r}, token "
            f"{agreement.worst.token}"
        )
    if point.floor is not None:
        text += f", the floor {point.floor:.3g}"
    if bound is not None and bound.exceeding:
        text += (
            f"; {bound.exceeding} of {bound.tokens} tokens lie beyond their bound, by up to "
            f"{bound.ratio:.3g} times"
        )
    elif alone is not None:
        text += f"; {alone.tokens} tokens lie farther off than noise takes any ({alone.noise:.3g})"
    if agreement.nonfinite_candidate:
        text += f"; {agreement.nonfinite_candidate} values are NaN or infinite"
    return text


def _problems(problems: Sequence[Problem]) -> Iterator[str]:
    """Tell some problems of each kind, and how many more there are."""
    by_kind: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        by_kind.setdefault((problem.run, problem.kind), []).append(problem)
    for (run, kind), found in by_kind.items():
        yield from (f"{run}: {problem.message}" for problem in found[:_TOLD])
        if len(found) > _TOLD:
            yield f"{run}: … and {len(found) - _TOLD} more ({kind})"


def _several(
    given: Run | str | Path | Sequence[Run | str | Path] | None,
) -> Sequence[Run | str | Path]:
    if given is None:
        return ()
    return (given,) if isinstance(given, Run | str | Path) else given


def _opened(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else Run.open(run)
