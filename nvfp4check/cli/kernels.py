"""`nvfp4check kernels list|test|power|codegen|bench`: kernels held to their operation's laws."""

from typing import Annotated, Any

import typer

import nvfp4check
from nvfp4check.cli import kernels_bench, kernels_codegen, kernels_power
from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import OutputOption, PlainFormatOption, prepared_format, write
from nvfp4check.findings import CheckError
from nvfp4check.report.render import render

app = make_app(group="Check kernels property by property.")

OpOption = Annotated[
    str | None, typer.Option("--op", metavar="OP", help="One operation, as quantize or matmul.")
]
ImplOption = Annotated[
    str | None,
    typer.Option("--impl", metavar="NAME|MODULE:FUNCTION", help="One implementation."),
]
ConventionOption = Annotated[
    str | None,
    typer.Option(help="The convention a quantiser follows. [default: the kernel's own]"),
]
DeviceOption = Annotated[str, typer.Option(help="Where the kernels run: cpu, cuda, cuda:1.")]


@command(
    app, name="list", examples=("nvfp4check kernels list", "nvfp4check kernels list --op quantize")
)
def list_(
    op: OpOption = None,
    device: DeviceOption = "cpu",
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """List the operations, the implementations found, and why one is unavailable."""
    into = prepared_format(format, output)
    write(render(list_document(op, device), into), output)
    return ExitCode.HOLDS


@command(
    app,
    name="test",
    examples=(
        "nvfp4check kernels test --op quantize --impl torchao",
        "nvfp4check kernels test --impl my_kernels:quantize --convention engine",
        "nvfp4check kernels test --impl triton --format json",
    ),
)
def try_(
    op: OpOption = None,
    impl: ImplOption = None,
    convention: ConventionOption = None,
    device: DeviceOption = "cpu",
    seed: Annotated[int, typer.Option(help="Where generated inputs start from.")] = 0,
    max_examples: Annotated[
        int | None, typer.Option(min=1, help="Inputs drawn where there is no end of them.")
    ] = None,
    allow_skips: Annotated[
        bool, typer.Option("--allow-skips", help="Exit 0 though a property could not be asked.")
    ] = False,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Try every property of an operation on a kernel; exit 1 if one is broken."""
    into = prepared_format(format, output)
    document = outcome_document(op, impl, convention, device, seed, max_examples)
    write(render(document, into), output)
    runs = document.get("runs") or [document]
    verdicts = [law["verdict"] for run in runs for law in run["properties"]]
    if "fail" in verdicts:
        return ExitCode.DOES_NOT_HOLD
    if "skip" in verdicts and not allow_skips:
        return ExitCode.COULD_NOT_CHECK
    return ExitCode.HOLDS


command(app, examples=kernels_power.EXAMPLES)(kernels_power.power)
command(app, examples=kernels_codegen.EXAMPLES)(kernels_codegen.codegen)
command(app, examples=kernels_bench.EXAMPLES)(kernels_bench.bench)


def list_document(op: str | None, device: str) -> dict[str, Any]:
    """Return the operations and their implementations as a JSON document.

    Raises:
        CheckError: There is no such operation.
    """
    from nvfp4check.cli.kernels_found import found
    from nvfp4check.ops import OPERATIONS, operation

    names = [operation(op).name] if op else list(OPERATIONS)
    known = found(device)
    return {
        "schema": "nvfp4check/kernels-list/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "operations": [
            {
                "name": name,
                "signature": OPERATIONS[name].signature,
                "purpose": OPERATIONS[name].purpose,
                "arguments": {value.name: value.form for value in OPERATIONS[name].arguments},
                "implementations": [
                    {
                        "name": one.name,
                        "path": one.path,
                        "convention": one.convention,
                        "device": one.device,
                        "available": one.unavailable is None,
                        "why": one.unavailable,
                    }
                    for one in known
                    if one.operation == name
                ],
            }
            for name in names
        ],
        "unusable": [
            {"name": one.name, "why": one.unavailable} for one in known if one.operation == "?"
        ],
    }


def outcome_document(
    op: str | None,
    impl: str | None,
    convention: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    max_examples: int | None = None,
) -> dict[str, Any]:
    """Return what the properties found, as a JSON document: one run, or several in `runs`.

    Raises:
        CheckError: What was asked for is not there, or several were meant and none is available.
    """
    from nvfp4check.cli.kernels_found import chosen

    if op is None and impl is None:
        raise CheckError("say which kernel: --impl NAME or MODULE:FUNCTION, or --op OP")
    implementations = chosen(impl, op, convention, device)
    if not implementations:
        raise CheckError(
            f"no implementation of {op} is available on {device}: "
            f"`nvfp4check kernels list` says why"
        )
    runs = [_run(one, device, seed, max_examples) for one in implementations]
    if len(runs) == 1:
        return runs[0]
    verdicts = {run["verdict"] for run in runs}
    return {
        **runs[0],
        "op": op,
        "impl": impl,
        "convention": convention,
        "verdict": "fail" if "fail" in verdicts else "skip" if "skip" in verdicts else "pass",
        "properties": [],
        "runs": runs,
    }


def _run(one: Any, device: str, seed: int, max_examples: int | None) -> dict[str, Any]:
    from nvfp4check.cli.kernels_found import bound
    from nvfp4check.faults.diagnosis import with_diagnosis
    from nvfp4check.properties import properties_of
    from nvfp4check.properties.law import DEFAULT_EXAMPLES, Setting

    kernel, facts = bound(one)
    setting = Setting(
        convention=one.convention,
        facts=facts,
        device=device,
        seed=seed,
        max_examples=DEFAULT_EXAMPLES if max_examples is None else max_examples,
    )
    outcomes = [
        with_diagnosis(law.run(kernel, setting), kernel, setting)
        for law in properties_of(one.operation)
    ]
    verdicts = {outcome.verdict.value for outcome in outcomes}
    return {
        "schema": "nvfp4check/kernels/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "op": one.operation,
        "impl": one.name,
        "convention": one.convention,
        "device": device,
        "seed": seed,
        "verdict": "fail" if "fail" in verdicts else "skip" if "skip" in verdicts else "pass",
        "properties": [outcome.to_json() for outcome in outcomes],
    }
