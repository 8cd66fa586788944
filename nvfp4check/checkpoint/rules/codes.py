"""NV401 to NV404: what the codes of a weight give away."""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from nvfp4check.checkpoint.ahead import Ahead, FileRange
from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.rules.base import Problem, Rule, RuleContext, RuleLevel, printable, rule
from nvfp4check.checkpoint.rules.siblings import at_part, nvfp4_scans, scales_problem
from nvfp4check.checkpoint.scan import WeightScan
from nvfp4check.checkpoint.storage import LocalStorage, Range, StorageError
from nvfp4check.findings import Severity

_GITHUB = "https://github.com/"

#: Standard deviations within which sixteen counts must all lie to be called uniform, and the
#: fewest codes for which that says anything. Codes of a weight whose density falls with magnitude
#: differ more: from Gaussian to exponential, over single rows and mixtures of rows, some code is
#: at least 0.01 away from 1/16, five standard deviations of 2**15 codes and more.
_UNIFORM_DEVIATIONS = 5.0
_FEWEST_UNIFORM = 1 << 15
#: The rarer sign's share of non-zero codes. Weights are symmetric but for a few percent; a
#: projection of one sign is not known from any trained model.
_RARER_SIGN = 0.01
_FEWEST_SIGNED = 1000
#: Share of all codes at +-6. A block puts one of its 16 there; uniformly distributed weights,
#: the flattest that occur, one of six in all.
_SATURATED = 0.5

#: Where a tensor that no scan covers is looked at first, and how much: three windows.
_WINDOW = 4096
_PIECE = 1 << 22
#: Layers of multi-token prediction carry copies of these, and tied models store them twice.
_COPIED = frozenset(("embed_tokens", "lm_head", "head", "output_layer", "wte"))
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})(?:\.|$)")
_SHOWN = 3


@rule(
    "NV401",
    "block-underfilled",
    Severity.WARNING,
    fires_when="live blocks with a normal scale above 2**-6 have no code +-6",
    why="The scale is the block's amax/6 rounded to E4M3, at most 1/16 off, so the largest element "
    "lies between 5.6 and 6.4 and rounds to 6. A block without a 6 was quantised with another "
    "scale than the one stored. Legal where scales are searched: 4-over-6 maps the maximum to 4 "
    "in many blocks, and MSE calibration to any code.",
    repair="For 4-over-6 or searched scales, --ignore NV401. Else the codes were made with an "
    "unrounded or older scale: quantise again with the scale that is stored.",
    incidents=(
        f"{_GITHUB}NVIDIA/Model-Optimizer/pull/2243",
        f"{_GITHUB}vllm-project/compressed-tensors/pull/538",
    ),
    level=RuleLevel.BYTES,
)
def block_underfilled(context: RuleContext) -> Iterator[Problem]:
    """Report live blocks without a six."""
    for weight, scan in nvfp4_scans(context):
        spot = scan.defects.underfilled
        if spot.count:
            yield scales_problem(
                weight,
                scan,
                spot,
                "the largest code is not +-6, though the scale is a normal number (legal in "
                "4-over-6 and for searched scales)",
            )


@rule(
    "NV402",
    "tensor-zero",
    Severity.ERROR,
    fires_when="all codes of a weight are zero",
    why="The module adds nothing. Weights that were never loaded before quantising, and "
    "quantisers that return zeros on hardware they do not support, leave such tensors.",
    repair="Compare with the base model. If the weight is zero there (a dead expert), leave the "
    "module unquantised and list it under exclude_modules.",
    incidents=(
        f"{_GITHUB}NVIDIA/TransformerEngine/pull/3281",
        f"{_GITHUB}sgl-project/sglang/issues/32279",
    ),
    level=RuleLevel.BYTES,
)
def tensor_zero(context: RuleContext) -> Iterator[Problem]:
    """Report weights without a live code."""
    for weight, scan in nvfp4_scans(context):
        if scan.is_zero:
            yield Problem(
                f"all {scan.elements:,} codes are zero",
                count=scan.elements,
                **at_part(weight, Part.CODES),
            )


