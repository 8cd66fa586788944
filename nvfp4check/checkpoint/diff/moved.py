"""Weights of b that are another's of a: experts permuted, halves swapped, layers shifted.

Contract:
    who        by the signs of chunks spread over a weight, and of the beginnings of all rows, which
               rounding keeps (`audit.signs`); so it works across formats
    scales     block scales that are byte for byte those of another weight of a
Looked up are weights that differ and do not have their own signs.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from nvfp4check.checkpoint.audit.foreign import name_foreign
from nvfp4check.checkpoint.audit.patterns import patterns
from nvfp4check.checkpoint.audit.results import Foreign
from nvfp4check.checkpoint.audit.signs import agree, can_be_read, chunks_of
from nvfp4check.checkpoint.audit.sources import Reader
from nvfp4check.checkpoint.diff.classes import WeightClass
from nvfp4check.checkpoint.diff.measured import same_bytes
from nvfp4check.checkpoint.diff.results import WeightDiff
from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import LogicalWeight, Part
from nvfp4check.checkpoint.opening import Checkpoint

_SUSPECT = (WeightClass.DIFFERENT, WeightClass.SCALES_ONLY, WeightClass.FORMAT_CHANGED)
#: Bytes at the beginning of block scales that tell them apart.
_HEAD = 1 << 12
#: Weights that are looked up: an expert layer of DeepSeek-V3 has 768.
_MOST_NAMED = 1024
_PIECE = 1 << 21


def name_moved(
    a: Checkpoint, b: Checkpoint, found: Sequence[WeightDiff]
) -> tuple[list[WeightDiff], tuple[str, ...]]:
    """Name what the weights hold that are not their own; say what these have in common.

    Raises:
        StorageError: Bytes cannot be read.
    """
    suspects = [
        diff
        for diff in found
        if diff.cls in _SUSPECT
        and diff.bound_holds is False
        and diff.diagnosis is None
        and diff.name in a.weights
        and diff.name in b.weights
        and a.weights[diff.name].shape == b.weights[diff.name].shape
    ]
    if not suspects:
        return list(found), ()
    strange = [diff.name for diff in suspects if not _is_own(a, b, diff.name)]
    foreign = name_foreign(b, a, strange[:_MOST_NAMED])
    said = {name: _words(one) for name, one in foreign.items()}
    said |= _vectors_of_others(a, b, [diff.name for diff in suspects])
    scales = _scales_of_others(a, b, [diff.name for diff in suspects])
    for name, holder in scales.items():
        whole = foreign.get(name)
        if whole is not None and whole.holds == holder:
            continue  # the weight as a whole
        text = f"its block scales are those of {holder}"
        said[name] = f"{said[name]}; {text}" if name in said else text
    for name, one in foreign.items():
        if one.holds in (None, name) or name not in said or name in scales:
            continue
        if _has_own_scales(a, b, name):
            said[name] += "; its block scales stayed behind"
    named = [
        replace(diff, diagnosis=said[diff.name]) if diff.name in said else diff for diff in found
    ]
    common = [text.replace("the base's", "a's") for text in patterns(foreign.values())]
    if len(strange) > _MOST_NAMED:
        common.append(
            f"{len(strange) - _MOST_NAMED:,} more weights do not have the signs of their own; the "
            f"first {_MOST_NAMED:,} were looked up"
        )
    return named, tuple(common)


def _words(found: Foreign) -> str:
    if found.holds is None:
        return "it is none of a's weights of this shape, nor one transformed"
    return found.how.replace("the base's", "a's")


def _is_own(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    left, right = a.weights[name], b.weights[name]
    if not can_be_read(left) or not can_be_read(right):
        return True
    return agree(chunks_of(Reader(a), left), chunks_of(Reader(b), right))


def _vectors_of_others(a: Checkpoint, b: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """Find vectors of b that are byte for byte another one of a: norms, biases."""
    wanted = {name: _vector(b.weights[name]) for name in names}
    known: dict[tuple[int, bytes], list[str]] = {}
    reader, other = Reader(a), Reader(b)
    if any(wanted.values()):
        for name, weight in a.weights.items():
            entry = _vector(weight)
            if entry is not None:
                known.setdefault(_head(reader, entry), []).append(name)
    found = {}
    for name, entry in wanted.items():
        for holder in known.get(_head(other, entry), []) if entry is not None else []:
            one = _vector(a.weights[holder])
            if one is not None and entry is not None and _equal(reader, one, other, entry):
                found[name] = f"it is a's {holder}"
                break
    return found


def _vector(weight: LogicalWeight) -> TensorEntry | None:
    return weight.parts.get(Part.PLAIN) if len(weight.shape) == 1 else None


def _scales_of_others(a: Checkpoint, b: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """Find weights of b whose block scales are those of another weight of a."""
    wanted = {name: b.weights[name] for name in names if Part.BLOCK_SCALES in b.weights[name].parts}
    if not wanted:
        return {}
    reader, other = Reader(a), Reader(b)
    sizes = {weight.parts[Part.BLOCK_SCALES].nbytes for weight in wanted.values()}
    known: dict[tuple[int, bytes], list[str]] = {}
    for name, weight in a.weights.items():
        entry = weight.parts.get(Part.BLOCK_SCALES)
        if entry is not None and entry.nbytes in sizes:
            known.setdefault(_head(reader, entry), []).append(name)
    found = {}
    for name, weight in wanted.items():
        entry = weight.parts[Part.BLOCK_SCALES]
        holders = known.get(_head(other, entry), [])
        if name in holders:
            continue
        for holder in holders:
            if _equal(reader, a.weights[holder].parts[Part.BLOCK_SCALES], other, entry):
                found[name] = holder
                break
    return found


def _has_own_scales(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    left, right = _scales(a.weights, name), _scales(b.weights, name)
    if left is None or right is None or left.nbytes != right.nbytes:
        return False
    return _equal(Reader(a), left, Reader(b), right)


def _scales(weights: Mapping[str, LogicalWeight], name: str) -> TensorEntry | None:
    return weights[name].parts.get(Part.BLOCK_SCALES)


def _head(reader: Reader, entry: TensorEntry) -> tuple[int, bytes]:
    data = reader.rows(entry, 0, min(_HEAD, entry.nbytes), 1)
    return entry.nbytes, hashlib.blake2b(data.tobytes(), digest_size=16).digest()


def _equal(a: Reader, one: TensorEntry, b: Reader, two: TensorEntry) -> bool:
    for start in range(0, one.nbytes, _PIECE):
        stop = min(one.nbytes, start + _PIECE)
        left, right = a.rows(one, start, stop, 1), b.rows(two, start, stop, 1)
        if not same_bytes(left.reshape(-1), right.reshape(-1)):
            return False
    return True
