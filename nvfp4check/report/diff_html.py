"""The difference of two checkpoints as one HTML page, with its profile over the layers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nvfp4check.report.diff_folds import (
    COUNTED,
    WeightRecord,
    config_words,
    fold_weights,
    largest,
    placed,
    side_words,
    verdict,
)
from nvfp4check.report.page import render_page

#: Rows of each table of the page; the JSON document holds them all.
_MOST_FOLDS = 200
_MOST_LARGEST = 40
#: A hostile name must not make an endless page.
_MOST_LAYERS = 512
_MOST_KINDS = 60
#: Errors that a full bar may stand for.
_FULL = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_TONES = {
    "different": "error",
    "shape-changed": "error",
    "only-in-a": "error",
    "only-in-b": "error",
    "format-changed": "info",
    "scales-only": "warning",
    "requantized": "nvfp4",
    "input-scale-only": "warning",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """The worst weight of one kind in one layer, as a bar of a height in per cent."""

    layer: int
    height: float
    tone: str
    title: str


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of weight through the layers."""

    kind: str
    bars: tuple[Bar, ...]
    worst: float


def diff_html(document: Mapping[str, Any]) -> str:
    """Return the page of one comparison."""
    word, said = verdict(document)
    tones = {"DIFFERENT": "fail", "INCOMPLETE": "incomplete"}
    folds = fold_weights(document["weights"])
    layers, full, profiles = profiles_of(document["weights"])
    return render_page(
        "diff.html.j2",
        document=document,
        word=word,
        said=said,
        tone=tones.get(word, "pass"),
        sides=[(name, document[name], side_words(document[name])) for name in ("a", "b")],
        settings=[(diff["matters"], *config_words(diff)) for diff in document["config"]],
        folds=folds[:_MOST_FOLDS],
        left_out=max(0, len(folds) - _MOST_FOLDS),
        top=largest(document["weights"], _MOST_LARGEST),
        tones=_TONES,
        layers=layers,
        full=f"{100 * full:g} %",
        profiles=profiles,
    )


def profiles_of(weights: list[WeightRecord]) -> tuple[int, float, list[Profile]]:
    """Return the number of layers, the error of a full bar, and every kind that differs in one."""
    cells: dict[str, dict[int, WeightRecord]] = {}
    for weight in weights:
        layer, kind = placed(weight["name"])
        if layer is None or layer >= _MOST_LAYERS:
            continue
        row = cells.setdefault(kind, {})
        known = row.get(layer)
        if known is None or _height(weight) > _height(known):
            row[layer] = weight
    layers = 1 + max((layer for row in cells.values() for layer in row), default=-1)
    worst = max((_height(weight) for row in cells.values() for weight in row.values()), default=0)
    full = next((mark for mark in _FULL if worst <= mark), 1.0)
    profiles = [
        Profile(kind, tuple(_bars(row, full)), max(map(_height, row.values())))
        for kind, row in cells.items()
        if any(weight["class"] not in COUNTED for weight in row.values())
    ]
    profiles.sort(key=lambda profile: (-profile.worst, profile.kind))
    return layers, full, profiles[:_MOST_KINDS]


def _height(weight: WeightRecord) -> float:
    """Relative error up to 1; 1 where there is nothing to compare."""
    error = weight["relative_error"]
    if error is None:
        return 0.0 if weight["class"] in COUNTED else 1.0
    return float(min(1.0, error))


def _bars(row: Mapping[int, WeightRecord], full: float) -> Iterator[Bar]:
    for layer, weight in sorted(row.items()):
        if weight["class"] in COUNTED:
            continue
        error = weight["relative_error"]
        shown = "not compared" if error is None else f"error {error:.2%}"
        title = f"layer {layer}: {weight['class']}, {shown}"
        if weight["diagnosis"]:
            title += f", {weight['diagnosis']}"
        tone = "error" if weight["bound_holds"] is False else _TONES.get(weight["class"], "other")
        yield Bar(layer, max(4.0, 100 * _height(weight) / full), tone, title)
