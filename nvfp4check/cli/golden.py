"""`nvfp4check golden record / verify`: keep a run as a golden; hold a run against one."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nvfp4check
from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import OutputOption, PlainFormatOption, prepared_format, write
from nvfp4check.report.render import render

if TYPE_CHECKING:
    from nvfp4check.goldens import Comparison

app = make_app(group="Keep a run as a golden; check a run, or a fresh one, against it.")


class Close(StrEnum):
    """How close a run has to come."""

    BITS = "bits"
    FLOAT32 = "float32"


GoldenArgument = Annotated[
    Path, typer.Argument(metavar="GOLDEN", help="The golden's directory.", show_default=False)
]


@command(
    app,
    examples=(
        'nvfp4check golden record run goldens/tiny --origin "release 1.2, H100"',
        "nvfp4check golden record run goldens/tiny --origin 'release 1.3' --replace",
    ),
)
def record(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run.", show_default=False)],
    golden: GoldenArgument,
    origin: Annotated[
        str, typer.Option(metavar="STR", help="Who made it, from what.", show_default=False)
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of a golden that differs.")
    ] = False,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Keep a run as a golden, with its origin and sha256 in MANIFEST.json.

    The exit code is 0 only if the golden held the same bytes already: what is recorded now has not
    been checked by anyone, and must not pass in the step that records it.
    """
    into = prepared_format(format, output)
    from nvfp4check import goldens

    comparison = goldens.record(run, golden, origin, replace=replace)
    write(render(_document("record", comparison), into), output)
    return ExitCode.HOLDS if comparison.holds else ExitCode.DOES_NOT_HOLD


@command(
    app,
    examples=(
        "nvfp4check golden verify goldens/tiny",
        "nvfp4check golden verify goldens/tiny --run run",
        "nvfp4check golden verify goldens/tiny --checkpoint ./model --close float32",
        "nvfp4check golden verify goldens/single --checkpoint ./model --inputs reference",
    ),
)
def verify(
    golden: GoldenArgument,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A run to hold against it.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT",
            help="Compute a fresh run, as the golden was made.",
            show_default=False,
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="The run that each layer of the golden began with (forward --inputs).",
            show_default=False,
        ),
    ] = None,
    close: Annotated[
        Close, typer.Option(help="bits, or within 2e-5 with equal expert sets.")
    ] = Close.BITS,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Check a golden against its manifest, and a run, or a fresh one, against the golden.

    Exit code 1: a file is missing, or something differs. 2: no golden is recorded there, so nothing
    could be checked.
    """
    into = prepared_format(format, output)
    from nvfp4check import goldens

    comparison = goldens.verify(golden, run, checkpoint, goldens.Closeness(close.value), inputs)
    write(render(_document("verify", comparison), into), output)
    return ExitCode.HOLDS if comparison.holds else ExitCode.DOES_NOT_HOLD


def _document(action: str, comparison: "Comparison") -> dict[str, Any]:
    return {
        "schema": "nvfp4check/golden/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "action": action,
        "golden": comparison.golden,
        "verdict": "pass" if comparison.holds else "fail",
        "compared": comparison.compared,
        "differences": [
            {"file": d.file, "tensor": d.tensor or None, "message": d.message}
            for d in comparison.differences
        ],
    }
