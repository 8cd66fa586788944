"""Weights that are not the base tensor of their name: named, where they are another's.

Looked for, in this order: another weight of the base as it is; one with nibbles swapped or negated;
the own one with its columns' halves swapped, or transposed; rows of the own one, of the linears it
is fused with, and of those that some chunk points to, in another order.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nvfp4check.checkpoint.audit.patterns import fused_with
from nvfp4check.checkpoint.audit.results import Foreign
from nvfp4check.checkpoint.audit.signs import (
    Register,
    Signs,
    agree,
    can_be_read,
    chunk_places,
    chunks_of,
    row_heads,
    signs_of,
)
from nvfp4check.checkpoint.audit.sources import Reader, matrix_shape
from nvfp4check.checkpoint.naming import LogicalWeight
from nvfp4check.checkpoint.opening import Checkpoint


def name_foreign(
    checkpoint: Checkpoint, base: Checkpoint, names: Sequence[str]
) -> dict[str, Foreign]:
    """Find out what each of these weights is.

    Raises:
        StorageError: Bytes cannot be read.
    """
    if not names:
        return {}
    weights = [checkpoint.weights[name] for name in names]
    shapes = {weight.shape for weight in weights}
    known = [w for w in base.weights.values() if w.shape in shapes and can_be_read(w)]
    register = Register(Reader(base), known)
    search = _Search(Reader(checkpoint), Reader(base), register, base)
    return {weight.name: search.name(weight) for weight in weights}


@dataclass(frozen=True, slots=True)
class _Search:
    reader: Reader
    base_reader: Reader
    register: Register
    base: Checkpoint

    def name(self, weight: LogicalWeight) -> Foreign:
        if not can_be_read(weight):
            return Foreign(weight=weight.name, holds=None, how="it was not searched for")
        chunks = chunks_of(self.reader, weight)
        holds = self.register.find(weight.shape, chunks)
        if holds is not None and holds != weight.name:
            return Foreign(weight=weight.name, holds=holds, how=f"it is the base's {holds}")
        for change, what in _IN_PLACE:
            holds = self.register.find(weight.shape, [change(chunk) for chunk in chunks])
            if holds is not None:
                whose = "" if holds == weight.name else f" {holds},"
                return Foreign(
                    weight=weight.name, holds=holds, how=f"it is the base's{whose} {what}"
                )
        own = self.base.weights[weight.name]
        for elsewhere, what in _ELSEWHERE:
            others = elsewhere(self.base_reader, own)
            if others is not None and agree(chunks, others):
                return Foreign(weight=weight.name, holds=own.name, how=f"it is the base's {what}")
        return self._by_rows(weight, self.register.votes(weight.shape, chunks))

    def _by_rows(self, weight: LogicalWeight, votes: Counter[str]) -> Foreign:
        """Look each row up among those of likely tensors."""
        names = dict.fromkeys((weight.name, *fused_with(weight.name), *votes))
        places: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
        for name in names:
            other = self.base.weights.get(name)
            if other is not None and other.shape[1:] == weight.shape[1:] and can_be_read(other):
                for row, head in enumerate(row_heads(self.base_reader, other)):
                    places[head].append((name, row))
        rows = [
            _place(places, head, weight.name, row)
            for row, head in enumerate(row_heads(self.reader, weight))
        ]
        found = [place for place in rows if place is not None]
        if 2 * len(found) <= len(rows):
            return Foreign(
                weight=weight.name,
                holds=None,
                how="it is none of the base's weights of this shape, nor one transformed",
            )
        holders = Counter(name for name, _ in found)
        if set(holders) == {weight.name}:
            order = [place[1] if place else -1 for place in rows]
            if all(source in (-1, row) for row, source in enumerate(order)):
                how = "the heads of its rows are the base's, and not all of what follows them is"
                return Foreign(weight=weight.name, holds=None, how=how)
            return Foreign(
                weight=weight.name, holds=weight.name, how=f"it is the base's {_order(order)}"
            )
        others = {name: n for name, n in holders.most_common() if name != weight.name}
        shown = ", ".join(f"{n:,} are {name}'s" for name, n in others.items())
        return Foreign(
            weight=weight.name, holds=next(iter(others)), how=f"of its {len(rows):,} rows {shown}"
        )


def _place(
    places: dict[bytes, list[tuple[str, int]]], head: bytes, name: str, row: int
) -> tuple[str, int] | None:
    """Look a row up; where several are alike, its own place goes first."""
    found = places.get(head, [])
    return (name, row) if (name, row) in found else (found[0] if found else None)


def _order(order: list[int]) -> str:
    """Say in which order rows stand."""
    count = len(order)
    half = count // 2
    if all(source in (-1, (row + half) % count) for row, source in enumerate(order)):
        return "with the halves of its rows swapped"
    if all(source in (-1, count - 1 - row) for row, source in enumerate(order)):
        return "with its rows in reverse"
    if all(source in (-1, row // 2 + half * (row % 2)) for row, source in enumerate(order)):
        return "with the halves of its rows interleaved"
    moved = [(row, source) for row, source in enumerate(order) if source not in (-1, row)]
    row, source = moved[0] if moved else (0, 0)
    return f"with {len(moved):,} rows in other places: row {row} is the base's row {source}"


def _pairs_swapped(chunk: Signs) -> Signs:
    return chunk.reshape(-1, 2)[:, ::-1].reshape(-1)


_IN_PLACE: tuple[tuple[Callable[[Signs], Signs], str], ...] = (
    (_pairs_swapped, "with the nibbles of every byte swapped"),
    (np.logical_not, "negated"),
)


def _other_half(reader: Reader, weight: LogicalWeight) -> list[Signs] | None:
    """The chunks that would stand there if the columns' halves were swapped."""
    half = weight.shape[-1] // 2
    places = chunk_places(weight)
    if half % 2 or half % places[0][2]:
        return None
    return [
        signs_of(reader, weight, row, (column + half) % weight.shape[-1], length)
        for row, column, length in places
    ]


def _columns(reader: Reader, weight: LogicalWeight) -> list[Signs] | None:
    """The chunks that would stand there if a square weight were transposed."""
    rows, columns = matrix_shape(weight)
    if rows != columns:
        return None
    return [
        np.array(
            [
                signs_of(reader, weight, place, row - row % 2, 2)[row % 2]
                for place in range(column, column + length)
            ]
        )
        for row, column, length in chunk_places(weight)
    ]


_ELSEWHERE: tuple[tuple[Callable[[Reader, LogicalWeight], list[Signs] | None], str], ...] = (
    (_other_half, "with the halves of its columns swapped"),
    (_columns, "transposed"),
)
