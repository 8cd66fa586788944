"""`nvfp4check inspect CKPT [TENSOR]`: what is in this checkpoint?"""

from typing import Annotated

import typer

from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import (
    CheckpointArgument,
    Level,
    OutputOption,
    PlainFormatOption,
    prepared_format,
    write,
)
from nvfp4check.cli.progress import progress_bar
from nvfp4check.report.render import render

app = make_app()


@command(
    app,
    examples=(
        "nvfp4check inspect ./model",
        "nvfp4check inspect ./model --level headers",
        "nvfp4check inspect ./model model.layers.3.mlp.experts.0.down_proj",
        "nvfp4check inspect ./model --output inspection.html",
    ),
)
def inspect(
    checkpoint: CheckpointArgument,
    tensor: Annotated[
        str | None,
        typer.Argument(
            metavar="TENSOR",
            help="One weight in detail: by its name, its module's, or a stored tensor's.",
            show_default=False,
        ),
    ] = None,
    level: Annotated[
        Level,
        typer.Option(help="headers: read headers and JSON only. bytes: also histograms."),
    ] = Level.BYTES,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Show what is in a checkpoint: formats, sizes, histograms of codes and scales."""
    into = prepared_format(format, output)

    from nvfp4check.checkpoint.inspection import inspect as look
    from nvfp4check.checkpoint.opening import open_checkpoint
    from nvfp4check.checkpoint.rules.base import RuleLevel

    opened = open_checkpoint(checkpoint)
    with progress_bar("Reading", in_bytes=True) as bar:
        done = 0

        def report(size: int) -> None:
            nonlocal done
            done += size
            if bar is not None:
                bar(done, opened.nbytes)

        result = look(opened, tensor, level=RuleLevel(level.value), progress=report)
    write(render(result.to_json(), into), output)
    return ExitCode.COULD_NOT_CHECK if result.skipped else ExitCode.HOLDS
