"""`nvfp4check validate CKPT`: is this checkpoint sound, and was it made from that base?"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.engines import EngineName, EngineOption, make_engine
from nvfp4check.cli.options import (
    AllowSkipsOption,
    CheckpointArgument,
    DeviceOption,
    FindingsFormatOption,
    JobsOption,
    Level,
    OutputOption,
    ResumeOption,
    SampleSeedOption,
    prepared_format,
    split_ids,
    wants_color,
    write,
)
from nvfp4check.cli.progress import progress_bar
from nvfp4check.cli.rules import require_rules, rules_document
from nvfp4check.report.formats import Format
from nvfp4check.report.histograms import Plot, weight_plots
from nvfp4check.report.render import Extras, render

if TYPE_CHECKING:
    from nvfp4check.checkpoint.opening import Checkpoint
    from nvfp4check.checkpoint.validation import Progress

app = make_app()


class FailOn(StrEnum):
    """The least severity that fails the run."""

    ERROR = "error"
    WARNING = "warning"


@command(
    app,
    examples=(
        "nvfp4check validate ./model",
        "nvfp4check validate ./model --base ./model-fp8",
        "nvfp4check validate ./model --level headers",
        "nvfp4check validate ./model --select NV2,NV3 --ignore NV205",
        "nvfp4check validate ./model --jobs 8 --output report.html",
        "nvfp4check validate ./model --sample 0.05 --format json",
    ),
)
def validate(
    checkpoint: CheckpointArgument,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT",
            help="Audit every weight against the checkpoint that this one was made from: FP8 "
            "128x128, BF16 or FP16.",
            show_default=False,
        ),
    ] = None,
    level: Annotated[
        Level,
        typer.Option(help="headers: read headers and JSON only. bytes: also every code and scale."),
    ] = Level.BYTES,
    select: Annotated[
        list[str] | None,
        typer.Option(metavar="ID[,ID]", help="Run these rules; NV2 means all that begin so."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="ID[,ID]", help="Leave these rules out."),
    ] = None,
    fail_on: Annotated[
        FailOn, typer.Option(help="The least severity that makes the exit code 1.")
    ] = FailOn.ERROR,
    sample: Annotated[
        float,
        typer.Option(
            metavar="FRACTION",
            help="Read the bytes of this share of the weights, and say what that may miss.",
        ),
    ] = 1.0,
    seed: SampleSeedOption = 0,
    tp: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Also check that N-way tensor parallel shards end on borders of blocks.",
            show_default=False,
        ),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The model card to hold against the files; else the checkpoint's README.md.",
            show_default=False,
        ),
    ] = None,
    jobs: JobsOption = 1,
    engine: EngineOption = EngineName.LOCAL,
    device: DeviceOption = "cpu",
    allow_skips: AllowSkipsOption = False,
    resume: ResumeOption = False,
    format: FindingsFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Check a checkpoint against every rule, and say what is wrong, where, and what was covered.

    A finding at or above --fail-on makes the exit code 1; something that could not be checked
    makes it 2, unless --allow-skips is given.
    """
    selected, ignored = split_ids(select), split_ids(ignore)
    require_rules((*selected, *ignored))
    into = prepared_format(format, output, Format)

    from nvfp4check.checkpoint.opening import open_checkpoint
    from nvfp4check.checkpoint.rules.base import RuleLevel
    from nvfp4check.checkpoint.validation import ValidationOptions, exit_code
    from nvfp4check.checkpoint.validation import validate as run
    from nvfp4check.findings import Severity

    least = Severity(fail_on.value)
    options = ValidationOptions(
        level=RuleLevel(level.value),
        select=selected,
        ignore=ignored,
        fail_on=least,
        tp=tp,
        base=None if base is None else open_checkpoint(base),
        card=card,
        sample=sample,
        seed=seed,
        jobs=jobs,
        engine=make_engine(engine, jobs),
        device=device,
        resume=resume,
    )
    opened = open_checkpoint(checkpoint)
    with _progress() as progress:
        result = run(opened, options, progress)
    extras = _extras(opened, level, into, color=wants_color(output), fail_on=fail_on.value)
    write(render(result.to_json(), into, extras), output)
    return exit_code(result, least, allow_skips)


@contextmanager
def _progress() -> "Iterator[Progress | None]":
    """Give what the run reports its progress to: a bar for bytes and audit, none for the rules."""
    with progress_bar("Reading", in_bytes=True) as bar:

        def report(stage: str, done: int, total: int) -> None:
            if bar is not None and stage in ("bytes", "audit"):
                bar(done, total)

        yield report if bar is not None else None


def _extras(
    checkpoint: "Checkpoint", level: Level, into: Format, *, color: bool, fail_on: str
) -> Extras:
    """Collect what the format shows beside the findings."""
    rules: dict[str, Any] = {}
    weights: dict[str, str] = {}
    plots: list[Plot] = []
    if into in (Format.HTML, Format.SARIF):
        rules = {rule["id"]: rule for rule in rules_document()["rules"]}
    if into is Format.HTML:
        weights = {name: weight.format.value for name, weight in checkpoint.weights.items()}
    if into is Format.HTML and level is Level.BYTES:
        from nvfp4check.checkpoint.inspection import inspect

        held = inspect(checkpoint)
        plots = weight_plots(held.code_histogram, held.scale_histogram)
    return Extras(color=color, rules=rules, weights=weights, histograms=plots, fail_on=fail_on)
