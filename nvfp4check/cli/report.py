"""`nvfp4check report FILE…`: several results in one page."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

import nvfp4check
from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import (
    OutputOption,
    PlainFormat,
    PlainFormatOption,
    chosen_format,
    require_writable,
    write,
)
from nvfp4check.cli.rules import rules_document
from nvfp4check.findings import CheckError
from nvfp4check.report.render import Extras, kind_of_document, render

app = make_app()


@command(
    app,
    examples=(
        "nvfp4check report validate.json agree.json --output report.html",
        "nvfp4check report results/*.json --format markdown",
    ),
)
def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE…", help="Results written with --format json.", show_default=False
        ),
    ],
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Join results of validate, diff, kernels, agree and other commands, each with its sha256.

    Without --output or --format it is a page, one self-contained HTML file.
    """
    require_writable(output)
    inputs = [_input(file) for file in files]
    document = {
        "schema": "nvfp4check/report/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "inputs": inputs,
    }
    if format is None and output is None:
        format = PlainFormat.HTML
    extras = Extras(rules={rule["id"]: rule for rule in rules_document()["rules"]})
    write(render(document, chosen_format(format, output), extras), output)
    return ExitCode.HOLDS


def _input(file: Path) -> dict[str, Any]:
    try:
        data = file.read_bytes()
        document = json.loads(data)
    except (OSError, ValueError) as error:
        raise CheckError(f"{file}: cannot be read as a result: {error}") from error
    if not isinstance(document, dict):
        raise CheckError(f"{file}: is no result; give what a command wrote with --format json")
    try:
        kind = kind_of_document(document)
    except CheckError as error:
        raise CheckError(f"{file}: {error}") from error
    return {
        "file": str(file),
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "kind": kind,
        "verdict": document.get("verdict"),
        "document": document,
    }
