"""The differences of two checkpoints folded by kind of weight, for people to read.

A row is a class, a kind of weight (`mlp.experts.*.down_proj`), both formats and what is said of it;
the layers are given as ranges.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nvfp4check.report.fold import kind_of, plural
from nvfp4check.report.visible import value_text

#: A weight as it stands in the JSON document.
WeightRecord = Mapping[str, Any]

#: Classes in the order of gravity, the gravest first.
CLASSES = (
    "different",
    "shape-changed",
    "only-in-a",
    "only-in-b",
    "format-changed",
    "scales-only",
    "requantized",
    "input-scale-only",
    "same-form",
    "same-values",
    "identical",
)
#: Classes of weights that are only counted.
COUNTED = ("identical", "same-values", "same-form")

_IN_A_LAYER = re.compile(r"^(?:.*\.)?layers\.(\d{1,6})\.(.+)$", re.DOTALL)
_NAME = re.compile(r"\S*\.\S+\.\S+")
_NUMBER = re.compile(r"\d[\d,.e+-]*")


@dataclass(slots=True)
class Fold:
    """Weights that differ in one way."""

    cls: str
    kind: str
    formats: str
    said: str
    layers: set[int] = field(default_factory=set)
    count: int = 0
    beyond: int = 0
    worst_sqnr: float | None = None
    best_sqnr: float | None = None
    error: float | None = None

    def add(self, weight: WeightRecord, layer: int | None) -> None:
        """Count a weight."""
        self.count += 1
        self.beyond += weight["bound_holds"] is False
        if layer is not None:
            self.layers.add(layer)
        sqnr, error = weight["sqnr_db"], weight["relative_error"]
        if sqnr is not None:
            self.worst_sqnr = sqnr if self.worst_sqnr is None else min(self.worst_sqnr, sqnr)
            self.best_sqnr = sqnr if self.best_sqnr is None else max(self.best_sqnr, sqnr)
        if error is not None:
            self.error = error if self.error is None else max(self.error, error)

    @property
    def where(self) -> str:
        """The layers, as ranges."""
        return ranges(self.layers)

    @property
    def sqnr(self) -> str:
        """The range of SQNR, or nothing."""
        if self.worst_sqnr is None or self.best_sqnr is None:
            return ""
        low, high = f"{self.worst_sqnr:.1f}", f"{self.best_sqnr:.1f}"
        return f"{low} dB" if low == high else f"{low} to {high} dB"


def placed(name: str) -> tuple[int | None, str]:
    """Return the layer of a weight, and its kind without it."""
    found = _IN_A_LAYER.match(name)
    if found is None:
        return None, kind_of(name).removesuffix(".weight")
    return int(found[1]), kind_of(f".{found[2]}")[1:].removesuffix(".weight")


def fold_weights(weights: Iterable[WeightRecord], most: int | None = None) -> list[Fold]:
    """Fold everything that is not only counted, the gravest class first.

    Where there are more than `most` rows, kinds of which the same is said share one.
    """
    folds: dict[tuple[str, str, str, str], Fold] = {}
    for weight in weights:
        if weight["class"] in COUNTED:
            continue
        layer, kind = placed(weight["name"])
        said = weight["diagnosis"] or ""
        formats = _formats(weight)
        key = (weight["class"], kind, formats, _NUMBER.sub("#", _NAME.sub("*", said)))
        fold = folds.setdefault(key, Fold(weight["class"], kind, formats, said))
        if fold.said != said:
            fold.said = _NUMBER.sub("…", _NAME.sub("another", said))
        fold.add(weight, layer)
    rows = list(folds.values())
    if most is not None and len(rows) > most:
        rows = _merged(rows)
    order = {name: place for place, name in enumerate(CLASSES)}
    return sorted(
        rows,
        key=lambda fold: (order.get(fold.cls, 0), -fold.beyond, -(fold.error or 0.0), fold.kind),
    )


def _merged(folds: list[Fold]) -> list[Fold]:
    groups: dict[tuple[str, ...], list[Fold]] = {}
    for fold in folds:
        one_sided = fold.cls in ("only-in-a", "only-in-b")
        same = (ranges(fold.layers),) if one_sided else (fold.formats, fold.said)
        groups.setdefault((fold.cls, *same), []).append(fold)
    return [_joined(group) for group in groups.values()]


def _joined(group: list[Fold]) -> Fold:
    """Make one row of several kinds, named by the one with most weights."""
    first = max(group, key=lambda fold: fold.count)
    if len(group) == 1:
        return first
    low = [fold.worst_sqnr for fold in group if fold.worst_sqnr is not None]
    high = [fold.best_sqnr for fold in group if fold.best_sqnr is not None]
    return Fold(
        first.cls,
        f"{first.kind} and {plural(len(group) - 1, 'kind')} more",
        ", ".join(sorted({fold.formats for fold in group})),
        first.said,
        set().union(*(fold.layers for fold in group)),
        sum(fold.count for fold in group),
        sum(fold.beyond for fold in group),
        min(low, default=None),
        max(high, default=None),
        max((fold.error for fold in group if fold.error is not None), default=None),
    )


def _formats(weight: WeightRecord) -> str:
    one, two = weight["formats"]
    if one is None or two is None:
        return one or two or ""
    return one if one == two else f"{one} -> {two}"


def largest(weights: Iterable[WeightRecord], count: int) -> list[WeightRecord]:
    """Choose the weights with the largest predicted error of their output."""
    differing = [weight for weight in weights if weight["relative_error"]]
    differing.sort(key=lambda weight: (-weight["relative_error"], weight["name"]))
    return differing[:count]


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as `0, 3-60`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][-1:] = [number] if len(runs[-1]) > 1 else [runs[-1][-1], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def verdict(document: Mapping[str, Any]) -> tuple[str, str]:
    """Return the first word of a result, and what it is said of."""
    failing, summary = document["failing"], document["summary"]
    if failing["weights"] or failing["config"]:
        said = []
        if failing["weights"]:
            total = sum(summary.values())
            said.append(f"{failing['weights']:,} of {plural(total, 'weight')}")
        if failing["config"]:
            said.append(plural(failing["config"], "setting"))
        return "DIFFERENT", " and ".join(said)
    if document["skipped"]:
        count = len(document["skipped"])
        were = "was" if count == 1 else "were"
        return "INCOMPLETE", f"{plural(count, 'thing')} {were} not compared"
    changed = sum(count for cls, count in summary.items() if cls not in COUNTED)
    if changed:
        return (
            "WITHIN ROUNDING",
            f"{changed:,} of {plural(sum(summary.values()), 'weight')} made anew",
        )
    if document["config"]:
        count = len(document["config"])
        do = "differs that does" if count == 1 else "differ that do"
        return "SAME WEIGHTS", f"{plural(count, 'setting')} {do} not change what is computed"
    return "SAME", plural(sum(summary.values()), "weight")


def config_words(diff: Mapping[str, Any]) -> tuple[str, str]:
    """Return where a setting stands, and how it changed."""
    place = f"{diff['file']}: {diff['key']}" if diff["key"] else diff["file"]
    nothing = "none" if diff["matters"] == "files" or "wrong" in diff["key"] else "absent"
    one, two = (nothing if diff[side] is None else value_text(diff[side]) for side in ("a", "b"))
    return place, f"{one} -> {two}"


def side_words(side: Mapping[str, Any]) -> str:
    """Describe one of the checkpoints in a line."""
    formats = ", ".join(f"{count:,} {name}" for name, count in side["formats"].items())
    about = [side["architecture"] or "unknown architecture"]
    if side["producer"]:
        about.append(side["producer"])
    return f"{', '.join(about)}; {formats or 'no weight that can be read'}"
