"""Configurations compared by what they mean to an engine: neither order nor spelling counts.

model          what an engine computes with: sizes, rotary embedding, routing
quantization   what is declared to be quantised, and how; exclude lists by what they cover
tokenizer      what text becomes
generation     sampling defaults
files          what holds the tensors, and the index over them (`files`)
note           what no engine computes with: versions, names, dates, sums
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from nvfp4check.checkpoint.diff.classes import FailOn
from nvfp4check.checkpoint.diff.results import number_json
from nvfp4check.checkpoint.documents import parse_json
from nvfp4check.checkpoint.excludes import ModuleTable
from nvfp4check.checkpoint.naming import Part
from nvfp4check.checkpoint.opening import GENERATION_CONFIG, Checkpoint
from nvfp4check.checkpoint.quant_config import CONFIG, HF_QUANT_CONFIG, QuantConfig
from nvfp4check.checkpoint.storage import StorageError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "merges.txt",
)
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_NOTES = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "_attn_implementation_autoset",
        "auto_map",
    }
)
_MOST_BYTES = 64 << 20
_SHOWN = 3


class Matters(StrEnum):
    """To what a difference matters."""

    MODEL = "model"
    QUANTIZATION = "quantization"
    TOKENIZER = "tokenizer"
    GENERATION = "generation"
    FILES = "files"
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigDiff:
    """One setting that differs. `a` and `b` are plain JSON, None where it is absent."""

    file: str
    key: str
    matters: Matters
    a: Any
    b: Any

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {**asdict(self), "matters": self.matters.value}

    def fails(self, fail_on: FailOn, *, formats_changed: bool) -> bool:
        """Whether it fails the comparison.

        What is declared of the quantisation may differ where the weights' formats do.
        """
        if fail_on is FailOn.BYTES:
            return True
        if self.matters is Matters.QUANTIZATION:
            return not formats_changed or fail_on is FailOn.REQUANTIZED
        if self.matters is Matters.GENERATION:
            return fail_on is FailOn.REQUANTIZED
        return self.matters in (Matters.MODEL, Matters.TOKENIZER, Matters.FILES)


def compare_configs(a: Checkpoint, b: Checkpoint) -> list[ConfigDiff]:
    """Compare every configuration that an engine reads."""
    return in_order([*_config(a, b), *_quantization(a, b), *_generation(a, b), *_tokenizer(a, b)])


def in_order(found: Iterable[ConfigDiff]) -> list[ConfigDiff]:
    """Sort differences by what they matter to."""
    order = list(Matters)
    return sorted(found, key=lambda diff: (order.index(diff.matters), diff.file, diff.key))


def _config(a: Checkpoint, b: Checkpoint) -> Iterator[ConfigDiff]:
    left, right = (
        {k: v for k, v in (c.config or {}).items() if k not in _QUANTIZATION_KEYS} for c in (a, b)
    )
    for key, one, two in _differing(left, right):
        last = key.rpartition(".")[2]
        matters = Matters.NOTE if last in _NOTES else Matters.MODEL
        yield ConfigDiff(file=CONFIG, key=key, matters=matters, a=one, b=two)


def _generation(a: Checkpoint, b: Checkpoint) -> Iterator[ConfigDiff]:
    left, right = a.generation_config or {}, b.generation_config or {}
    if (a.generation_config is None) != (b.generation_config is None):
        has = [checkpoint.generation_config is not None for checkpoint in (a, b)]
        yield ConfigDiff(
            file=GENERATION_CONFIG,
            key="",
            matters=Matters.GENERATION,
            a="present" if has[0] else None,
            b="present" if has[1] else None,
        )
        return
    for key, one, two in _differing(left, right):
        matters = Matters.NOTE if key in _NOTES or key == "_from_model_config" else None
        yield ConfigDiff(
            file=GENERATION_CONFIG, key=key, matters=matters or Matters.GENERATION, a=one, b=two
        )


def _quantization(a: Checkpoint, b: Checkpoint) -> Iterator[ConfigDiff]:
    """Compare what each file declares, and what the declarations cover."""
    for file, left, right in (
        (CONFIG, a.config_quantization, b.config_quantization),
        (HF_QUANT_CONFIG, a.hf_quantization, b.hf_quantization),
    ):
        if left is None and right is None:
            continue
        one, two = _facts(left), _facts(right)
        if left is None or right is None:
            yield ConfigDiff(
                file=file,
                key="quantization",
                matters=Matters.QUANTIZATION,
                a=None if left is None else _declared(one),
                b=None if right is None else _declared(two),
            )
            continue
        for key in one:
            if one[key] != two[key]:
                note = key == "producer version"
                yield ConfigDiff(
                    file=file,
                    key=f"quantization: {key}",
                    matters=Matters.NOTE if note else Matters.QUANTIZATION,
                    a=one[key],
                    b=two[key],
                )
        yield from _excludes(file, a, b, left, right)


def _facts(declared: QuantConfig | None) -> dict[str, Any]:
    config = declared or QuantConfig()
    return {
        "method": config.producer,
        "producer version": config.producer_version,
        "algorithm": config.algo,
        "group size": config.group_size,
        "KV cache": config.kv_cache_algo,
        "quantises activations": config.quantizes_activations,
        "weight block size": list(config.weight_block_size) if config.weight_block_size else None,
        "scale format": config.scale_fmt,
    }


def _declared(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)


def _excludes(
    file: str, a: Checkpoint, b: Checkpoint, left: QuantConfig | None, right: QuantConfig | None
) -> Iterator[ConfigDiff]:
    """Compare exclude lists by the linears of this model that they cover."""
    if left is None or right is None:
        return
    modules = {
        weight.module
        for checkpoint in (a, b)
        for weight in checkpoint.weights.values()
        if len(weight.shape) >= 2 and Part.BIAS not in weight.parts
    }
    table = ModuleTable(modules)
    covered = [
        frozenset().union(*(table.matched(pattern) for pattern in config.exclude))
        for config in (left, right)
    ]
    if covered[0] != covered[1]:
        yield ConfigDiff(
            file=file,
            key="quantization: excluded linears",
            matters=Matters.QUANTIZATION,
            a=_named(covered[0] - covered[1], len(covered[0])),
            b=_named(covered[1] - covered[0], len(covered[1])),
        )


def _named(names: frozenset[str], total: int) -> str:
    if not names:
        return f"{total:,} covered"
    shown = sorted(names)[:_SHOWN]
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{total:,} covered; only here {', '.join(shown)}{more}"


def _tokenizer(a: Checkpoint, b: Checkpoint) -> Iterator[ConfigDiff]:
    for name in _TOKENIZER_FILES:
        if name not in a.files and name not in b.files:
            continue
        one, two = _content(a, name), _content(b, name)
        if one is None or two is None:
            yield ConfigDiff(
                file=name,
                key="",
                matters=Matters.TOKENIZER,
                a=None if one is None else "present",
                b=None if two is None else "present",
            )
            continue
        if one == two:
            continue
        documents = [_document(name, data) for data in (one, two)]
        if documents[0] is None or documents[1] is None:
            digests = [hashlib.sha256(data).hexdigest()[:16] for data in (one, two)]
            yield ConfigDiff(
                file=name,
                key="sha256",
                matters=Matters.TOKENIZER,
                a=digests[0],
                b=digests[1],
            )
            continue
        for key, left, right in _differing(documents[0], documents[1]):
            matters = Matters.NOTE if key in _NOTES else Matters.TOKENIZER
            yield ConfigDiff(file=name, key=key, matters=matters, a=left, b=right)


def _content(checkpoint: Checkpoint, name: str) -> bytes | None:
    size = checkpoint.files.get(name)
    if size is None or size > _MOST_BYTES:
        return None
    try:
        return bytes(checkpoint.storage.read(name, 0, size))
    except StorageError:
        return None


def _document(name: str, data: bytes) -> dict[str, Any] | None:
    if not name.endswith(".json"):
        return None
    document, _ = parse_json(data.decode("utf-8", "replace"))
    return document


def _differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield key and both values of what differs; a null is as good as nothing."""
    for key in sorted({*left, *right}):
        one, two = left.get(key), right.get(key)
        if _same(one, two):
            continue
        large = max(len(v) if isinstance(v, (dict, list)) else 0 for v in (one, two)) > 64
        if isinstance(one, dict) and isinstance(two, dict) and not large:
            for below, this, that in _differing(one, two):
                yield f"{key}.{below}", this, that
        elif large:
            yield key, *_counted(one, two)
        else:
            yield key, _plain(one), _plain(two)


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, dict) and isinstance(two, dict):
        return all(_same(one.get(key), two.get(key)) for key in {*one, *two})
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_same, one, two))
    # True is not 1, and 1.0 is.
    return isinstance(one, bool) == isinstance(two, bool) and bool(one == two)


def _counted(one: Any, two: Any) -> tuple[Any, Any]:
    """Say of a large table how many entries are only there, or are otherwise."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = [key for key in {*one, *two} if not _same(one.get(key), two.get(key))]
        counts = [sum(key in side for key in keys) for side in (one, two)]
        return (
            f"{len(one):,} entries, {counts[0]:,} of them not so in b",
            f"{len(two):,} entries, {counts[1]:,} of them not so in a",
        )
    return _sized(one), _sized(two)


def _sized(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        digest = hashlib.sha256(repr(value).encode("utf-8", "replace")).hexdigest()[:12]
        return f"{len(value):,} entries, sha256 {digest}"
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return number_json(value)
    if isinstance(value, (dict, list)):
        text = repr(value)
        return text if len(text) <= 200 else f"{text[:199]}…"
    return value
