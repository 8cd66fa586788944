"""The audit of a whole checkpoint: pairs, the pass over them, and names for what is foreign."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from nvfp4check.checkpoint.audit.fitted import explain_pairs
from nvfp4check.checkpoint.audit.foreign import name_foreign
from nvfp4check.checkpoint.audit.norms import judge_norms
from nvfp4check.checkpoint.audit.outcome import AuditOutcome
from nvfp4check.checkpoint.audit.pairs import Pair, Pairing, pair_weights
from nvfp4check.checkpoint.audit.passes import audit_pairs
from nvfp4check.checkpoint.audit.regions import RegionSearch
from nvfp4check.checkpoint.audit.results import CopyAudit, Foreign, WeightAudit
from nvfp4check.checkpoint.audit.sources import Reader
from nvfp4check.checkpoint.journal import Journal
from nvfp4check.checkpoint.naming import Layout, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.rules.base import counted, printable
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.engine import Engine
from nvfp4check.findings import CheckError

_QUANTIZED_BEFORE = (
    "the base is quantised already, so that they are copies says nothing of how they were made; "
    "give --base the FP8 or BF16 checkpoint, or compare the two with diff"
)

#: What could not be audited, and why.
Gap = tuple[str, str]


def run_audit(
    checkpoint: Checkpoint,
    base: Checkpoint,
    engine: Engine,
    *,
    sample: tuple[float, int] = (1.0, 0),
    journal: Journal | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[AuditOutcome, list[Gap]]:
    """Audit a checkpoint, or a share of it with a seed; return also what could not be audited.

    Raises:
        CheckError: Bytes cannot be read, or a worker died.
    """
    pairing = pair_weights(checkpoint, base)
    gaps = _gaps(pairing)
    audits = audit_pairs(
        checkpoint, base, _drawn(pairing.pairs, *sample), engine, journal, progress
    )
    weights = {name: a for name, a in audits.items() if isinstance(a, WeightAudit)}
    try:
        readers = Reader(checkpoint), Reader(base)
        by_name = {pair.weight.name: pair for pair in pairing.pairs}
        weights |= explain_pairs(readers, by_name, weights)
    except StorageError as error:
        raise CheckError(f"{checkpoint.location}: cannot be read again: {error}") from error
    copies, unjudged = judge_norms(
        checkpoint, weights, {name: a for name, a in audits.items() if isinstance(a, CopyAudit)}
    )
    if unjudged:
        gaps.append(
            (
                _gap("norm", unjudged),
                "it differs from the base's, and no linear that it feeds was audited to tell why",
            )
        )
    not_finite = [name for name, audit in weights.items() if audit.counts["not_finite"]]
    if not_finite:
        gaps.append(
            (
                _gap("weight", not_finite, part="blocks of "),
                "elements of the base are NaN or infinite",
            )
        )
    try:
        foreign = _foreign(checkpoint, base, weights)
    except StorageError as error:
        raise CheckError(f"{base.location}: cannot be searched: {error}") from error
    return (
        AuditOutcome(
            base=base.location,
            layout=_layout(checkpoint),
            weights=weights,
            copies=copies,
            foreign=foreign,
            pairing=pairing,
        ),
        gaps,
    )


def _foreign(
    checkpoint: Checkpoint, base: Checkpoint, audits: Mapping[str, WeightAudit]
) -> dict[str, Foreign]:
    """Name what is not the base's: whole weights first, then rows and columns of others."""
    whole = [name for name, audit in audits.items() if audit.is_mostly_strange]
    found = name_foreign(checkpoint, base, whole)
    search = RegionSearch(Reader(checkpoint), Reader(base), base)
    for name, audit in audits.items():
        if audit.is_strange and (name not in found or found[name].holds is None):
            some = search.name(checkpoint.weights[name])
            if some is not None and (name not in found or some.holds is not None):
                found[name] = some
    return found


def _drawn(pairs: Sequence[Pair], fraction: float, seed: int) -> Sequence[Pair]:
    """Choose whole groups, as the byte pass does; it and this draw the same NVFP4 weights."""
    if fraction >= 1:
        return pairs
    groups: dict[tuple[bool, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        nvfp4 = pair.weight.format is WeightFormat.NVFP4
        groups[nvfp4, pair.weight.module.rpartition(".")[0]].append(pair)
    drawn: list[Pair] = []
    for kind in (True, False):
        names = sorted(name for nvfp4, name in groups if nvfp4 is kind)
        if names:
            count = min(len(names), max(1, math.ceil(fraction * len(names))))
            for name in random.Random(seed).sample(names, count):
                drawn += groups[kind, name]
    return drawn


def _gaps(pairing: Pairing) -> list[Gap]:
    """Fold what cannot be audited by its reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, why in pairing.hindered.items():
        by_reason[why].append(name)
    by_reason["the base has no such weight"] = pairing.added
    by_reason[_QUANTIZED_BEFORE] = pairing.quantized_before
    return [
        (
            _gap("weight", names),
            printable(why, 400),
        )
        for why, names in by_reason.items()
        if names
    ]


def _layout(checkpoint: Checkpoint) -> Layout:
    """Return the layout that most NVFP4 weights have."""
    layouts = Counter(
        weight.layout
        for weight in checkpoint.weights.values()
        if weight.format is WeightFormat.NVFP4
    )
    return layouts.most_common(1)[0][0] if layouts else Layout.PLAIN


def _gap(kind: str, names: Sequence[str], part: str = "") -> str:
    """Say what was not audited: a weight by name, several by number and the first."""
    first = printable(names[0])
    if len(names) == 1:
        return f"audit of {part}{first}"
    return f"audit of {part}{counted(len(names), kind)}, the first {first}"
