"""`nvfp4check rules [ID]`: every rule of validate, or some of them explained."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

import nvfp4check
from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import (
    OutputOption,
    PlainFormatOption,
    line_width,
    prepared_format,
    split_ids,
    write,
)
from nvfp4check.findings import CheckError
from nvfp4check.report.render import Extras, render

if TYPE_CHECKING:
    from nvfp4check.checkpoint.rules.base import Rule

app = make_app()


@command(
    app,
    examples=(
        "nvfp4check rules",
        "nvfp4check rules NV602",
        "nvfp4check rules NV2 --format markdown",
    ),
)
def rules(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="ID", help="Rules, or the beginning of their ids."),
    ] = None,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """List every rule, or explain some: what, why, which public incident, how to repair."""
    into = prepared_format(format, output)
    document = rules_document(split_ids(ids))
    write(render(document, into, Extras(width=line_width(output))), output)
    return ExitCode.HOLDS


def rules_document(ids: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the rules whose ids begin with one of `ids`, or all, as a JSON document.

    Raises:
        CheckError: One of the ids fits no rule.
    """
    from nvfp4check.checkpoint.rules import RULES

    require_rules(ids)
    return {
        "schema": "nvfp4check/rules/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "explained": bool(ids),
        "rules": [
            _record(rule)
            for identifier, rule in sorted(RULES.items())
            if not ids or identifier.startswith(ids)
        ],
    }


def require_rules(ids: tuple[str, ...]) -> None:
    """Check that each id is one of a rule, or the beginning of one.

    Raises:
        CheckError: One is not; the message names those that come near.
    """
    from nvfp4check.checkpoint.rules import RULES

    for prefix in ids:
        if not any(identifier.startswith(prefix) for identifier in RULES):
            raise CheckError(_unknown_rule(prefix, RULES))


def _unknown_rule(prefix: str, known: "dict[str, Rule]") -> str:
    from difflib import get_close_matches

    names = {rule.name.upper(): rule.id for rule in known.values()}
    close = get_close_matches(prefix, [*known, *names], n=3)
    hint = ", ".join(dict.fromkeys(names.get(match, match) for match in close))
    meant = f" Did you mean {hint}?" if hint else ""
    return f"no rule begins with {prefix!r}.{meant} `nvfp4check rules` lists every rule."


def _record(rule: "Rule") -> dict[str, Any]:
    return {
        "id": rule.id,
        "name": rule.name,
        "severity": rule.severity.value,
        "level": rule.level.value,
        "fires_when": rule.fires_when,
        "why": rule.why,
        "incidents": list(rule.incidents),
        "repair": rule.repair,
    }
