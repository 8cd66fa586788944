"""The comparison of two checkpoints: configurations first, then every weight.

Weights are compared in work items of some 64 MiB, in the order in which a's lie in their shards;
every item has maps of its own, so that what is resident stays bounded whatever the size. What an
item found is written to the journal at once. Faults that go over several weights are looked for at
the end, among those that differ.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nvfp4check import __version__
from nvfp4check.checkpoint.audit.sources import Reader
from nvfp4check.checkpoint.byte_pass import Sample, draw
from nvfp4check.checkpoint.diff.classes import FailOn, WeightClass, fails
from nvfp4check.checkpoint.diff.compare import Skip, class_of_headers, compare
from nvfp4check.checkpoint.diff.configs import ConfigDiff, compare_configs, in_order
from nvfp4check.checkpoint.diff.effect import Moments
from nvfp4check.checkpoint.diff.files import compare_files
from nvfp4check.checkpoint.diff.moved import name_moved
from nvfp4check.checkpoint.diff.operands import Operand
from nvfp4check.checkpoint.diff.pairing import Pair, other_prefix, pair_weights
from nvfp4check.checkpoint.diff.results import WeightDiff
from nvfp4check.checkpoint.journal import Journal, default_path, fingerprint
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.storage import LocalStorage, StorageError
from nvfp4check.checkpoint.summary import summary_of
from nvfp4check.engine import Engine
from nvfp4check.engine.local import LocalEngine, alone_if_sooner
from nvfp4check.findings import CheckError, Skipped

SCHEMA = "nvfp4check/diff/1"

#: Bytes of one work item, the last pair excepted.
_ITEM_BYTES = 64 << 20
#: What one process compares in a second of files on disk: plain weights with NVFP4. Weights of one
#: format go faster.
_BYTES_A_SECOND = 512 << 20

#: Hears how many of how many bytes are read.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffOptions:
    """How two checkpoints are compared."""

    only: str | None = None
    read_bytes: bool = True
    sample: float = 1.0
    seed: int = 0
    jobs: int = 1
    engine: Engine | None = None
    device: str = "cpu"
    moments: Moments | None = None
    resume: bool = False
    #: Where the journal is; in the user's cache if not given.
    journal: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.sample <= 1:
            raise CheckError(f"sample {self.sample} is no fraction; give 0 < fraction <= 1")
        if self.device != "cpu":
            raise CheckError(
                f"--device {self.device}: diff compares on the CPU alone; leave --device out, "
                "and give --jobs N to use more cores"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffResult:
    """Everything that differs, and what could not be compared."""

    a: dict[str, Any]
    b: dict[str, Any]
    config: tuple[ConfigDiff, ...]
    weights: tuple[WeightDiff, ...]
    #: What several weights have in common.
    patterns: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    sample: Sample | None = None
    read_bytes: bool = True
    seconds: float = 0.0
    bytes_read: int = 0

    @property
    def summary(self) -> dict[str, int]:
        """How many weights are of each class, classes without any left out."""
        counts = Counter(diff.cls for diff in self.weights)
        return {cls.value: counts[cls] for cls in WeightClass if counts[cls]}

    def failing(self, fail_on: FailOn) -> tuple[list[WeightDiff], list[ConfigDiff]]:
        """List the weights and settings that fail the comparison."""
        changed = any(diff.cls is WeightClass.FORMAT_CHANGED for diff in self.weights)
        return (
            [diff for diff in self.weights if fails(diff.cls, diff.bound_holds, fail_on)],
            [diff for diff in self.config if diff.fails(fail_on, formats_changed=changed)],
        )

    def to_json(self, fail_on: FailOn = FailOn.DIFFERENT) -> dict[str, Any]:
        """Return the document of the contract."""
        weights, config = self.failing(fail_on)
        sample = None
        if self.sample is not None:
            sample = {
                "fraction": self.sample.fraction,
                "seed": self.sample.seed,
                "weights": self.sample.weights,
                "weights_read": self.sample.weights_read,
                "groups": self.sample.groups,
                "groups_read": self.sample.groups_read,
                "missed": [
                    {"differing_groups": size, "probability": self.sample.missed(size)}
                    for size in self.sample.defect_sizes
                ],
            }
        return {
            "schema": SCHEMA,
            "tool": {"name": "nvfp4check", "version": __version__},
            "a": self.a,
            "b": self.b,
            "level": "bytes" if self.read_bytes else "headers",
            "fail_on": fail_on.value,
            "failing": {"weights": len(weights), "config": len(config)},
            "summary": self.summary,
            "patterns": list(self.patterns),
            "config": [diff.to_json() for diff in self.config],
            "weights": [diff.to_json() for diff in self.weights],
            "sample": sample,
            "skipped": [{"what": gap.what, "why": gap.why} for gap in self.skipped],
            "bytes_read": self.bytes_read,
            "seconds": round(self.seconds, 3),
        }


def diff_checkpoints(
    a: Checkpoint,
    b: Checkpoint,
    options: DiffOptions | None = None,
    progress: Progress | None = None,
) -> DiffResult:
    """Compare two checkpoints.

    Raises:
        CheckError: Bytes cannot be read, no weight has such a name, or a worker died.
    """
    options = options or DiffOptions()
    begun = time.perf_counter()
    pairs = pair_weights(a.weights, b.weights, options.only)
    if options.only is not None and not pairs:
        raise CheckError(
            f"--only {options.only}: fits no weight of {a.location} or {b.location}; give a glob "
            "of names as 'model.layers.3.*'"
        )
    gaps = [*_unreadable(a), *_unreadable(b)]
    pairs, lost = _without_lost(a, b, pairs)
    gaps += lost
    sample = None
    patterns: tuple[str, ...] = ()
    size = 0
    if not options.read_bytes:
        found = [class_of_headers(pair) for pair in pairs]
    else:
        pairs, sample = _drawn(pairs, options)
        size = sum(pair.nbytes for pair in pairs)
        found, skips = _compared(a, b, pairs, options, progress)
        gaps += [Skipped(skip.name, skip.why) for skip in skips]
        try:
            found, patterns = name_moved(a, b, found)
        except StorageError as error:
            raise CheckError(f"bytes cannot be read: {error}") from error
    shift = other_prefix(a.weights, b.weights)
    if shift != ("", ""):
        said = [f"begin with {prefix!r}" if prefix else "have no prefix" for prefix in shift]
        patterns = (f"names of b {said[0]} where a's {said[1]}; a's are used here", *patterns)
    found = [_tied(diff, a, b) for diff in found]
    return DiffResult(
        a=_summary(a),
        b=_summary(b),
        config=tuple(in_order([*compare_configs(a, b), *compare_files(a, b)])),
        weights=tuple(sorted(found, key=lambda diff: diff.name)),
        patterns=patterns,
        skipped=tuple(gaps),
        sample=sample,
        read_bytes=options.read_bytes,
        seconds=time.perf_counter() - begun,
        bytes_read=size,
    )


def _unreadable(checkpoint: Checkpoint) -> Iterator[Skipped]:
    for shard, why in checkpoint.unreadable.items():
        yield Skipped(f"{checkpoint.location}: {shard}", why)
    for shard in checkpoint.missing_shards:
        yield Skipped(f"{checkpoint.location}: {shard}", "the index names it, and it is not there")


def _tied(diff: WeightDiff, a: Checkpoint, b: Checkpoint) -> WeightDiff:
    """Say of a head that one side lacks if its embeddings stand for it."""
    sides = {WeightClass.ONLY_IN_A: ("b", b), WeightClass.ONLY_IN_B: ("a", a)}
    if diff.cls not in sides or not diff.name.endswith("lm_head.weight"):
        return diff
    name, lacking = sides[diff.cls]
    if (lacking.config or {}).get("tie_word_embeddings") is not True:
        return diff
    return replace(diff, diagnosis=f"{name} takes its embeddings for it: tie_word_embeddings")


def _without_lost(
    a: Checkpoint, b: Checkpoint, pairs: list[Pair]
) -> tuple[list[Pair], list[Skipped]]:
    """Take out weights that one side has, and the other, or a part of it, in a shard that is lost.

    They are not compared; to say that one side alone has them would be wrong.
    """
    kept, lost = [], Counter[tuple[str, str]]()
    for pair in pairs:
        gone = [*_gone(pair.a, b), *_gone(pair.b, a)]
        if gone:
            lost[gone[0]] += 1
        else:
            kept.append(pair)
    return kept, [
        Skipped(f"{location}: {count:,} weight{'s' if count > 1 else ''}", f"stored in {shard}")
        for (location, shard), count in sorted(lost.items())
    ]


def _gone(side: Operand | None, other: Checkpoint) -> Iterator[tuple[str, str]]:
    """Find tensors of a weight that the other checkpoint has in a shard that cannot be read."""
    unreadable = {*other.missing_shards, *other.unreadable}
    if side is None or other.index is None or not unreadable:
        return
    for entry in side.weight.entries:
        shard = other.index.weight_map.get(entry.name)
        if shard in unreadable and entry.name not in other.tensors:
            yield other.location, shard


def _drawn(pairs: list[Pair], options: DiffOptions) -> tuple[list[Pair], Sample | None]:
    """Choose whole groups of weights that both checkpoints have."""
    if options.sample >= 1:
        return pairs, None
    both = {pair.name: pair for pair in pairs if pair.a is not None and pair.b is not None}
    named = [
        replace(pair.both[0].weight, name=name, module=name.rpartition(".")[0])
        for name, pair in both.items()
    ]
    if not named:
        return pairs, None
    chosen, sample = draw(named, options.sample, options.seed)
    keep = {weight.name for weight in chosen}
    return [pair for pair in pairs if pair.name in keep or pair.name not in both], sample


def _compared(
    a: Checkpoint,
    b: Checkpoint,
    pairs: Sequence[Pair],
    options: DiffOptions,
    progress: Progress | None,
) -> tuple[list[WeightDiff], list[Skip]]:
    """Compare all pairs, taking over what the journal has of them."""
    engine = options.engine or LocalEngine(options.jobs)
    ordered = sorted(pairs, key=_place)
    found: dict[str, WeightDiff] = {}
    skips: list[Skip] = []
    total = sum(pair.nbytes for pair in ordered)
    if isinstance(a.storage, LocalStorage) and isinstance(b.storage, LocalStorage):
        engine = alone_if_sooner(engine, total / _BYTES_A_SECOND)
    with _journal(a, b, options) as journal:
        found.update(_finished(journal, ordered))
        items = _items([pair for pair in ordered if pair.name not in found])
        done = sum(pair.nbytes for pair in ordered if pair.name in found)
        if progress is not None:
            progress(done, total)

        def finished(position: int, result: list[WeightDiff | Skip]) -> None:
            nonlocal done
            if journal is not None:
                journal.add_all(
                    {diff.name: diff.to_json() for diff in result if isinstance(diff, WeightDiff)}
                )
            done += sum(pair.nbytes for pair in items[position])
            if progress is not None:
                progress(done, total)

        lean = tuple(
            replace(side, files={}, shards={}, tensors={}, duplicates={}, index=None)
            for side in (a, b)
        )
        for result in engine.map(
            _compare_item,
            items,
            prepare=_prepare,
            arguments=(*lean, options.moments),
            finished=finished,
        ):
            for diff in result:
                if isinstance(diff, Skip):
                    skips.append(diff)
                else:
                    found[diff.name] = diff
        if journal is not None:
            journal.remove()
    return list(found.values()), skips


def _place(pair: Pair) -> tuple[str, int, str]:
    side = pair.a or pair.b
    if side is None or not side.weight.entries:
        return "", 0, pair.name
    entry = side.weight.entries[0]
    return entry.shard, entry.start, pair.name


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


_sides: tuple[Checkpoint, Checkpoint, Moments | None] | None = None


def _prepare(a: Checkpoint, b: Checkpoint, moments: Moments | None) -> None:
    global _sides
    _sides = a, b, moments


def _compare_item(pairs: Sequence[Pair]) -> list[WeightDiff | Skip]:
    """Compare the pairs of one work item, with maps that go when it is done."""
    if _sides is None:
        raise RuntimeError("the worker was not prepared")
    a, b, moments = _sides
    readers = Reader(a), Reader(b)
    found = []
    for pair in pairs:
        try:
            found.append(compare(*readers, pair, moments))
        except StorageError as error:
            raise CheckError(f"{pair.name}: its bytes cannot be read: {error}") from error
    return found


def _finished(journal: Journal | None, pairs: Iterable[Pair]) -> dict[str, WeightDiff]:
    """Take over what an earlier run found; what cannot be understood is compared again."""
    results = {} if journal is None else journal.results
    found = {}
    for pair in pairs:
        if pair.name in results:
            try:
                found[pair.name] = WeightDiff.from_json(results[pair.name])
            except (TypeError, KeyError, ValueError, AttributeError):
                continue
    return found


@contextmanager
def _journal(a: Checkpoint, b: Checkpoint, options: DiffOptions) -> Iterator[Journal | None]:
    """Open the journal. Only who asks for one, or for its content, must be able to have it."""
    about = f"diff {fingerprint(a)} {fingerprint(b)}"
    if options.moments is not None:
        about += f" {options.moments.digest}"
    subject = hashlib.sha256(about.encode()).hexdigest()
    path = options.journal or default_path(a).with_name(f"{subject[:24]}.jsonl")
    try:
        journal = Journal(path, subject, resume=options.resume)
    except CheckError:
        if options.resume or options.journal is not None:
            raise
        yield None
        return
    with journal:
        yield journal


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    return {**asdict(summary_of(checkpoint)), "weights": len(checkpoint.weights)}
