"""The difference of two checkpoints as text that fits a screen, and as Markdown."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from nvfp4check.report.diff_folds import (
    CLASSES,
    COUNTED,
    config_words,
    fold_weights,
    largest,
    side_words,
    verdict,
)
from nvfp4check.report.fold import plural, size_text
from nvfp4check.report.validate_markdown import markdown
from nvfp4check.report.visible import visible

#: Rows of each table before `… and N more`. Together they fit a screen.
SHOWN_FOLDS = 12
SHOWN_SETTINGS = 8
SHOWN_LARGEST = 10
_SAID = 90


@dataclass(frozen=True, slots=True)
class _Style:
    heading: Callable[[str], str]
    safe: Callable[..., str]
    table: str


_TEXT = _Style(str, visible, "plain")
_MARKDOWN = _Style(lambda words: f"### {words}\n", markdown, "pipe")


def diff_text(document: Mapping[str, Any], *, color: bool = False) -> str:
    """Return a difference as text."""
    word, said = verdict(document)
    tone = "31" if word == "DIFFERENT" else "33" if word == "INCOMPLETE" else "32"
    shown = f"\x1b[1;{tone}m{word}\x1b[0m" if color else word
    return "\n".join((f"{shown}: {said}", "", *_lines(document, _TEXT))) + "\n"


def diff_markdown(document: Mapping[str, Any]) -> str:
    """Return a difference as Markdown, for a pull request."""
    word, said = verdict(document)
    return "\n".join((f"## {word}: {said}", "", *_lines(document, _MARKDOWN))) + "\n"


def _lines(document: Mapping[str, Any], style: _Style) -> Iterator[str]:
    rows = [
        [
            name,
            style.safe(document[name]["location"]),
            size_text(document[name]["bytes"]),
            style.safe(side_words(document[name])),
        ]
        for name in ("a", "b")
    ]
    yield _table(rows, ["", "checkpoint", "size", "what it is"], style)
    yield ""
    if document["config"]:
        yield from _settings(document["config"], style)
    summary = document["summary"]
    counts = [
        f"{summary[name]:,} {name}" for name in (*COUNTED, *reversed(CLASSES)) if name in summary
    ]
    yield style.heading("Weights: " + ", ".join(dict.fromkeys(counts)))
    for text in document["patterns"]:
        yield f"  {style.safe(text)}" if style is _TEXT else f"- {style.safe(text)}"
    folds = fold_weights(document["weights"], SHOWN_FOLDS)
    if folds:
        shown = [
            [
                fold.cls,
                style.safe(fold.kind),
                fold.where,
                f"{fold.count:,}",
                fold.formats,
                fold.sqnr,
                style.safe(fold.said or ("beyond rounding" if fold.beyond else ""), _SAID),
            ]
            for fold in folds[:SHOWN_FOLDS]
        ]
        headers = ["class", "kind", "layers", "count", "format", "SQNR", "because"]
        yield _table(shown, headers, style)
        if len(folds) > SHOWN_FOLDS:
            rest = sum(fold.count for fold in folds[SHOWN_FOLDS:])
            yield f"… and {plural(len(folds) - SHOWN_FOLDS, 'row')} more ({plural(rest, 'weight')})"
        yield ""
    top = largest(document["weights"], SHOWN_LARGEST)
    if top:
        weighted = any(weight["weighted"] for weight in top)
        by = "weighed by the recorded inputs" if weighted else "for inputs of equal strength"
        yield style.heading(f"Largest predicted error of a linear's output, {by}")
        yield _table([_largest_row(weight, style) for weight in top], _LARGEST, style)
        yield ""
    yield from _rest(document, style)


_LARGEST = ["error", "weight", "SQNR", "changed codes", "changed scales", "worst element"]


def _largest_row(weight: Mapping[str, Any], style: _Style) -> list[str]:
    worst = weight["worst"]
    at = ""
    if worst is not None:
        at = f"[{worst['row']}, {worst['column']}]: {_number(worst['a'])} -> {_number(worst['b'])}"
    return [
        f"{weight['relative_error']:.2%}",
        style.safe(weight["name"]),
        "" if weight["sqnr_db"] is None else f"{weight['sqnr_db']:.1f} dB",
        _share(weight["changed_codes"], weight["elements"]),
        "" if weight["changed_scales"] is None else f"{weight['changed_scales']:,}",
        at,
    ]


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _share(count: int | None, total: int) -> str:
    return "" if count is None or not total else f"{count / total:.1%}"


def _settings(settings: list[Mapping[str, Any]], style: _Style) -> Iterator[str]:
    verb = "differs" if len(settings) == 1 else "differ"
    yield style.heading(f"{plural(len(settings), 'setting')} {verb}")
    rows = []
    for setting in settings[:SHOWN_SETTINGS]:
        place, change = config_words(setting)
        rows.append([setting["matters"], style.safe(place), style.safe(change, 90)])
    yield _table(rows, ["matters to", "setting", "a -> b"], style)
    if len(settings) > SHOWN_SETTINGS:
        yield f"… and {plural(len(settings) - SHOWN_SETTINGS, 'setting')} more"
    yield ""


def _rest(document: Mapping[str, Any], style: _Style) -> Iterator[str]:
    if document["level"] == "headers":
        yield "Headers and JSON only: no byte of a weight was compared."
    else:
        yield f"{size_text(document['bytes_read'])} compared in {document['seconds']:.1f} s."
    sample = document["sample"]
    if sample:
        missed = ", ".join(
            f"{entry['differing_groups']:,}: {entry['probability']:.1%}"
            for entry in sample["missed"]
        )
        yield (
            f"A sample: {sample['groups_read']:,} of {plural(sample['groups'], 'module')}. "
            f"Probability of having missed all of so many that differ: {missed}."
        )
    for gap in document["skipped"][:SHOWN_SETTINGS]:
        yield f"Not compared: {style.safe(gap['what'])}: {style.safe(gap['why'], 120)}"
    if len(document["skipped"]) > SHOWN_SETTINGS:
        yield f"… and {len(document['skipped']) - SHOWN_SETTINGS:,} more not compared"


def _table(rows: list[list[str]], headers: list[str], style: _Style) -> str:
    return tabulate(rows, headers=headers, tablefmt=style.table, disable_numparse=True)
