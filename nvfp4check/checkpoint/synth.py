"""A checkpoint of any size made from its configuration: real headers, and plausible data or holes.

From a config.json (and a hf_quant_config.json) come the expected tensors, laid over shards as
published checkpoints are: whole layers in order, a new shard where the next tensor would not fit.
Without values the data is a hole in each file, which reads as zeros and takes no disk space.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nvfp4check.checkpoint.expected import Expected, ExpectedTensor, expected_tensors
from nvfp4check.checkpoint.index import INDEX_FILE
from nvfp4check.checkpoint.opening import GENERATION_CONFIG
from nvfp4check.checkpoint.quant_config import CONFIG, HF_QUANT_CONFIG, QuantConfig
from nvfp4check.checkpoint.synth_values import Values
from nvfp4check.checkpoint.writing import TensorSpec, encode_header
from nvfp4check.findings import CheckError

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

#: Bytes of a shard unless told otherwise: DeepSeek-V3.1-NVFP4 has 163 of them.
_SHARD_BYTES = 2.54e9


@dataclass(frozen=True, slots=True)
class SynthReport:
    """What was written."""

    directory: Path
    shards: int
    tensors: int
    nbytes: int


#: Hears how many of how many bytes are written.
Progress = Callable[[int, int], None]


def synthesize(
    config: dict[str, object],
    hf_quant_config: dict[str, object] | None,
    quantization: QuantConfig,
    directory: str | Path,
    shards: int | None = None,
    *,
    values: Values | None = None,
    generation_config: dict[str, object] | None = None,
    progress: Progress | None = None,
) -> SynthReport:
    """Write the checkpoint of a configuration into a new or empty directory; sparse without values.

    `shards` defaults to files of about the published size.

    Raises:
        CheckError: the configuration has no map of tensors, or the directory is not empty.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckError(f"{target}: is there and not an empty directory; give a new one")
    expected = expected_tensors(config, quantization)
    if expected.problems:
        raise CheckError("no checkpoint can be made: " + "; ".join(expected.problems))
    specs = [
        TensorSpec(tensor.name, tensor.dtypes[0], tensor.shape) for tensor in _in_order(expected)
    ]
    total = sum(spec.nbytes for spec in specs)
    target.mkdir(parents=True, exist_ok=True)
    _check_space(target, 300 * len(specs) + (0 if values is None else total))
    parts = _parts(specs, max(1, round(total / _SHARD_BYTES)) if shards is None else shards)
    weight_map: dict[str, str] = {}
    content = None if values is None else _Content(values, expected)
    written = 0
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):06d}.safetensors"
        if content is None:
            _write_sparse(target / name, part)
        else:
            for size in content.write(target / name, part):
                written += size
                if progress is not None:
                    progress(written, total)
        weight_map.update((spec.name, name) for spec in part)
    _write_json(target / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(target / CONFIG, config)
    for file, document in (
        (HF_QUANT_CONFIG, hf_quant_config),
        (GENERATION_CONFIG, generation_config),
    ):
        if document is not None:
            _write_json(target / file, document)
    return SynthReport(target, len(parts), len(specs), total)


class _Content:
    """Writes tensors in their order; scales that were made with their codes wait for their turn."""

    def __init__(self, values: Values, expected: Expected) -> None:
        self._values = values
        self._linears = expected.linears
        self._waiting: dict[str, bytes] = {}

    def write(self, path: Path, specs: Sequence[TensorSpec]) -> Iterator[int]:
        """Write a shard, and yield the size of each piece when it is written."""
        with path.open("wb") as file:
            file.write(encode_header(specs, {"format": "pt"}))
            for spec in specs:
                written = 0
                for piece in self._pieces(spec):
                    written += file.write(piece)
                    yield len(piece)
                if written != spec.nbytes:
                    raise ValueError(f"{spec.name}: {written} bytes made, {spec.nbytes} promised")

    def _pieces(self, spec: TensorSpec) -> Iterator[bytes]:
        if spec.name in self._waiting:
            yield self._waiting.pop(spec.name)
            return
        module, _, leaf = spec.name.rpartition(".")
        if leaf == "weight_scale_2":
            yield _bytes(self._values.global_decode_scale(module))
        elif leaf == "input_scale":
            yield _bytes(self._values.input_scale(module))
        elif spec.dtype == "U8":
            pairs = self._values.nvfp4(module, self._linears[module])
            yield from self._with_scales(f"{module}.weight_scale", pairs)
        elif spec.dtype == "F8_E4M3":
            pairs = self._values.fp8(module, self._linears[module])
            yield from self._with_scales(f"{module}.weight_scale_inv", pairs)
        else:
            for values in self._values.plain(spec.name, spec.shape, _DTYPES[spec.dtype]):
                yield _bytes(values)

    def _with_scales(self, name: str, pairs: Iterator[tuple[torch.Tensor, ...]]) -> Iterator[bytes]:
        scales = []
        for elements, scale in pairs:
            scales.append(_bytes(scale))
            yield _bytes(elements)
        self._waiting[name] = b"".join(scales)


def _bytes(values: torch.Tensor) -> bytes:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


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


def _check_space(target: Path, needed: int) -> None:
    """Refuse where headers (about 130 bytes a tensor, in two places) and data would not fit."""
    free = shutil.disk_usage(target).free
    if free < needed:
        raise CheckError(f"{target}: {free:,} bytes free, expected at least {needed:,}")
