"""`nvfp4check synth CONFIG OUT`: a synthetic checkpoint of any size."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import seed_option, write
from nvfp4check.cli.progress import progress_bar
from nvfp4check.findings import CheckError

app = make_app()


class FormatName(StrEnum):
    """In which form the weights are stored."""

    NVFP4 = "nvfp4"
    FP8 = "fp8"
    BF16 = "bf16"


@command(
    app,
    examples=(
        "nvfp4check synth ./DeepSeek-V3.1/config.json ./layout --sparse --format nvfp4",
        "nvfp4check synth ./DeepSeek-V3.1 ./small --layers 4 --experts 16 --format nvfp4",
        "nvfp4check synth ./DeepSeek-V3.1 ./small-fp8 --layers 4 --experts 16 --format fp8",
    ),
)
def synth(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG",
            help="A config.json, or the directory that holds one.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A new or empty directory.", show_default=False),
    ],
    sparse: Annotated[
        bool,
        typer.Option("--sparse", help="Real headers, and holes for data: no disk space."),
    ] = False,
    layers: Annotated[
        int | None,
        typer.Option(metavar="N", help="So many layers, MTP aside.", show_default=False),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(metavar="N", help="So many routed experts a layer.", show_default=False),
    ] = None,
    format: Annotated[
        FormatName | None,
        typer.Option(
            "--format",
            help="How weights are stored. [default: as CONFIG says]",
            show_default=False,
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="So many files. [default: 2.5 GB each]", show_default=False
        ),
    ] = None,
    seed: Annotated[int, seed_option("Which weights.")] = 0,
    convention: Annotated[
        str, typer.Option(metavar="NAME", help="Whose arithmetic quantises to NVFP4.")
    ] = "modelopt",
) -> int:
    """Make a checkpoint from a configuration: plausible weights, or headers alone.

    The same seed gives the same weights in each format: nvfp4 is made from fp8, and bf16 is fp8
    dequantised, so each can be the other's base.
    """
    from nvfp4check.checkpoint.synth import synthesize
    from nvfp4check.checkpoint.synth_config import SynthFormat, make_config, read_config
    from nvfp4check.checkpoint.synth_values import Values
    from nvfp4ref.conventions import Convention

    if convention not in {known.value for known in Convention}:
        raise CheckError(
            f"no convention {convention!r}; choose among {', '.join(c.value for c in Convention)}"
        )
    given, hf_quant_config = read_config(config)
    made = make_config(
        given,
        hf_quant_config,
        layers=layers,
        experts=experts,
        format=None if format is None else SynthFormat(format.value),
    )
    values = None if sparse else Values(seed, Convention(convention))
    with progress_bar("Writing", in_bytes=True) as bar:
        report = synthesize(
            made.config,
            made.hf_quant_config,
            made.quantization,
            target,
            shards,
            values=values,
            generation_config=made.generation_config,
            progress=bar,
        )
    holes = ", all of it holes" if sparse else ""
    write(
        f"{report.directory}: {report.tensors:,} tensors in {report.shards:,} "
        f"{'shard' if report.shards == 1 else 'shards'}, {report.nbytes:,} bytes of data{holes}\n",
        None,
    )
    return ExitCode.HOLDS
