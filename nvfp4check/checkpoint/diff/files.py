"""Files and index compared by what a loader makes of them, however the tensors are sharded.

A checkpoint that is cut into other shards does not differ. What does is a tensor that one index
leaves out or puts where it is not, a file that no index names, and a name in two files. Of note are
a total size that is wrong, and the format that headers name: older transformers refuse headers
without. Shards that are not there are told as not compared.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from nvfp4check.checkpoint.diff.configs import ConfigDiff, Matters
from nvfp4check.checkpoint.index import INDEX_FILE
from nvfp4check.checkpoint.opening import Checkpoint

_SHOWN = 3
_HEADERS = "headers of the shards"
_FORMAT = "format"
_TOTAL = "wrong total_size"


def compare_files(a: Checkpoint, b: Checkpoint) -> Iterator[ConfigDiff]:
    """Compare what holds the tensors of two checkpoints."""
    left, right = _facts(a), _facts(b)
    for (file, key), one in left.items():
        two = right[file, key]
        if one != two:
            matters = Matters.NOTE if key in (_TOTAL, _FORMAT) else Matters.FILES
            yield ConfigDiff(file=file, key=key, matters=matters, a=one, b=two)


def _facts(checkpoint: Checkpoint) -> dict[tuple[str, str], Any]:
    """Say what is odd, None where nothing is, and the format that headers name."""
    index = checkpoint.index
    placed = index.weight_map if index is not None else {}
    held: dict[str, set[str]] = {}
    for name, shard in checkpoint.shards.items():
        for entry in shard.entries:
            held.setdefault(entry.name, set()).add(name)
    left_out = [name for name in held if name not in placed] if placed else []
    unknown = {*checkpoint.missing_shards, *checkpoint.unreadable}
    misplaced = [
        name
        for name, shard in placed.items()
        if shard not in held.get(name, ()) and shard not in unknown
    ]
    several = len(checkpoint.shards) > 1 and index is None
    twice = [name for name, shards in held.items() if len(shards) > 1]
    formats = {shard.metadata.get(_FORMAT, "none") for shard in checkpoint.shards.values()}
    return {
        (INDEX_FILE, ""): "absent, beside several shards" if several else None,
        (INDEX_FILE, "tensors left out"): _named(left_out, "tensor"),
        (INDEX_FILE, "tensors that are not where it says"): _named(misplaced, "tensor"),
        (INDEX_FILE, "problems"): "; ".join(index.problems[:_SHOWN]) or None if index else None,
        (INDEX_FILE, _TOTAL): _wrong_total(checkpoint),
        ("shards", "files that no index names"): _named(checkpoint.stray_shards, "file"),
        ("shards", "tensors in two of them"): _named(twice, "tensor"),
        (_HEADERS, _FORMAT): ", ".join(sorted(formats)) or None,
    }


def _wrong_total(checkpoint: Checkpoint) -> str | None:
    """Say what the index's sum is, if it is wrong and can be known to be."""
    index = checkpoint.index
    if index is None or index.total_size is None or checkpoint.missing_shards:
        return None
    total = sum(entry.nbytes for entry in checkpoint.tensors.values())
    if checkpoint.unreadable or index.total_size == total:
        return None
    return f"{index.total_size:,}, though the tensors take {total:,} bytes"


def _named(names: Iterable[str], noun: str) -> str | None:
    every = sorted(names)
    if not every:
        return None
    more = f" and {len(every) - _SHOWN:,} more" if len(every) > _SHOWN else ""
    plural = "" if len(every) == 1 else "s"
    return f"{len(every):,} {noun}{plural}: {', '.join(every[:_SHOWN])}{more}"
