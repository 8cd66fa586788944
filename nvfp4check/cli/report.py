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
    prepared_format,
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
            metavar="FILE", help="Results written with --format json.", show_default=False
        ),
    ],
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Join results of validate, diff, kernels, agree and other commands, each with its sha256.

    Without --output or --format it is a page, one self-contained HTML file.
    """
    if format is None and output is None:
        format = PlainFormat.HTML
    into = prepared_format(format, output)
    inputs = [_input(file) for file in files]
    document = {
        "schema": "nvfp4check/report/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "inputs": inputs,
    }
    extras = Extras(rules={rule["id"]: rule for rule in rules_document()["rules"]})
    write(render(document, into, extras), output)
    return ExitCode.HOLDS


def _input(file: Path) -> dict[str, Any]:
    try:
        data = file.read_bytes()
        document = json.loads(data)
    except OSError as error:
        raise CheckError(
            f"{file}: cannot be read as a result: {error.strerror}; give files that commands wrote "
            "with --format json"
        ) from error
    except ValueError as error:
        raise CheckError(
            f"{file}: cannot be read as a result: it is no JSON ({error}); write it with --format "
            "json"
        ) from error
    if not isinstance(document, dict):
        raise CheckError(f"{file}: is no result; give what a command wrote with --format json")
    try:
        kind = kind_of_document(document)
    except CheckError as error:
        raise CheckError(f"{file}: {error}") from error
    verdict = document.get("verdict")
    if not str(document["schema"]).endswith("/1"):
        raise CheckError(
            f"{file}: schema {document['schema']!r} is of another version than nvfp4check "
            f"{nvfp4check.__version__} writes; join it with the version that wrote it"
        )
    if verdict is not None and not isinstance(verdict, str):
        raise CheckError(f"{file}: verdict {verdict!r} is no text; write the result again")
    return {
        "file": str(file),
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "kind": kind,
        "verdict": verdict,
        "document": document,
    }
