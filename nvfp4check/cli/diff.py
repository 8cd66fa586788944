"""`nvfp4check diff A B`: what differs between two checkpoints, in meaning and not only in bytes."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.engines import EngineName, EngineOption, make_engine
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import (
    AllowSkipsOption,
    DeviceOption,
    JobsOption,
    Level,
    OutputOption,
    PlainFormatOption,
    ResumeOption,
    SampleSeedOption,
    prepared_format,
    wants_color,
    write,
)
from nvfp4check.cli.progress import progress_bar
from nvfp4check.report.render import Extras, render

app = make_app()


class FailOnDifference(StrEnum):
    """The least difference that fails the run."""

    DIFFERENT = "different"
    REQUANTIZED = "requantized"
    BYTES = "bytes"


_SIDE = "A checkpoint: a directory, or a URL: hf://org/name, or one that fsspec opens."


@command(
    app,
    examples=(
        "nvfp4check diff ./model-nvfp4 ./candidate-nvfp4",
        "nvfp4check diff ./model-fp8 ./model-nvfp4 --only 'model.layers.3.*'",
        "nvfp4check diff ./model hf://org/model --level headers",
        "nvfp4check diff ./old ./new --activations ./run --output difference.html",
        "nvfp4check diff ./old ./new --fail-on bytes --format markdown",
    ),
)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_SIDE, show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other.", show_default=False)],
    only: Annotated[
        str | None,
        typer.Option(
            metavar="GLOB",
            help="Compare the weights whose name, or module, fits.",
            show_default=False,
        ),
    ] = None,
    fail_on: Annotated[
        FailOnDifference,
        typer.Option(
            help="What makes the exit code 1. different: a weight beyond rounding, or a setting of "
            "the model. requantized: also weights made anew. bytes: anything."
        ),
    ] = FailOnDifference.DIFFERENT,
    level: Annotated[
        Level,
        typer.Option(help="headers: names, shapes, dtypes and JSON only. bytes: also every value."),
    ] = Level.BYTES,
    sample: Annotated[
        float,
        typer.Option(
            metavar="FRACTION",
            help="Compare this share of the modules, and say what that may miss.",
        ),
    ] = 1.0,
    seed: SampleSeedOption = 0,
    activations: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Weigh the predicted error of each linear by the inputs that this run recorded: "
            "one made by forward with --activations all.",
            show_default=False,
        ),
    ] = None,
    jobs: JobsOption = 1,
    engine: EngineOption = EngineName.LOCAL,
    device: DeviceOption = "cpu",
    allow_skips: AllowSkipsOption = False,
    resume: ResumeOption = False,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Say of every weight whether it is the same, the same by value, made anew, or another.

    Codes, block scales and global scale are one weight; layouts of different producers are compared
    by their values. Where a difference is a known fault, it is named.
    """
    into = prepared_format(format, output)

    from nvfp4check.activations import Run
    from nvfp4check.checkpoint.diff.classes import FailOn
    from nvfp4check.checkpoint.diff.effect import read_moments
    from nvfp4check.checkpoint.diff.run import DiffOptions, diff_checkpoints
    from nvfp4check.checkpoint.opening import open_checkpoint

    least = FailOn(fail_on.value)
    options = DiffOptions(
        only=only,
        read_bytes=level is Level.BYTES,
        sample=sample,
        seed=seed,
        jobs=jobs,
        engine=make_engine(engine, jobs),
        device=device,
        moments=None if activations is None else read_moments(Run.open(activations)),
        resume=resume,
    )
    sides = open_checkpoint(a), open_checkpoint(b)
    with progress_bar("Comparing", in_bytes=True) as bar:
        result = diff_checkpoints(*sides, options, bar)
    extras = Extras(color=wants_color(output), fail_on=fail_on.value)
    write(render(result.to_json(least), into, extras), output)
    if any(result.failing(least)):
        return ExitCode.DOES_NOT_HOLD
    return ExitCode.COULD_NOT_CHECK if result.skipped and not allow_skips else ExitCode.HOLDS
