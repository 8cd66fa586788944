"""The rules of validate, listed or explained, as text and as Markdown."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from tabulate import tabulate

from nvfp4check.report.validate_markdown import markdown, table

#: Characters that the columns before the last take.
_COLUMNS_BEFORE = 46


def rules_text(document: Mapping[str, Any], *, width: int = 100) -> str:
    """Return a table of the rules, or each rule explained where some were asked for."""
    rules = document["rules"]
    if document["explained"]:
        return "\n\n".join("\n".join(_explain(rule, width)) for rule in rules) + "\n"
    rows = [[rule["id"], rule["name"], rule["severity"], rule["fires_when"]] for rule in rules]
    last = max(20, width - _COLUMNS_BEFORE)
    listing = tabulate(
        rows,
        headers=["id", "name", "severity", "fires when"],
        maxcolwidths=[None, None, None, last],
    )
    return f"{listing}\n\nOne rule explained: nvfp4check rules {rules[0]['id']}\n"


def _explain(rule: Mapping[str, Any], width: int) -> Iterator[str]:
    yield f"{rule['id']} {rule['name']} ({rule['severity']}, --level {rule['level']})"
    for label, text in (
        ("Fires when", rule["fires_when"]),
        ("Why", rule["why"]),
        ("Repair", rule["repair"]),
    ):
        yield ""
        yield textwrap.fill(
            f"{label}: {text}",
            width,
            initial_indent="  ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    if rule["incidents"]:
        yield ""
        yield "  Seen in public:"
        yield from (f"    {url}" for url in rule["incidents"])


def rules_markdown(document: Mapping[str, Any]) -> str:
    """Return the rules as Markdown: a table, or a section for each that was asked for."""
    rules = document["rules"]
    if document["explained"]:
        return "\n".join(line for rule in rules for line in _explain_markdown(rule)) + "\n"
    rows = [
        [rule["id"], markdown(rule["name"]), rule["severity"], markdown(rule["fires_when"])]
        for rule in rules
    ]
    return table(rows, ["id", "name", "severity", "fires when"]) + "\n"


def _explain_markdown(rule: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {rule['id']} {markdown(rule['name'])}"
    yield ""
    yield f"{rule['severity'].capitalize()}, at level {rule['level']}."
    for label in ("fires_when", "why", "repair"):
        yield ""
        yield f"**{label.replace('_', ' ').capitalize()}.** {markdown(rule[label])}"
    if rule["incidents"]:
        yield ""
        yield from (f"- <{url}>" for url in rule["incidents"])
    yield ""
