"""The byte pass over a checkpoint: which weights are read, by whom, and what was finished before.

Weights are read in the order in which they lie in their shards, in work items of some 64 MiB.
Each item maps its shards anew and lets go of them, or reads a little ahead over the network, so
that what is resident stays bounded whatever the size of the checkpoint. What an item found is
written to the journal at once.

Sampling chooses groups, not weights: the linears of one attention, MLP or expert are read together
or not at all, for engines fuse them and rules compare them.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from nvfp4check.checkpoint.ahead import Ahead
from nvfp4check.checkpoint.journal import Journal
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.scan import (
    WeightScan,
    ranges_of,
    scan,
    why_not_scannable,
    with_new_maps,
)
from nvfp4check.checkpoint.storage import LocalStorage, StorageError
from nvfp4check.engine import Engine
from nvfp4check.findings import CheckError

#: Bytes of one work item, the last weight excepted.
_ITEM_BYTES = 64 << 20
#: Sizes of a defect, in groups, for which a sampled run says how likely it was missed.
_DEFECT_SIZES = (1, 10, 100, 1000)

#: Hears how many of how many bytes are read.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a sampled run read, and what it may have missed."""

    fraction: float
    seed: int
    groups: int
    groups_read: int
    weights: int
    weights_read: int

    def missed(self, defective: int) -> float:
        """Probability that none of the defective groups was read.

        Groups are drawn without replacement: C(groups - defective, read) / C(groups, read).
        """
        if defective > self.groups - self.groups_read:
            return 0.0
        return math.prod(
            (self.groups - self.groups_read - drawn) / (self.groups - drawn)
            for drawn in range(defective)
        )

    @property
    def defect_sizes(self) -> tuple[int, ...]:
        """Sizes of a defect, in groups, that are worth a statement."""
        return tuple(size for size in _DEFECT_SIZES if size <= self.groups)


def scannable_weights(checkpoint: Checkpoint) -> tuple[list[LogicalWeight], dict[str, str]]:
    """List the NVFP4 weights whose bytes can be read, in file order, and why others cannot be."""
    weights, hindered = [], {}
    for weight in checkpoint.weights.values():
        if weight.format is not WeightFormat.NVFP4:
            continue
        why = why_not_scannable(weight)
        if why is None:
            weights.append(weight)
        else:
            hindered[weight.name] = why
    weights.sort(
        key=lambda weight: (weight.parts[Part.CODES].shard, weight.parts[Part.CODES].start)
    )
    return weights, hindered


def draw(
    weights: Sequence[LogicalWeight], fraction: float, seed: int
) -> tuple[list[LogicalWeight], Sample]:
    """Choose whole groups at random, at least one, the same for the same seed."""
    groups: dict[str, list[LogicalWeight]] = defaultdict(list)
    for weight in weights:
        groups[weight.module.rpartition(".")[0]].append(weight)
    count = min(len(groups), max(1, math.ceil(fraction * len(groups))))
    chosen = set(random.Random(seed).sample(sorted(groups), count))
    drawn = [weight for weight in weights if weight.module.rpartition(".")[0] in chosen]
    return drawn, Sample(
        fraction=fraction,
        seed=seed,
        groups=len(groups),
        groups_read=count,
        weights=len(weights),
        weights_read=len(drawn),
    )


def read_bytes(
    checkpoint: Checkpoint,
    weights: Sequence[LogicalWeight],
    engine: Engine,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> dict[str, WeightScan]:
    """Scan the weights, taking over what the journal has of them.

    Raises:
        CheckError: A weight's bytes cannot be read, or a worker died.
    """
    scans = _finished(journal, weights)
    items = _items([weight for weight in weights if weight.name not in scans])
    total = sum(weight.nbytes for weight in weights)
    done = sum(weight.nbytes for weight in weights if weight.name in scans)
    if progress is not None:
        progress(done, total)

    def finished(position: int, result: list[WeightScan]) -> None:
        nonlocal done
        if journal is not None:
            journal.add_all({found.name: found.to_json() for found in result})
        done += sum(weight.nbytes for weight in items[position])
        if progress is not None:
            progress(done, total)

    # Workers need the storage and nothing else of the checkpoint.
    lean = replace(
        checkpoint, files={}, shards={}, tensors={}, duplicates={}, index=None, json_problems=[]
    )
    for result in engine.map(
        _scan_item, items, prepare=_prepare, arguments=(lean,), finished=finished
    ):
        scans.update((found.name, found) for found in result)
    return scans


def _finished(journal: Journal | None, weights: Iterable[LogicalWeight]) -> dict[str, WeightScan]:
    """Take over the scans of an earlier run; one that cannot be understood is made again."""
    results = {} if journal is None else journal.results
    scans = {}
    for weight in weights:
        if weight.name in results:
            try:
                scans[weight.name] = WeightScan.from_json(results[weight.name])
            except (TypeError, KeyError, ValueError, AttributeError):
                continue
    return scans


def _items(weights: Iterable[LogicalWeight]) -> list[list[LogicalWeight]]:
    items: list[list[LogicalWeight]] = []
    size = _ITEM_BYTES
    for weight in weights:
        if size >= _ITEM_BYTES:
            items.append([])
            size = 0
        items[-1].append(weight)
        size += weight.nbytes
    return items


_checkpoint: Checkpoint | None = None


def _prepare(checkpoint: Checkpoint) -> None:
    global _checkpoint
    _checkpoint = checkpoint


def _scan_item(weights: Sequence[LogicalWeight]) -> list[WeightScan]:
    """Scan the weights of one work item."""
    if _checkpoint is None:
        raise RuntimeError("the worker was not prepared")
    found = []
    with _opened(_checkpoint, weights) as opened:
        for weight in weights:
            try:
                found.append(scan(opened, weight))
            except StorageError as error:
                raise CheckError(f"{weight.name}: its bytes cannot be read: {error}") from error
    return found


@contextmanager
def _opened(checkpoint: Checkpoint, weights: Sequence[LogicalWeight]) -> Iterator[Checkpoint]:
    """Give the checkpoint with maps that go when this item is done, or with reading ahead."""
    if isinstance(checkpoint.storage, LocalStorage):
        yield with_new_maps(checkpoint)
        return
    plan = [part for weight in weights for part in ranges_of(weight)]
    with Ahead(checkpoint.storage, plan) as storage:
        yield replace(checkpoint, storage=storage)
