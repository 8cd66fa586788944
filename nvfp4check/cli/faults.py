"""`nvfp4check faults list` and `nvfp4check faults inject`: the catalogue, and a fault to try."""

from enum import StrEnum
from typing import Annotated, Any

import typer

import nvfp4check
from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import (
    CheckpointArgument,
    OutputOption,
    PlainFormatOption,
    line_width,
    prepared_format,
    seed_option,
    split_ids,
    write,
)
from nvfp4check.findings import CheckError
from nvfp4check.report.render import Extras, render

app = make_app(group="Faults that were really shipped: list them, or plant one in a copy.")


class FaultKind(StrEnum):
    """What carries a fault."""

    CHECKPOINT = "checkpoint"
    KERNEL = "kernel"
    ALL = "all"


@command(
    app,
    name="list",
    examples=(
        "nvfp4check faults list",
        "nvfp4check faults list F9",
        "nvfp4check faults list --kind kernel --format markdown",
    ),
)
def list_faults(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="ID", help="Faults, or the beginning of their ids."),
    ] = None,
    kind: Annotated[
        FaultKind, typer.Option(help="Faults of stored checkpoints, of kernels, or both.")
    ] = FaultKind.CHECKPOINT,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """List the faults that a stored checkpoint can carry, or a kernel; or explain some.

    Those of checkpoints are planted by `faults inject`, those of kernels by `kernels power`.
    """
    into = prepared_format(format, output)
    document = _document(split_ids(ids), kind)
    write(render(document, into, Extras(width=line_width(output))), output)
    return ExitCode.HOLDS


@command(
    app,
    name="inject",
    examples=(
        "nvfp4check faults inject ./model ./broken --fault F9a",
        "nvfp4check faults inject ./model ./broken --fault F8a --tensor '*.layers.3.*' --seed 1",
    ),
)
def inject_fault(
    checkpoint: CheckpointArgument,
    target: Annotated[
        str, typer.Argument(metavar="OUT", help="The copy: a new directory.", show_default=False)
    ],
    fault: Annotated[
        str,
        typer.Option("--fault", metavar="ID", help="Which fault, by id or name."),
    ],
    tensor: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="Plant in a weight whose name fits.", show_default=False),
    ] = None,
    seed: Annotated[int, seed_option("Which weight, and what else is chance.")] = 0,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Plant one fault in a copy of a local checkpoint, and say what was changed.

    Files that stay as they are become hard links; the original is never written.
    """
    into = prepared_format(format, output)

    from nvfp4check.checkpoint.faults.injection import inject

    planted = inject(checkpoint, target, fault, tensor=tensor, seed=seed)
    write(render(planted.to_json(), into, Extras(width=line_width(output))), output)
    return ExitCode.HOLDS


def _document(ids: tuple[str, ...], kind: FaultKind) -> dict[str, Any]:
    from nvfp4check.checkpoint.faults.injection import SCHEMA

    faults = [
        *(_checkpoint_faults() if kind is not FaultKind.KERNEL else ()),
        *(_kernel_faults() if kind is not FaultKind.CHECKPOINT else ()),
    ]
    for prefix in ids:
        if not any(_fits(fault["id"], prefix) for fault in faults):
            raise CheckError(
                f"no fault begins with {prefix!r}; `nvfp4check faults list --kind all` lists every "
                "fault"
            )
    return {
        "schema": SCHEMA,
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "explained": bool(ids),
        "faults": [fault for fault in faults if not ids or any(_fits(fault["id"], i) for i in ids)],
    }


def _checkpoint_faults() -> list[dict[str, Any]]:
    from nvfp4check.checkpoint.faults import CHECKPOINT_FAULTS
    from nvfp4check.checkpoint.faults.injection import record

    return [record(fault) for fault in CHECKPOINT_FAULTS.values()]


def _kernel_faults() -> list[dict[str, Any]]:
    from nvfp4check.faults import kernel_faults

    return [
        {
            "kind": FaultKind.KERNEL.value,
            "id": fault.id,
            "name": fault.name,
            "does": fault.does,
            "operations": [*fault.operations],
            "remark": f"it shows where the input holds {fault.needs}",
            "threads": [*fault.urls],
        }
        for fault in kernel_faults()
    ]


def _fits(identifier: str, prefix: str) -> bool:
    """Whether a prefix means a fault: F1 means F1a and not F13a."""
    rest = identifier.upper().removeprefix(prefix)
    whole_number = not (len(prefix) == 2 and rest[:1].isdigit())
    return identifier.upper().startswith(prefix) and whole_number
