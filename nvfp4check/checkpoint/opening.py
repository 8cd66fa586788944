"""A checkpoint opened: files, headers, index and configuration, with every defect as data.

Nothing here loads a weight. A defect becomes a field that a rule reports; only a location where
there is nothing to open is an error.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nvfp4check.checkpoint.documents import read_json
from nvfp4check.checkpoint.header import HeaderError, ShardHeader, TensorEntry, read_header
from nvfp4check.checkpoint.index import INDEX_FILE, Index, read_index
from nvfp4check.checkpoint.locations import open_storage
from nvfp4check.checkpoint.naming import LogicalWeight, logical_weights
from nvfp4check.checkpoint.quant_config import (
    CONFIG,
    HF_QUANT_CONFIG,
    QuantConfig,
    effective,
    from_config,
    from_hf_quant_config,
)
from nvfp4check.checkpoint.storage import LocalStorage, Storage
from nvfp4check.checkpoint.values import scalar_of, torch_of
from nvfp4check.findings import CheckError

if TYPE_CHECKING:
    import torch

GENERATION_CONFIG = "generation_config.json"
_CONNECTIONS = 8
_SCALAR_BYTES = 8
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(eq=False, repr=False)
class Checkpoint:
    """A checkpoint as it lies there, sound or not."""

    location: str
    storage: Storage
    #: Every file, with its size; folders below it included.
    files: dict[str, int]
    #: File names that must not be opened, on disk or named by the index, with the reason.
    unsafe: dict[str, str]
    #: Headers of the shards that could be read.
    shards: dict[str, ShardHeader]
    #: Shards whose header cannot be believed, with the reason.
    unreadable: dict[str, str]
    #: Shards that the index names and that are not there.
    missing_shards: tuple[str, ...]
    #: Safetensors files beside the index that it does not name.
    stray_shards: tuple[str, ...]
    #: Files that hold pickled code. They are never opened.
    pickles: tuple[str, ...]
    #: Tensors by name. Where a name stands in two shards, the one the index means, else the first.
    tensors: dict[str, TensorEntry]
    #: Every place of the names that stand in more than one shard.
    duplicates: dict[str, list[TensorEntry]]
    index: Index | None
    config: dict[str, object] | None
    hf_quant_config: dict[str, object] | None
    generation_config: dict[str, object] | None
    #: File and flaw, for every flaw of the JSON files, those of form included.
    json_problems: list[tuple[str, str]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.location}: {len(self.tensors):,} tensors>"

    @cached_property
    def architecture(self) -> str | None:
        """The first of config.json's `architectures`."""
        architectures = (self.config or {}).get("architectures")
        if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
            return architectures[0]
        return None

    @cached_property
    def config_quantization(self) -> QuantConfig | None:
        """What config.json declares; None where it declares nothing."""
        return _declared(from_config(self.config)) if self.config is not None else None

    @cached_property
    def hf_quantization(self) -> QuantConfig | None:
        """What hf_quant_config.json declares; None where it declares nothing."""
        if self.hf_quant_config is None:
            return None
        return _declared(from_hf_quant_config(self.hf_quant_config))

    @cached_property
    def quantization(self) -> QuantConfig:
        """What the checkpoint was made with: hf_quant_config.json's word before config.json's."""
        return effective(self.hf_quantization, self.config_quantization)

    @cached_property
    def weights(self) -> dict[str, LogicalWeight]:
        """The logical weights, by the names of the unquantised model."""
        return logical_weights(self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the headers."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def tensor_bytes(
        self, entry: TensorEntry, start: int = 0, stop: int | None = None
    ) -> npt.NDArray[np.uint8]:
        """Give bytes `start` to `stop` of a tensor; mapped, and not copied, where it is local.

        Raises:
            StorageError: the bytes cannot be read.
        """
        first = entry.start + start
        last = entry.stop if stop is None else entry.start + stop
        if not entry.start <= first <= last <= entry.stop:
            raise ValueError(f"{entry.name}: bytes {start} to {stop} of {entry.nbytes} asked")
        view = self.storage.view(entry.shard)
        data = view[first:last] if view is not None else self.storage.read(entry.shard, first, last)
        return np.frombuffer(data, dtype=np.uint8)

    def torch(self, entry: TensorEntry) -> "torch.Tensor":
        """Load a tensor. It owns its memory; codes of sub-byte formats stay packed, as uint8."""
        return torch_of(self.tensor_bytes(entry), entry)

    def scalar(self, entry: TensorEntry) -> float:
        """Read the one value of a tensor of one floating-point element.

        Raises:
            ValueError: the tensor has another number of elements, or another dtype.
        """
        header = self.shards.get(entry.shard)
        if header is not None and self.storage.view(entry.shard) is None:
            # Each would wait for the network by itself.
            scalars = (other for other in header.entries if other.nbytes <= _SCALAR_BYTES)
            self.storage.gather(entry.shard, ((other.start, other.stop) for other in scalars))
        return scalar_of(self.tensor_bytes(entry), entry)


