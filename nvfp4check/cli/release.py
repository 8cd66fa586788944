"""`nvfp4check release CKPT --base BASE --out DIR`: the whole gate in one command."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import (
    AllowSkipsOption,
    CheckpointArgument,
    DeviceOption,
    JobsOption,
    Kept,
    LogitsOption,
    MaxKlOption,
    MaxMemoryOption,
    MinTop1Option,
    OutputOption,
    PlainFormatOption,
    PromptsOption,
    RareKlOption,
    prepared_format,
    require_limits,
    require_rare_kl,
    write,
)
from nvfp4check.cli.streams import write_stderr
from nvfp4check.findings import CheckError
from nvfp4check.report.render import render

if TYPE_CHECKING:
    from nvfp4check.release import State, Step

app = make_app()


@command(
    app,
    examples=(
        "nvfp4check release ./model --base ./model-fp8 --out gate --max-kl 0.05 --min-top1 0.9",
        "nvfp4check release ./model --base ./model-fp8 --prompts p.jsonl --out gate --resume",
        "nvfp4check release ./model --base ./model-fp8 --out gate --plan",
    ),
)
def release(
    checkpoint: CheckpointArgument,
    base: Annotated[
        str,
        typer.Option(metavar="CKPT", help="What it was quantised from.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where runs and results go.", show_default=False),
    ],
    prompts: PromptsOption = None,
    card: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The model card to check.", show_default=False),
    ] = None,
    max_kl: MaxKlOption = None,
    min_top1: MinTop1Option = None,
    rare_kl: RareKlOption = 0.0,
    noise: Annotated[
        int, typer.Option(metavar="N", min=0, help="Runs of the base with noise on it.")
    ] = 2,
    split: Annotated[
        bool,
        typer.Option("--split", help="Also run with the base's experts, to split KL."),
    ] = False,
    activations: Annotated[Kept, typer.Option(help="Points of each layer to compare.")] = (
        Kept.HIDDEN
    ),
    logits: LogitsOption = "full",
    jobs: JobsOption = 1,
    max_memory: MaxMemoryOption = 4.0,
    device: DeviceOption = "cpu",
    allow_skips: AllowSkipsOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the gate in --out.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the commands of the steps and run none.")
    ] = False,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Validate with audit and card, compute base and candidate, compare, and write one page.

    Each step is a command that also runs alone: --plan prints them. The exit code is that of the
    worst step: 1, then 2, then 3. Without a limit on logits the comparison is undecided.
    """
    require_limits(max_kl, min_top1)
    require_rare_kl(rare_kl)
    _require_inputs(checkpoint, base, prompts, logits)

    from nvfp4check.release import ReleaseOptions, begin
    from nvfp4check.release import plan as make_plan

    options = ReleaseOptions(
        checkpoint=checkpoint,
        base=base,
        out=out,
        prompts=prompts,
        card=card,
        activations=activations.value,
        logits=logits,
        max_kl=max_kl,
        min_top1=min_top1,
        rare_kl=rare_kl,
        noise=noise,
        split=split,
        jobs=jobs,
        max_memory=max_memory,
        device=device,
        allow_skips=allow_skips,
    )
    steps = make_plan(options)
    if plan:
        write("".join(f"{step.command}\n" for step in steps), output)
        return ExitCode.HOLDS
    into = prepared_format(format, output)
    state = begin(options, resume=resume)
    *computed, page = steps
    for step in computed:
        if not state.done(step) and _run(step, state, resume=resume) == ExitCode.INTERRUPTED:
            return ExitCode.INTERRUPTED
    state.write()
    if (code := _run_page(page, state)) != ExitCode.HOLDS:
        return code
    write(render(state.document(), into), output)
    return state.code


def _require_inputs(checkpoint: str, base: str, prompts: Path | None, logits: str) -> None:
    """Check before the hours of the first step what the later ones would refuse.

    Raises:
        CheckError: The base is the checkpoint, or prompts or --logits cannot be understood.
    """
    from nvfp4check.forward.options import Logits
    from nvfp4check.tokens import check_prompts, read_prompts

    if os.path.realpath(checkpoint) == os.path.realpath(base):
        raise CheckError(
            f"{base}: the base is the checkpoint itself; give --base the FP8 or BF16 checkpoint "
            "that this one was made from"
        )
    Logits.parse(logits)
    if prompts is not None:
        check_prompts(read_prompts(prompts), "--prompts")


def _run_page(step: "Step", state: "State") -> int:
    """Write the page of what there is; return the exit code."""
    from nvfp4check.cli.main import main

    command, *rest = step.argv
    absent = {str(other.output) for other in state.planned if not state.done(other)}
    return main([command, str(state.path), *(part for part in rest if part not in absent)])


def _run(step: "Step", state: "State", *, resume: bool) -> int | None:
    """Run one step and keep how it ended; return its exit code, None where it was not run."""
    from nvfp4check.cli.main import main

    if (lacking := state.lacking(step)) is not None:
        why = f"{lacking} did not come about"
        state.record(step, None, 0.0, why)
        write_stderr(f"nvfp4check release: {step.name} not run: {why}\n")
        return None
    argv = list(step.argv)
    if (step.journal and resume) or (step.run is not None and step.run.exists()):
        argv.append("--resume")
    write_stderr(f"nvfp4check release: {step.name}\n")
    start = time.perf_counter()
    code = main(argv)
    if code != ExitCode.INTERRUPTED:
        state.record(step, code, time.perf_counter() - start)
    return code
