"""model.safetensors.index.json, read without trusting it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nvfp4check.checkpoint.documents import read_json
from nvfp4check.checkpoint.storage import Storage, unsafe_name

INDEX_FILE = "model.safetensors.index.json"
_MAX_NAMED = 20


@dataclass(frozen=True, slots=True)
class Index:
    """Which shard holds which tensor, as far as the index says it in the right form."""

    file: str
    weight_map: Mapping[str, str]
    total_size: int | None
    metadata: Mapping[str, object] = field(default_factory=dict)
    #: Shard names that must not be opened, with the reason. Their tensors are not in weight_map.
    unsafe: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_index(storage: Storage) -> tuple[Index, tuple[str, ...]]:
    """Read the index; what cannot be used is left out, and listed."""
    document, flaws = read_json(storage, INDEX_FILE)
    problems = list(flaws)
    weight_map: dict[str, str] = {}
    unsafe: dict[str, str] = {}
    metadata: dict[str, object] = {}
    if document is not None:
        _read_weight_map(document.get("weight_map"), weight_map, unsafe, problems)
        value = document.get("metadata", {})
        if isinstance(value, dict):
            metadata = value
        else:
            problems.append("metadata is not an object")
    total_size = metadata.get("total_size")
    if type(total_size) is float and total_size.is_integer():
        total_size = int(total_size)
    if total_size is not None and type(total_size) is not int:
        problems.append(f"metadata.total_size is {str(total_size)[:40]!r}, expected a whole number")
        total_size = None
    index = Index(INDEX_FILE, weight_map, total_size, metadata, unsafe, tuple(problems))
    return index, index.problems


def _read_weight_map(
    value: object, weight_map: dict[str, str], unsafe: dict[str, str], problems: list[str]
) -> None:
    if not isinstance(value, dict):
        found = "missing" if value is None else f"a {type(value).__name__}"
        problems.append(f"weight_map is {found}, expected an object of tensor name to file name")
        return
    wrong = 0
    shared: dict[str, str] = {}
    for tensor, shard in value.items():
        if not isinstance(shard, str):
            wrong += 1
            if wrong <= _MAX_NAMED:
                problems.append(
                    f"weight_map[{tensor[:200]!r}] is {str(shard)[:40]!r}, expected a name"
                )
            continue
        if shard not in shared and shard not in unsafe:
            why = unsafe_name(shard)
            if why is not None:
                unsafe[shard] = why
            shared[shard] = shard
        if shard not in unsafe:
            weight_map[tensor] = shared[shard]
    if wrong > _MAX_NAMED:
        problems.append(f"… and {wrong - _MAX_NAMED:,} more entries of weight_map that are no name")
