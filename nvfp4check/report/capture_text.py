"""A capture from a server in a few lines."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from nvfp4check.report.visible import visible


def capture_text(document: Mapping[str, Any], table_format: str = "plain") -> str:
    """Return the document as text, or with another tabulate format as Markdown."""
    prompts = document["prompts"]
    tokens = sum(prompt["tokens"] for prompt in prompts)
    rows = [
        ("run", document["run"]),
        ("server", f"{document['server']}, {document['base_url']}, model {document['model']}"),
        ("prompts", f"{len(prompts):,} of {tokens:,} tokens, {document['asked']:,} asked now"),
        ("kept", document["logits"]),
    ]
    shown = [(name, visible(value)) for name, value in rows]
    return tabulate(shown, tablefmt=table_format, disable_numparse=True) + "\n"
