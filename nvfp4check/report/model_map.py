"""The map of a model: its modules by layer, each with the worst that was found in it.

A row is a kind of module (`mlp.experts.*.down_proj`), a column a layer. Experts share one cell.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from nvfp4check.report.fold import SEVERITIES, FindingRecord, kind_of, plural

#: `<anything>.layers.<number>.<module>`: the form of every decoder checkpoint.
_IN_A_LAYER = re.compile(r"^(?:.*\.)?(?:layers|h|blocks)\.(\d{1,6})\.(.+)$", re.DOTALL)

#: More rows or columns than this are not drawn. A hostile name must not make an endless page.
_MOST_LAYERS = 512
_MOST_ROWS = 200


@dataclass(slots=True)
class Cell:
    """One kind of module in one layer."""

    format: str | None = None
    severity: str | None = None
    findings: int = 0

    def add(self, severity: str) -> None:
        """Count a finding; the gravest gives the cell its colour."""
        self.findings += 1
        known = (self.severity, severity) if self.severity else (severity,)
        self.severity = min(known, key=SEVERITIES.index)

    @property
    def tone(self) -> str:
        """The name of the cell's colour."""
        return self.severity or ("nvfp4" if self.format == "nvfp4" else "other")

    @property
    def says(self) -> str:
        """What the cell stands for, in words."""
        found = plural(self.findings, "finding") if self.findings else "nothing found"
        return f"{self.format or 'absent'}, {found}"


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring layers whose cells look the same."""

    start: int
    length: int
    tone: str
    title: str


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of module through all layers."""

    label: str
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class ModelMap:
    """The rows of modules in layers, the number of layers, and the modules outside of them."""

    layers: int
    rows: tuple[Row, ...]
    outside: tuple[tuple[str, Cell], ...]
    left_out: int


def model_map(weights: Mapping[str, str], findings: Iterable[FindingRecord]) -> ModelMap:
    """Return the map of the weights, given as name and format, and of what was found in them."""
    cells: dict[str, dict[int, Cell]] = {}
    outside: dict[str, Cell] = {}

    def cell_of(tensor: str) -> Cell:
        module = tensor.rpartition(".")[0] or tensor
        placed = _IN_A_LAYER.match(module)
        if placed is None or int(placed[1]) >= _MOST_LAYERS:
            return outside.setdefault(kind_of(module), Cell())
        row = cells.setdefault(kind_of(f".{placed[2]}")[1:], {})
        return row.setdefault(int(placed[1]), Cell())

    for name, stored_as in weights.items():
        cell = cell_of(name)
        # One quantised expert makes the cell quantised.
        if cell.format is None or stored_as == "nvfp4":
            cell.format = stored_as
    for finding in findings:
        if finding.get("tensor"):
            cell_of(finding["tensor"]).add(finding["severity"])

    layers = 1 + max((layer for row in cells.values() for layer in row), default=-1)
    rows = [Row(label, tuple(_runs(row, layers))) for label, row in sorted(cells.items())]
    listed = sorted(outside.items())
    return ModelMap(
        layers,
        tuple(rows[:_MOST_ROWS]),
        tuple(listed[:_MOST_ROWS]),
        max(0, len(rows) - _MOST_ROWS) + max(0, len(listed) - _MOST_ROWS),
    )


def _runs(row: Mapping[int, Cell], layers: int) -> Iterator[Run]:
    looks = [(row[i].tone, row[i].says) if i in row else None for i in range(layers)]
    for look, group in groupby(range(layers), key=lambda layer: looks[layer]):
        numbers = list(group)
        if look is None:
            continue
        first, last = numbers[0], numbers[-1]
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        yield Run(first, len(numbers), look[0], f"{where}: {look[1]}")
