"""`nvfp4check kernels power`: which planted faults the suites see, and which a tolerance would."""

import time
from typing import Annotated, Any

import typer

import nvfp4check
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import OutputOption, PlainFormatOption, prepared_format, write
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
    seed: Annotated[int, typer.Option(help="Where generated inputs start from.")] = 0,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Plant every known fault; exit 1 if a suite misses one or rejects a correct kernel."""
    into = prepared_format(format, output)
    document = power_document(op, impl, convention, rule, atol, rtol, device=device, seed=seed)
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
) -> dict[str, Any]:
    """Return which faults are seen, which correct kernels accepted, and what rules would see.

    Raises:
        CheckError: What was asked for is not there, or the kernel breaks a law unplanted.
    """
    from nvfp4check.faults import elsewhere
    from nvfp4check.faults.power import accept, sight
    from nvfp4check.ops import OPERATIONS, operation

    if op is not None:
        operation(op)
    if convention is not None:
        operation("quantize").reference(convention)
    started = time.perf_counter()
    rules = _rules(rule, atol, rtol)
    if impl is not None:
        planted = _planted_in(impl, op, convention, device, seed)
        names = list(dict.fromkeys(one["operation"] for one in planted))
        accepted: list[dict[str, Any]] = []
    else:
        names = [op] if op else list(OPERATIONS)
        planted = [
            _sighting(one)
            for name in names
            for one in sight(name, convention=convention, seed=seed)
        ]
        accepted = [_acceptance(one) for name in names for one in accept(name, seed)]
    judged = _judged(rules, seed) if "matmul" in names and impl is None else []
    missed = [one for one in planted if one["seen_by"] is None]
    rejected = [one for one in accepted if one["rejected_by"]]
    return {
        "schema": "nvfp4check/power/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "operations": names,
        "impl": impl or "reference",
        "convention": convention,
        "device": device,
        "seed": seed,
        "verdict": "fail" if missed or rejected else "pass",
        "faults": planted,
        "variants": accepted,
        "rules": judged,
        "derived_bound": _derived(seed) if judged else None,
        "elsewhere": [
            {"id": one.id, "does": one.does, "caught_by": one.caught_by} for one in elsewhere()
        ],
        "seconds": round(time.perf_counter() - started, 1),
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


def _planted_in(
    impl: str, op: str | None, convention: str | None, device: str, seed: int
) -> list[dict[str, Any]]:
    from nvfp4check.cli.kernels_found import bound, chosen
    from nvfp4check.faults.power import first_broken_law, sight
    from nvfp4check.properties.law import Setting

    found = []
    for one in chosen(impl, op, convention, device):
        kernel, facts = bound(one)
        setting = Setting(convention=one.convention, facts=facts, device=device, seed=seed)
        broken, _ = first_broken_law(kernel, one.operation, setting)
        if broken:
            raise CheckError(
                f"{one.name} breaks {broken} of {one.operation} with nothing planted in it, so "
                f"planted faults would show nothing: run `nvfp4check kernels test` first"
            )
        planted = sight(
            one.operation,
            convention=one.convention,
            kernel=kernel,
            facts=facts,
            device=device,
            seed=seed,
        )
        found += [_sighting(sighting) for sighting in planted]
    if not found:
        raise CheckError(f"no fault goes around {impl}: try it without --impl")
    return found


def _sighting(one: Any) -> dict[str, Any]:
    return {
        "id": one.fault.id,
        "name": one.fault.name,
        "form": one.form.label,
        "operation": one.form.operation,
        "convention": one.convention,
        "does": one.fault.does,
        "needs": one.fault.needs,
        "threads": list(one.fault.urls),
        "seen_by": one.seen_by,
        "seconds": round(one.seconds, 3),
    }


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
