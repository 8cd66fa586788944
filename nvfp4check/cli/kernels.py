"""`nvfp4check kernels list|test|power|codegen|bench`: kernels held to their operation's laws."""

from typing import Annotated, Any

import typer

import nvfp4check
from nvfp4check.cli import kernels_apart, kernels_bench, kernels_codegen, kernels_power
from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.kernels_apart import asked_apart
from nvfp4check.cli.kernels_runs import Question, asked
from nvfp4check.cli.kernels_runs import document as of_records
from nvfp4check.cli.options import (
    OutputOption,
    PlainFormatOption,
    prepared_format,
    seed_option,
    write,
)
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
    seed: Annotated[int, seed_option("Where generated inputs start from.")] = 0,
    max_examples: Annotated[
        int | None, typer.Option(min=1, help="Inputs drawn where there is no end of them.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that a property may take; 0: any number.")
    ] = 600.0,
    allow_skips: Annotated[
        bool, typer.Option("--allow-skips", help="Exit 0 though a property could not be asked.")
    ] = False,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Try every property of an operation on a kernel; exit 1 if one is broken."""
    into = prepared_format(format, output)
    document = outcome_document(
        op, impl, convention, device, seed, max_examples, seconds=timeout or None
    )
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
    seconds: float | None = None,
) -> dict[str, Any]:
    """Return what the properties found, as a JSON document: one run, or several in `runs`.

    They are asked in a child process where one can be forked, which gives each so many seconds.

    Raises:
        CheckError: What was asked for is not there, or several were meant and none is available.
    """
    question = Question(
        op=op,
        impl=impl,
        convention=convention,
        device=device,
        seed=seed,
        max_examples=max_examples,
    )
    apart = kernels_apart.possible()
    return of_records(question, asked_apart(question, seconds) if apart else asked(question))