def open_checkpoint(location: str | Path) -> Checkpoint:
    """Open a checkpoint: list its files, read headers, index and configuration.

    Raises:
        CheckError: there is no checkpoint at the location.
    """
    storage = open_storage(location)
    files = storage.list()
    unsafe = dict(storage.unsafe)
    documents, problems = _documents(storage)
    index = None
    if INDEX_FILE in files:
        index, index_problems = read_index(storage)
        unsafe.update(index.unsafe)
        problems += [(INDEX_FILE, why) for why in index_problems]
    top = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    named = sorted(set(index.weight_map.values())) if index else []
    present = sorted({*top, *(name for name in named if name in files)})
    if not present and index is None and not any(name.endswith(".safetensors") for name in unsafe):
        raise CheckError(_nothing_to_open(str(location), files))
    shards, unreadable = _headers(storage, present)
    tensors, duplicates = _tensors(shards, index.weight_map if index else {})
    return Checkpoint(
        location=str(location),
        storage=storage,
        files=files,
        unsafe=unsafe,
        shards=shards,
        unreadable=unreadable,
        missing_shards=tuple(name for name in named if name not in files and name not in unsafe),
        stray_shards=tuple(name for name in top if index and name not in set(named)),
        pickles=tuple(name for name in files if name.lower().endswith(PICKLE_SUFFIXES)),
        tensors=tensors,
        duplicates=duplicates,
        index=index,
        config=documents[CONFIG],
        hf_quant_config=documents[HF_QUANT_CONFIG],
        generation_config=documents[GENERATION_CONFIG],
        json_problems=problems + _quantization_problems(documents),
    )


def _declared(quantization: QuantConfig) -> QuantConfig | None:
    return quantization if quantization.producer is not None else None


def _documents(
    storage: Storage,
) -> tuple[dict[str, dict[str, object] | None], list[tuple[str, str]]]:
    documents: dict[str, dict[str, object] | None] = {}
    problems: list[tuple[str, str]] = []
    for name in (CONFIG, HF_QUANT_CONFIG, GENERATION_CONFIG):
        documents[name] = None
        if name in storage.list():
            documents[name], flaws = read_json(storage, name)
            problems += [(name, flaw) for flaw in flaws]
    return documents, problems


def _quantization_problems(
    documents: Mapping[str, dict[str, object] | None],
) -> list[tuple[str, str]]:
    found = []
    config, hf = documents[CONFIG], documents[HF_QUANT_CONFIG]
    for file, declared in (
        (CONFIG, from_config(config) if config is not None else None),
        (HF_QUANT_CONFIG, from_hf_quant_config(hf) if hf is not None else None),
    ):
        if declared is not None:
            found += [(file, why.removeprefix(f"{file}: ")) for why in declared.problems]
    return found


def _headers(storage: Storage, names: list[str]) -> tuple[dict[str, ShardHeader], dict[str, str]]:
    def read(name: str) -> ShardHeader | HeaderError:
        try:
            return read_header(storage, name)
        except HeaderError as error:
            return error

    # Remote reads wait for the network, and wait side by side.
    workers = 1 if isinstance(storage, LocalStorage) else _CONNECTIONS
    with ThreadPoolExecutor(workers) as pool:
        found = list(zip(names, pool.map(read, names), strict=True))
    shards = {name: header for name, header in found if isinstance(header, ShardHeader)}
    return shards, {name: str(why) for name, why in found if isinstance(why, HeaderError)}


def _tensors(
    shards: Mapping[str, ShardHeader], weight_map: Mapping[str, str]
) -> tuple[dict[str, TensorEntry], dict[str, list[TensorEntry]]]:
    tensors: dict[str, TensorEntry] = {}
    duplicates: dict[str, list[TensorEntry]] = {}
    for header in shards.values():
        for entry in header.entries:
            first = tensors.setdefault(entry.name, entry)
            if first is not entry:
                duplicates.setdefault(entry.name, [first]).append(entry)
    for name, places in duplicates.items():
        meant = (entry for entry in places if entry.shard == weight_map.get(name))
        tensors[name] = next(meant, places[0])
    return tensors, duplicates


def _nothing_to_open(location: str, files: Mapping[str, int]) -> str:
    if not files:
        return f"{location}: the directory is empty; expected .safetensors files and config.json"
    pickles = [name for name in files if name.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"{location}: no .safetensors file, only pickles such as {pickles[0]}, which run code "
            "when loaded and are never opened; convert the checkpoint to safetensors"
        )
    return (
        f"{location}: no .safetensors file and no {INDEX_FILE} among {len(files)} files; give the "
        "directory that holds the shards"
    )
