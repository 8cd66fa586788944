"""A checkpoint of any size with real headers and no data: files of holes.

From a config.json (and a hf_quant_config.json) come the expected tensors, laid over shards as
published checkpoints are: whole layers in order, a new shard where the next tensor would not fit.
The data is a hole in each file, which reads as zeros and takes no disk space.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvfp4check.checkpoint.expected import Expected, ExpectedTensor, expected_tensors
from nvfp4check.checkpoint.index import INDEX_FILE
from nvfp4check.checkpoint.quant_config import CONFIG, HF_QUANT_CONFIG, QuantConfig
from nvfp4check.checkpoint.writing import TensorSpec, encode_header
from nvfp4check.findings import CheckError

#: Shards of the published DeepSeek-V3.1-NVFP4.
DEFAULT_SHARDS = 163


@dataclass(frozen=True, slots=True)
class SynthReport:
    """What was written."""

    directory: Path
    shards: int
    tensors: int
    nbytes: int


def synthesize(
    config: dict[str, object],
    hf_quant_config: dict[str, object] | None,
    quantization: QuantConfig,
    directory: str | Path,
    shards: int = DEFAULT_SHARDS,
) -> SynthReport:
    """Write the sparse checkpoint of a configuration into a new or empty directory.

    Raises:
        CheckError: the configuration has no map of tensors, or the directory is not empty.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckError(f"{target}: is there and not an empty directory; give a new one")
    expected = expected_tensors(config, quantization)
    if expected.problems:
        raise CheckError("no checkpoint can be made: " + "; ".join(expected.problems))
    target.mkdir(parents=True, exist_ok=True)
    specs = [
        TensorSpec(tensor.name, tensor.dtypes[0], tensor.shape) for tensor in _in_order(expected)
    ]
    _check_space(target, specs)
    parts = _parts(specs, shards)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):06d}.safetensors"
        _write_sparse(target / name, part)
        weight_map.update((spec.name, name) for spec in part)
    total = sum(spec.nbytes for spec in specs)
    _write_json(target / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(target / CONFIG, config)
    if hf_quant_config is not None:
        _write_json(target / HF_QUANT_CONFIG, hf_quant_config)
    return SynthReport(target, len(parts), len(specs), total)


def _in_order(expected: Expected) -> Iterable[ExpectedTensor]:
    """The required tensors, the output norm and head after the layers and before MTP."""
    required = [tensor for tensor in expected.tensors.values() if not tensor.optional]
    mtp = tuple(f"model.layers.{layer}." for layer in expected.mtp_layers)

    def place(tensor: ExpectedTensor) -> int:
        if tensor.name.startswith(mtp) and mtp:
            return 3
        if tensor.name.startswith("model.layers."):
            return 1
        return 0 if tensor.name.startswith("model.embed_tokens") else 2

    return sorted(required, key=place)


def _parts(specs: Sequence[TensorSpec], shards: int) -> list[list[TensorSpec]]:
    """Cut the list into parts of about equal bytes."""
    total = sum(spec.nbytes for spec in specs)
    parts: list[list[TensorSpec]] = [[] for _ in range(max(1, shards))]
    position = 0
    for spec in specs:
        middle = position + spec.nbytes // 2
        parts[min(middle * len(parts) // max(1, total), len(parts) - 1)].append(spec)
        position += spec.nbytes
    return [part for part in parts if part]


def _write_sparse(path: Path, specs: Sequence[TensorSpec]) -> None:
    header = encode_header(specs, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs))


def _write_json(path: Path, document: dict[str, object]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _check_space(target: Path, specs: Sequence[TensorSpec]) -> None:
    """Refuse where even the headers would not fit; about 130 bytes a tensor, in two places."""
    needed = 300 * len(specs)
    free = shutil.disk_usage(target).free
    if free < needed:
        raise CheckError(f"{target}: {free:,} bytes free, expected at least {needed:,}")