@rule(
    "NV403",
    "code-histogram",
    Severity.WARNING,
    fires_when="the histogram of codes is not that of a quantised weight: uniform noise, one "
    "value, one sign",
    why="Weights lie symmetrically and densely around zero, so a quantised one uses every code, "
    "both signs alike, with a histogram that is the same in no two codes. Sixteen equal counts are "
    "random bytes; one sign or codes at +-6 only are a cast gone wrong. Legal for binary and "
    "ternary weights.",
    repair="Compare a row with the base model's. Bytes of another tensor, of a compressed file or "
    "of uninitialised memory give a uniform histogram.",
    incidents=(
        f"{_GITHUB}vllm-project/compressed-tensors/pull/781",
        f"{_GITHUB}vllm-project/vllm-ascend/issues/4093",
    ),
    level=RuleLevel.BYTES,
)
def code_histogram(context: RuleContext) -> Iterator[Problem]:
    """Look at the shape of every histogram."""
    for weight, scan in nvfp4_scans(context):
        why = why_not_a_weight(scan)
        if why is not None:
            yield Problem(why, observed=list(scan.code_counts), **at_part(weight, Part.CODES))


def why_not_a_weight(scan: WeightScan) -> str | None:
    """Say what is wrong with a histogram of codes, or None."""
    counts, elements = scan.code_counts, scan.elements
    expected = elements / 16
    deviation = math.sqrt(expected * 15 / 16)
    farthest = max(abs(count - expected) for count in counts)
    if elements >= _FEWEST_UNIFORM and farthest <= _UNIFORM_DEVIATIONS * deviation:
        return "all sixteen codes are equally frequent: random bytes, not a quantised weight"
    positive, negative = sum(counts[1:8]), sum(counts[9:])
    nonzero = positive + negative
    if nonzero < _FEWEST_SIGNED:
        return None
    for code in (*range(1, 8), *range(9, 16)):
        if counts[code] == nonzero:
            return f"every code that is not zero is {code}: one value"
    if min(positive, negative) < _RARER_SIGN * nonzero:
        sign = "positive" if positive > negative else "negative"
        share = max(positive, negative) / nonzero
        return f"{share:.1%} of the codes that are not zero are {sign}: one sign"
    if counts[7] + counts[15] > _SATURATED * elements:
        share = (counts[7] + counts[15]) / elements
        return f"{share:.1%} of the codes are +-6: saturated, or weights of one magnitude"
    return None


@rule(
    "NV404",
    "tensor-repeated",
    Severity.ERROR,
    fires_when="two experts or two layers hold the same bytes (embeddings and head excepted, and a "
    "layer of multi-token prediction against the layer it was started from)",
    why="No two experts or layers come out of training equal: one of them was written in the "
    "other's place. The model still talks, a little worse.",
    repair="Find which of the two is right by comparing with the base model, and export the other "
    "again; look for an index that is off by one, or for experts shared between ranks.",
    level=RuleLevel.BYTES,
)
def tensor_repeated(context: RuleContext) -> Iterator[Problem]:
    """Compare weights whose first look is the same, to the last byte."""
    checkpoint = context.checkpoint
    layers = (checkpoint.config or {}).get("num_hidden_layers")
    first_mtp = layers if isinstance(layers, int) else None
    alike: dict[object, list[LogicalWeight]] = {}
    looked_at = [
        weight
        for weight in checkpoint.weights.values()
        if weight.name not in context.scans and _may_be_repeated(weight)
    ]
    with Ahead(checkpoint.storage, _plan(checkpoint, looked_at)) as storage:
        opened = replace(checkpoint, storage=storage)
        looks: dict[str, bytes | str | None] = {
            weight.name: _first_look(opened, weight) for weight in looked_at
        }
    for name, scan in context.scans.items():
        looks[name] = None if scan.is_zero else scan.fingerprint
    for weight in checkpoint.weights.values():
        look = looks.get(weight.name)
        if look is not None:
            key = (look, weight.shape, _is_mtp(weight, first_mtp))
            alike.setdefault(key, []).append(weight)
    for weights in alike.values():
        if len(weights) > 1:
            yield from _repeated(checkpoint, weights)


