"""`nvfp4check faults list` and `nvfp4check faults inject`: the catalogue, and a fault to try."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

import nvfp4check
from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import (
    CheckpointArgument,
    OutputOption,
    PlainFormatOption,
    chosen_format,
    require_writable,
    split_ids,
    write,
)
from nvfp4check.findings import CheckError
from nvfp4check.report.render import render

if TYPE_CHECKING:
    from nvfp4check.checkpoint.faults import CheckpointFault

app = make_app(group="Faults that were really shipped: list them, or plant one in a copy.")


@command(
    app,
    name="list",
    examples=(
        "nvfp4check faults list",
        "nvfp4check faults list F9",
        "nvfp4check faults list --format markdown",
    ),
)
def list_faults(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="Faults, or the beginning of their ids."),
    ] = None,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """List the faults that a stored checkpoint can carry, or explain some."""
    require_writable(output)
    write(render(_document(split_ids(ids)), chosen_format(format, output)), output)
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
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Which weight, and what else is chance.")
    ] = 0,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Plant one fault in a copy of a local checkpoint, and say what was changed.

    Files that stay as they are become hard links; the original is never written.
    """
    require_writable(output)

    from nvfp4check.checkpoint.faults.injection import inject

    planted = inject(checkpoint, target, fault, tensor=tensor, seed=seed)
    write(render(planted.to_json(), chosen_format(format, output)), output)
    return ExitCode.HOLDS


def _document(ids: tuple[str, ...]) -> dict[str, Any]:
    from nvfp4check.checkpoint.faults import CHECKPOINT_FAULTS
    from nvfp4check.checkpoint.faults.injection import SCHEMA, record

    return {
        "schema": SCHEMA,
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "explained": bool(ids),
        "faults": [record(fault) for fault in _chosen(ids, CHECKPOINT_FAULTS)],
    }


def _chosen(
    ids: tuple[str, ...], catalogue: "dict[str, CheckpointFault]"
) -> "list[CheckpointFault]":
    for prefix in ids:
        if not any(known.upper().startswith(prefix) for known in catalogue):
            raise CheckError(
                f"no fault begins with {prefix!r}; `nvfp4check faults list` lists every fault"
            )
    return [
        fault
        for identifier, fault in catalogue.items()
        if not ids or any(_fits(identifier, prefix) for prefix in ids)
    ]


def _fits(identifier: str, prefix: str) -> bool:
    """Whether a prefix means a fault: F1 means F1a and not F13a."""
    rest = identifier.upper().removeprefix(prefix)
    return identifier.upper().startswith(prefix) and not (
        prefix[-1:].isdigit() and rest[:1].isdigit() and len(prefix) == 2
    )
