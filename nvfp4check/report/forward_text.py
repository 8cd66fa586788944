"""A forward run in a few lines: where it lies, what it cost, and what each prompt leads to."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from nvfp4check.report.fold import size_text
from nvfp4check.report.visible import visible

PROMPT_HEADERS = ("prompt", "tokens", "next token", "probability", "text")


def forward_text(document: Mapping[str, Any], table_format: str = "simple") -> str:
    """Return the document as text, or with another tabulate format as markdown."""
    plain = "plain" if table_format == "simple" else table_format
    facts = tabulate(forward_facts(document), tablefmt=plain, disable_numparse=True)
    prompts = tabulate(
        forward_rows(document),
        headers=PROMPT_HEADERS,
        tablefmt=table_format,
        disable_numparse=True,
        colalign=("left", "right", "right", "right", "left"),
    )
    return f"{facts}\n\n{prompts}\n"


def forward_facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the run was and cost, as names and values fit to show."""
    first, stop = document["layers"]
    mtp = document.get("mtp", 0)
    layers = f"{first} to {stop - 1}" + (f" and {mtp} of multi-token prediction" if mtp else "")
    facts = [
        ("checkpoint", str(document["checkpoint"].get("location"))),
        ("run", document["run"]),
        ("arithmetic", f"{document['mode']}, KV cache {document['kv_cache']}, {document['dtype']}"),
        ("layers", f"{layers}, {document['layers_computed']} computed by this call"),
        ("read", f"{size_text(document['bytes_read'])} in {document['seconds']:.1f} s"),
    ]
    spent = ", ".join(f"{k} {v:.1f} s" for k, v in document["seconds_by_work"].items())
    if spent:
        facts.append(("time", f"{spent} (read runs beside the rest)"))
    return [(name, visible(value)) for name, value in facts]


def forward_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each prompt."""
    return [
        (
            visible(prompt["id"], limit=30),
            str(prompt["tokens"]),
            str(prompt.get("next_token", "")),
            str(prompt.get("next_probability", "")),
            visible(prompt["text"] or "", limit=50),
        )
        for prompt in document["prompts"]
    ]
