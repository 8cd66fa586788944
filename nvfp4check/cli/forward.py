"""`nvfp4check forward CKPT`: the reference forward pass, layer by layer from disk."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nvfp4check
from nvfp4check.activations import MTP_FOLDER
from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.engines import EngineName, EngineOption, make_expert_engine
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import (
    CheckpointArgument,
    DeviceOption,
    Kept,
    LogitsOption,
    MaxMemoryOption,
    OutputOption,
    PlainFormatOption,
    PromptsOption,
    prepared_format,
    seed_option,
    write,
)
from nvfp4check.cli.progress import progress_bar
from nvfp4check.report.render import render

if TYPE_CHECKING:
    from nvfp4check.forward.options import ForwardOptions
    from nvfp4check.forward.streaming import ForwardResult
    from nvfp4check.tokens import Prompt

app = make_app()


class Mode(StrEnum):
    """What quantised weights mean for the product."""

    STORED = "stored"
    WEIGHT_ONLY = "weight-only"
    UNQUANTIZED = "unquantized"


class Cache(StrEnum):
    """What keys and values pass through."""

    STORED = "stored"
    NONE = "none"


class Dtype(StrEnum):
    """The dtype of activations."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"


@command(
    app,
    examples=(
        "nvfp4check forward ./model --out run",
        'nvfp4check forward ./model --text "Hello, my name is" --activations all --out run',
        "nvfp4check forward ./model --prompts prompts.jsonl --logits topk:20 --out run --resume",
        "nvfp4check forward /shared/model --mtp --engine ray --out run",
        "nvfp4check forward ./model --perturb ulp:bfloat16 --seed 1 --out noise",
        "nvfp4check forward ./model --activations all --bounds bfloat16,bfloat16/tp8 --out golden",
        "nvfp4check forward ./model --dtype bfloat16 --inputs golden --out candidate",
    ),
)
def forward(
    checkpoint: CheckpointArgument,
    out: Annotated[
        Path,
        typer.Option(metavar="RUN", help="The run directory to write.", show_default=False),
    ],
    prompts: PromptsOption = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="STR", help="A prompt; may be repeated.", show_default=False),
    ] = None,
    activations: Annotated[
        Kept,
        typer.Option(help="Points of each layer to keep; hidden has the router's choice with it."),
    ] = Kept.NONE,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="stored: as an engine computes, activations quantised. weight-only: weights "
            "dequantised. unquantized: for BF16. [default: stored if any weight is quantised]",
            show_default=False,
        ),
    ] = None,
    kv_cache: Annotated[
        Cache, typer.Option(help="stored: through the format that the checkpoint declares.")
    ] = Cache.STORED,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the activations.")] = Dtype.FLOAT32,
    device: DeviceOption = "cpu",
    max_memory: MaxMemoryOption = 4.0,
    layers: Annotated[
        str, typer.Option(metavar="A:B", help="Layers A to B-1 only; continue with --resume.")
    ] = "0:",
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Compute the layers of multi-token prediction too.")
    ] = False,
    logits: LogitsOption = "full",
    perturb: Annotated[
        str | None,
        typer.Option(
            metavar="ulp:DTYPE",
            help="Noise as rounding to DTYPE makes it, for a noise floor.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, seed_option("Which noise.")] = 0,
    routing: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Force the experts that another run chose.", show_default=False
        ),
    ] = None,
    bounds: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE[/tpN][/direct][,…]",
            help="How far a correct candidate of these dtypes may lie off, for `agree`: "
            "float32, bfloat16, float16; with /tp8, of an engine of 8 ranks; with /direct, of one "
            "that unfolds keys and values.",
            show_default=False,
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Begin each layer with the states of another run, to judge it on its own.",
            show_default=False,
        ),
    ] = None,
    engine: EngineOption = EngineName.LOCAL,
    jobs: Annotated[
        int, typer.Option(metavar="N", min=1, help="Workers of a Ray cluster that is started here.")
    ] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Compute what the checkpoint computes, streamed from disk in bounded memory.

    The run directory is its own journal: killed at any moment, the same command with --resume ends
    with the same bytes.
    """
    into = prepared_format(format, output)

    from nvfp4check.forward.bounds.recording import parse_bounds
    from nvfp4check.forward.options import (
        Activations,
        Arithmetic,
        ForwardOptions,
        KvCache,
        LayerRange,
        Logits,
        Perturbation,
    )
    from nvfp4ref.deepseek_v3.linear import LinearMode

    options = ForwardOptions(
        mode=LinearMode(mode.value) if mode else None,
        kv_cache=KvCache(kv_cache.value),
        arithmetic=Arithmetic(dtype.value),
        device=device,
        activations=Activations(activations.value),
        logits=Logits.parse(logits),
        layers=LayerRange.parse(layers),
        mtp=mtp,
        perturbation=Perturbation.parse(perturb) if perturb else None,
        seed=seed,
        routing=routing,
        bounds=parse_bounds(bounds) if bounds is not None else (),
        inputs=inputs,
        max_memory=int(max_memory * 2**30),
        engine=make_expert_engine(engine, jobs),
        resume=resume,
    )
    result = _run(checkpoint, _prompts(prompts, text or []), out, options)
    write(render(forward_document(result), into), output)
    return ExitCode.HOLDS


def _prompts(file: Path | None, texts: list[str]) -> "list[Prompt]":
    from nvfp4check.tokens import MODEL_CARD_PROMPTS, check_prompts, prompts_of_texts, read_prompts

    found = read_prompts(file) if file is not None else []
    if texts or file is None:
        found += prompts_of_texts(texts or MODEL_CARD_PROMPTS)
    check_prompts(found, "--prompts and --text")
    return found


def _run(
    checkpoint: str, prompts: "list[Prompt]", out: Path, options: "ForwardOptions"
) -> "ForwardResult":
    from nvfp4check.forward.reach import Step
    from nvfp4check.forward.streaming import run_forward

    with progress_bar("Forward", in_bytes=True) as bar:

        def report(step: Step) -> None:
            if bar is not None:
                bar(step.bytes_read, step.bytes_expected, step.what)

        return run_forward(checkpoint, prompts, out, options, report)


def forward_document(result: "ForwardResult") -> dict[str, Any]:
    """Return what a run was and cost, as a JSON document."""
    info = result.run.info
    return {
        "schema": "nvfp4check/forward/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "run": str(result.run.path),
        "checkpoint": info.checkpoint,
        "mode": info.mode,
        "kv_cache": info.kv_cache,
        "dtype": info.dtype,
        "layers": info.layers,
        "mtp": info.mtp if (result.run.path / MTP_FOLDER).is_dir() else 0,
        "layers_computed": result.layers,
        "bytes_read": result.meter.bytes_read,
        "seconds": round(result.seconds, 3),
        "seconds_by_work": {k: round(v, 3) for k, v in sorted(result.meter.seconds.items())},
        "prompts": [
            {"id": prompt.id, "tokens": prompt.tokens, "text": prompt.text, **_next(result, i)}
            for i, prompt in enumerate(info.prompts)
        ],
    }


def _next(result: "ForwardResult", index: int) -> dict[str, Any]:
    """Return the likeliest next token of a prompt and its probability, where the run has logits."""
    run = result.run
    if not run.has_logits:
        return {}
    last = run.logits(run.prompts[index])[-1].double().softmax(dim=-1)
    return {"next_token": int(last.argmax()), "next_probability": round(float(last.max()), 6)}