def _is_mtp(weight: LogicalWeight, first_mtp: int | None) -> bool:
    match = _LAYER.search(weight.module)
    return first_mtp is not None and match is not None and int(match[1]) >= first_mtp


def _stored(weight: LogicalWeight) -> TensorEntry | None:
    return weight.parts.get(Part.PLAIN) or weight.parts.get(Part.CODES)


def _may_be_repeated(weight: LogicalWeight) -> bool:
    """Whether a stored matrix must be unlike every other; vectors (norms of ones) need not."""
    names = weight.module.split(".")
    return (
        len(weight.shape) == 2
        and _stored(weight) is not None
        and weight.format is not WeightFormat.NVFP4
        and names[-1] not in _COPIED
    )


def _windows(entry: TensorEntry) -> list[Range]:
    starts = (0, entry.nbytes // 2, max(0, entry.nbytes - _WINDOW))
    return [(start, min(start + _WINDOW, entry.nbytes)) for start in starts]


def _plan(checkpoint: Checkpoint, weights: Iterable[LogicalWeight]) -> list[FileRange]:
    """What first looks read, where reading waits for a network."""
    if isinstance(checkpoint.storage, LocalStorage):
        return []
    entries = [entry for weight in weights if (entry := _stored(weight)) is not None]
    return [
        FileRange(entry.shard, entry.start + start, entry.start + stop)
        for entry in entries
        for start, stop in _windows(entry)
    ]


def _first_look(checkpoint: Checkpoint, weight: LogicalWeight) -> bytes | None:
    """Digest three windows of a tensor; None where they show one value only, or nothing."""
    entry = _stored(weight)
    if entry is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    seen = np.zeros(256, np.int64)
    try:
        for start, stop in _windows(entry):
            window = checkpoint.tensor_bytes(entry, start, stop)
            digest.update(window.data)
            seen += np.bincount(window, minlength=256)
    except StorageError:
        return None
    return digest.digest() if np.count_nonzero(seen) > 2 else None


def _content(checkpoint: Checkpoint, entries: Iterable[TensorEntry]) -> bytes | None:
    digest = hashlib.blake2b()
    try:
        for entry in entries:
            for start in range(0, entry.nbytes, _PIECE):
                stop = min(start + _PIECE, entry.nbytes)
                digest.update(checkpoint.tensor_bytes(entry, start, stop).data)
    except StorageError:
        return None
    return digest.digest()


def _repeated(checkpoint: Checkpoint, weights: list[LogicalWeight]) -> Iterator[Problem]:
    by_content: dict[bytes, list[LogicalWeight]] = {}
    for weight in weights:
        parts = (Part.CODES, Part.BLOCK_SCALES, Part.PLAIN)
        entries = [weight.parts[part] for part in parts if part in weight.parts]
        content = _content(checkpoint, entries)
        if content is not None:
            by_content.setdefault(content, []).append(weight)
    for same in by_content.values():
        if len(same) < 2:
            continue
        others = ", ".join(printable(weight.name) for weight in same[1 : _SHOWN + 1])
        more = f" and {len(same) - _SHOWN - 1:,} more" if len(same) > _SHOWN + 1 else ""
        part = Part.CODES if Part.CODES in same[0].parts else Part.PLAIN
        yield Problem(
            f"same bytes as {others}{more}",
            count=len(same),
            observed=[weight.name for weight in same],
            **at_part(same[0], part),
        )


RULES: tuple[Rule, ...] = (block_underfilled, tensor_zero, code_histogram, tensor_repeated)
