"""An agreement as text for a terminal, and as Markdown for a model card."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from nvfp4check.report import agree_points as points
from nvfp4check.report import agree_rows as table
from nvfp4check.report import agree_words as words
from nvfp4check.report.validate_markdown import markdown

#: What the mark in the table of layers means.
MARK = (
    "* beyond its bound, or else the noise floor; for flips, beyond the error of the scores. err / "
    "bound: the largest at any point of the layer"
)
SHARES = (
    "came in, attention, mlp: share of the error of hidden that the layer was given, and that each "
    "block added"
)


def agree_text(document: Mapping[str, Any]) -> str:
    """Return the document as text."""
    return "\n".join(_text(document)) + "\n"


def _text(document: Mapping[str, Any]) -> Iterator[str]:
    yield words.heading(document)
    yield _table(words.run_rows(document), (), "plain")
    yield ""
    yield from words.criteria_sentences(document)
    yield from _findings(document)
    yield from words.problem_sentences(document)
    for name, headers, rows in tables(document):
        if rows:
            yield ""
            yield name
            yield _table(rows, headers, "simple")
    if document["layers"]:
        yield MARK
        yield SHARES
    if (layer := points.parting_layer(document)) is not None:
        yield ""
        yield f"Layer {layer}, where they part"
        yield _table(points.point_rows(document, layer), points.POINT_HEADERS, "simple")
        yield points.POINT_LEGEND
    if document["logits"]:
        yield ""
        yield from words.logit_notes(document)
    blind = list(words.blind_sentences(document))
    if blind:
        yield ""
        yield "These prompts cannot see:"
        yield from (f"  {sentence}" for sentence in blind)


def agree_markdown(document: Mapping[str, Any]) -> str:
    """Return the document as Markdown."""
    return "\n".join(_markdown(document)) + "\n"


def _markdown(document: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {document['verdict'].upper()}: {markdown(words.title(document))}"
    yield ""
    said = [
        *words.criteria_sentences(document),
        *_findings(document),
        *words.problem_sentences(document),
    ]
    yield from (f"- {markdown(sentence)}" for sentence in said)
    for name, headers, rows in tables(document):
        if rows:
            yield ""
            yield f"### {name}"
            yield ""
            yield _table([tuple(map(markdown, row)) for row in rows], headers, "pipe")
    if document["layers"]:
        yield ""
        yield f"{markdown(MARK)}. {SHARES}."
    if (layer := points.parting_layer(document)) is not None:
        yield ""
        yield f"### Layer {layer}, where they part"
        yield ""
        rows = [tuple(map(markdown, row)) for row in points.point_rows(document, layer)]
        yield _table(rows, points.POINT_HEADERS, "pipe")
        yield ""
        yield f"{points.POINT_LEGEND}."
    if document["logits"]:
        yield ""
        yield from map(markdown, words.logit_notes(document))
    blind = list(words.blind_sentences(document))
    if blind:
        yield ""
        yield "### What these prompts cannot see"
        yield ""
        yield from (f"- {markdown(sentence)}" for sentence in blind)


def _findings(document: Mapping[str, Any]) -> Iterator[str]:
    """Say where the runs part, how routing differs, and which candidate is nearer."""
    sentences = (
        words.divergence_sentence(document),
        words.routing_sentence(document),
        words.bounds_sentence(document),
        words.cache_sentence(document),
        words.split_sentence(document),
        words.versus_sentence(document),
    )
    yield from (sentence for sentence in sentences if sentence)


def tables(
    document: Mapping[str, Any],
) -> Iterator[tuple[str, Sequence[str], Sequence[words.Row]]]:
    """Return each table: its name, headers and rows."""
    if document["logits"]:
        shown = None if document["noise"] else -1  # no column for what is not there
        rows = [row[:shown] for row in table.logit_rows(document)]
        yield "Logits", table.LOGIT_HEADERS[:shown], rows
        yield "Logits by confidence", table.BUCKET_HEADERS, table.bucket_rows(document)
        yield "Worst positions", table.WORST_HEADERS, table.worst_rows(document)
    yield "Layers: relative error", table.LAYER_HEADERS, table.layer_rows(document)
    yield "Choices of experts that differ", table.FLIP_HEADERS, table.flip_rows(document)


def _table(rows: Sequence[words.Row], headers: Sequence[str], form: str) -> str:
    return tabulate(rows, headers=list(headers), tablefmt=form, disable_numparse=True)
