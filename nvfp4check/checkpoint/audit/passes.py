"""The audit of a whole checkpoint: pairs in work items, journalled as they finish.

As the byte pass: items of some 64 MiB in the order of the files, each with maps of its own, by
whatever engine there is; what an item found is written to the journal at once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from nvfp4check.checkpoint.audit.copies import audit_copy
from nvfp4check.checkpoint.audit.pairs import Kind, Pair
from nvfp4check.checkpoint.audit.results import CopyAudit, WeightAudit
from nvfp4check.checkpoint.audit.sources import Reader
from nvfp4check.checkpoint.audit.weights import audit_weight
from nvfp4check.checkpoint.journal import Journal, fingerprint
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.engine import Engine
from nvfp4check.findings import CheckError

Audited = WeightAudit | CopyAudit

#: Bytes of one work item, the last pair excepted.
_ITEM_BYTES = 64 << 20

#: Hears how many of how many bytes are read.
Progress = Callable[[int, int], None]


def audit_pairs(
    checkpoint: Checkpoint,
    base: Checkpoint,
    pairs: Iterable[Pair],
    engine: Engine,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> dict[str, Audited]:
    """Audit the pairs, taking over what the journal has of them.

    Raises:
        CheckError: Bytes cannot be read, or a worker died.
    """
    pairs = sorted(pairs, key=_place)
    subject = f"audit {fingerprint(base)} "
    audits = _finished(journal, subject, pairs)
    items = _items([pair for pair in pairs if pair.weight.name not in audits])
    total = sum(pair.nbytes for pair in pairs)
    done = sum(pair.nbytes for pair in pairs if pair.weight.name in audits)
    if progress is not None:
        progress(done, total)

    def finished(position: int, result: list[Audited]) -> None:
        nonlocal done
        if journal is not None:
            journal.add_all({subject + found.name: found.to_json() for found in result})
        done += sum(pair.nbytes for pair in items[position])
        if progress is not None:
            progress(done, total)

    both = (_lean(checkpoint), _lean(base))
    for result in engine.map(
        _audit_item, items, prepare=_prepare, arguments=both, finished=finished
    ):
        audits.update((found.name, found) for found in result)
    return {pair.weight.name: audits[pair.weight.name] for pair in pairs}


def _place(pair: Pair) -> tuple[str, int]:
    first = next(iter(pair.weight.parts.values()))
    return first.shard, first.start


def _lean(checkpoint: Checkpoint) -> Checkpoint:
    """Workers need the storage and nothing else of a checkpoint."""
    return replace(
        checkpoint, files={}, shards={}, tensors={}, duplicates={}, index=None, json_problems=[]
    )


def _finished(journal: Journal | None, subject: str, pairs: Iterable[Pair]) -> dict[str, Audited]:
    """Take over the audits of an earlier run; one that cannot be understood is made again."""
    results: dict[str, Any] = {} if journal is None else journal.results
    audits: dict[str, Audited] = {}
    for pair in pairs:
        known = results.get(subject + pair.weight.name)
        if isinstance(known, dict):
            kind = WeightAudit if pair.kind is Kind.QUANTIZED else CopyAudit
            try:
                audits[pair.weight.name] = kind.from_json(known)
            except TypeError:
                continue
    return audits


def _items(pairs: Iterable[Pair]) -> list[list[Pair]]:
    items: list[list[Pair]] = []
    size = _ITEM_BYTES
    for pair in pairs:
        if size >= _ITEM_BYTES:
            items.append([])
            size = 0
        items[-1].append(pair)
        size += pair.nbytes
    return items


_checkpoints: tuple[Checkpoint, Checkpoint] | None = None


def _prepare(checkpoint: Checkpoint, base: Checkpoint) -> None:
    global _checkpoints
    _checkpoints = checkpoint, base


def _audit_item(pairs: Sequence[Pair]) -> list[Audited]:
    """Audit the pairs of one work item."""
    if _checkpoints is None:
        raise RuntimeError("the worker was not prepared")
    reader, base_reader = (Reader(checkpoint) for checkpoint in _checkpoints)
    found: list[Audited] = []
    for pair in pairs:
        audit = audit_weight if pair.kind is Kind.QUANTIZED else audit_copy
        try:
            found.append(audit(reader, pair.weight, base_reader, pair.base, pair.smoothing))
        except StorageError as error:
            raise CheckError(f"{pair.weight.name}: its bytes cannot be read: {error}") from error
    return found
