"""Agreement as an assertion, for the tests of an engine."""

from pathlib import Path

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import AgreeOptions, AgreeResult, agree
from nvfp4check.agreement.criteria import BOUNDS_CRITERION
from nvfp4check.agreement.divergence import NOTHING
from nvfp4check.agreement.statistics import Decision


def assert_agrees(
    run: Run | str | Path,
    golden: Run | str | Path,
    *,
    noise: Run | str | Path | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    rare_kl: float = 0.0,
    bounds: str | None = None,
    allow_skips: bool = False,
) -> AgreeResult:
    """Assert that a run agrees with a golden.

    With limits the logits are judged, with a noise run or bounds in the golden the layers, with
    none of them every bit. A limit on KL speaks of positions like these, unless `rare_kl` says how
    bad others may be that are too rare to be among them. `bounds` names one of several that the
    golden has. What the golden holds and the run lacks fails too, unless `allow_skips`.

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
            noise=(_opened(noise),) if noise is not None else (),
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
    lines = [f"{result.candidate.path} against {result.reference.path}: {result.verdict.value}"]
    for criterion in result.criteria:
        line = f"  {criterion.what}: {criterion.decision.value}"
        if criterion.found is not None and criterion.limit is not None:
            line += f", found {criterion.found:.6g}, limit {criterion.limit:.6g}"
        lines.append(line)
    divergence = result.divergence
    if divergence is not None:
        lines.append(
            f"  they part at layer {divergence.layer}, {divergence.point}, prompt "
            f"{divergence.place.prompt!r}, token {divergence.place.token}, held against "
            f"{divergence.held_against}"
        )
        lines += [
            f"  its relative error there is {point.agreement.relative_error:.3g}"
            + (f", the floor {point.floor:.3g}" if point.floor is not None else "")
            + (
                f"; {point.bound.exceeding} of {point.bound.tokens} tokens lie beyond their bound, "
                f"by up to {point.bound.ratio:.3g} times"
                if point.bound is not None and point.bound.exceeding
                else ""
            )
            for point in result.layers
            if point.agreement.key == (divergence.layer, divergence.point)
        ]
    if not result.criteria:
        lines.append("  nothing was judged, and the runs are not equal: give max_kl or noise")
    if any(criterion.what == BOUNDS_CRITERION for criterion in result.criteria):
        open_ = sum(point.held_against == NOTHING for point in result.layers)
        if open_:
            lines.append(
                f"  {open_} of {len(result.layers)} points have no bound, for their inputs are not "
                "the golden's: give capture(inputs=golden), or noise"
            )
    problems = [p for p in result.problems if p.fatal or (with_skips and p.kind == "missing")]
    lines += [f"  {problem.run}: {problem.message}" for problem in problems]
    return "\n".join(lines)


def _opened(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else Run.open(run)
