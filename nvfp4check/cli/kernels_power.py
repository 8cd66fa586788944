"""`nvfp4check kernels power`: which planted faults the suites see, and which a tolerance would."""

import time
from typing import Annotated, Any

import typer

import nvfp4check
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.kernels_planted import Planted, of_kernel, sighting
from nvfp4check.cli.options import (
    OutputOption,
    PlainFormatOption,
    prepared_format,
    seed_option,
    write,
)
from nvfp4check.findings import CheckError
from nvfp4check.report.render import render

EXAMPLES = (
    "nvfp4check kernels power",
    "nvfp4check kernels power --op matmul --rule vllm",
    "nvfp4check kernels power --op matmul --atol 0.1 --rtol 0.1",
    "nvfp4check kernels power --impl triton --op quantize",
)


def power(
    op: Annotated[
        str | None, typer.Option("--op", metavar="OP", help="One operation, as quantize or matmul.")
    ] = None,
    impl: Annotated[
        str | None,
        typer.Option(
            "--impl",
            metavar="NAME|MODULE:FUNCTION",
            help="Plant the faults that go around a kernel in this one, instead of the reference.",
        ),
    ] = None,
    convention: Annotated[
        str | None, typer.Option(help="The convention of quantisers. [default: engine]")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="One project's published rule, as vllm. [default: all of them]"),
    ] = None,
    atol: Annotated[float | None, typer.Option(help="With --rtol, a rule of your own.")] = None,
    rtol: Annotated[float | None, typer.Option(help="With --atol, a rule of your own.")] = None,
    device: Annotated[str, typer.Option(help="Where an --impl runs: cpu, cuda, cuda:1.")] = "cpu",
    seed: Annotated[int, seed_option("Where generated inputs start from.")] = 0,
    timeout: Annotated[
        float,
        typer.Option(min=0, help="Seconds that a property of an --impl may take; 0: any number."),
    ] = 600.0,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Plant every known fault; exit 1 if a suite misses one or rejects a correct kernel."""
    into = prepared_format(format, output)
    document = power_document(
        *(op, impl, convention, rule, atol, rtol),
        device=device,
        seed=seed,
        seconds=timeout or None,
    )
    write(render(document, into), output)
    return ExitCode.HOLDS if document["verdict"] == "pass" else ExitCode.DOES_NOT_HOLD


def power_document(
    op: str | None = None,
    impl: str | None = None,
    convention: str | None = None,
    rule: str | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    *,
    device: str = "cpu",
    seed: int = 0,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Return which faults are seen, which correct kernels accepted, and what rules would see.

    Faults are planted in a kernel in a child process where one can be forked, which gives each
    property so many seconds.

    Raises:
        CheckError: What was asked for is not there, or the kernel breaks a law unplanted.
    """
    started = time.perf_counter()
    if impl is not None:
        if rule is not None or atol is not None or rtol is not None:
            raise CheckError("rules judge faults planted in the reference: leave out --impl")
        found = of_kernel(Planted(impl, op, convention, device, seed), seconds)
    else:
        found = _of_reference(op, convention, _rules(rule, atol, rtol), seed)
    from nvfp4check.faults import elsewhere

    missed = [one for one in found["faults"] if one["seen_by"] is None]
    rejected = [one for one in found["variants"] if one["rejected_by"]]
    return {
        "schema": "nvfp4check/power/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "operations": found["operations"],
        "impl": impl or "reference",
        "convention": convention,
        "device": device,
        "seed": seed,
        "verdict": "fail" if missed or rejected else "pass",
        "faults": found["faults"],
        "variants": found["variants"],
        "rules": found["rules"],
        "derived_bound": _derived(seed) if found["rules"] else None,
        "elsewhere": [
            {"id": one.id, "does": one.does, "caught_by": one.caught_by} for one in elsewhere()
        ],
        "seconds": round(time.perf_counter() - started, 1),
    }


def _of_reference(
    op: str | None, convention: str | None, rules: list[Any], seed: int
) -> dict[str, Any]:
    """Return what is planted in the reference, which correct kernels pass, and what rules see."""
    from nvfp4check.faults.power import accept, sight
    from nvfp4check.ops import OPERATIONS, operation

    names = [operation(op).name] if op else list(OPERATIONS)
    if convention is not None:
        operation("quantize").reference(convention)
    return {
        "operations": names,
        "faults": [
            sighting(one.planting, one.seen_by, one.seconds)
            for name in names
            for one in sight(name, convention=convention, seed=seed)
        ],
        "variants": [_acceptance(one) for name in names for one in accept(name, seed)],
        "rules": _judged(rules, seed) if "matmul" in names else [],
    }


def _rules(rule: str | None, atol: float | None, rtol: float | None) -> list[Any]:
    from nvfp4check.faults.published_rules import RULES, published_rule, tolerance_rule

    if (atol is None) != (rtol is None):
        raise CheckError("--atol and --rtol belong together: give both")
    if atol is not None and rtol is not None:
        if rule is not None:
            raise CheckError("give either --rule or --atol and --rtol")
        return [tolerance_rule(atol, rtol)]
    return [published_rule(rule)] if rule else list(RULES)


def _acceptance(one: Any) -> dict[str, Any]:
    return {
        "operation": one.variant.operation,
        "name": one.variant.name,
        "convention": one.variant.convention,
        "rejected_by": one.rejected_by,
        "message": one.message,
    }


def _judged(rules: list[Any], seed: int) -> list[dict[str, Any]]:
    from nvfp4check.faults import sensitivity
    from nvfp4check.faults.power import on_our_inputs, on_own_inputs

    own = on_own_inputs(rules, seed)
    model_sized = on_own_inputs(rules, seed, model_sized=True)
    ours = on_our_inputs(rules, seed)
    return [
        {
            "name": one.name,
            "rule": one.rule,
            "source": one.source,
            "shape": list(one.shape),
            "own_inputs": _outcome(own[one.name]),
            "model_sized_inputs": _outcome(model_sized[one.name]),
            "suite_inputs": _outcome(ours[one.name]),
            "smallest_seen": _smallest(sensitivity.of_rule(one, seed)),
        }
        for one in rules
    ]


def _derived(seed: int) -> dict[str, Any]:
    from nvfp4check.faults import sensitivity

    return {"smallest_seen": _smallest(sensitivity.of_derived_bound(seed))}


def _smallest(seen: Any) -> dict[str, Any]:
    return {
        "scale_error": seen.scale_error,
        "flipped_signs": seen.flipped_signs,
        "elements": seen.elements,
    }


def _outcome(outcome: Any) -> dict[str, Any]:
    return {
        "showing": len(outcome.showing),
        "seen": len(outcome.seen),
        "missed": [name for name in outcome.showing if name not in outcome.seen],
        "refused_correct": list(outcome.refused),
    }
