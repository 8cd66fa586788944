"""Both ends of the model: rows of the embedding, and the head a few rows at a time.

V vocabulary, T tokens, D = hidden_size.

Contract:
    logits     lm_head(norm(x)), stored as float32, or float64 of a float64 run
    best N     by falling logit, ties to the lower token; the log of the sum over the whole
               vocabulary in float64
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from nvfp4check.activations import FINAL_HIDDEN_FILE, LOGITS_FILE, write_tensors
from nvfp4check.checkpoint.naming import LogicalWeight, Part
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.values import torch_of
from nvfp4check.forward.bounds.watched import Tell, Watched
from nvfp4check.forward.linears import LinearSettings, StreamedLinear
from nvfp4check.forward.meter import Meter
from nvfp4check.forward.options import Logits
from nvfp4check.forward.reading import ReadAhead, entry_rows, rows_of
from nvfp4ref.formats import FP8_BLOCK


def embed(checkpoint: Checkpoint, weight: LogicalWeight, tokens: torch.Tensor) -> torch.Tensor:
    """Return the embedding of tokens [T], [T, D] as stored; only their rows are read."""
    entry = weight.parts[Part.PLAIN]
    distinct, place = torch.unique(tokens, return_inverse=True)
    rows = [entry_rows(entry, token, token + 1) for token in distinct.tolist()]
    return torch.cat([torch_of(checkpoint.tensor_bytes(row), row) for row in rows])[place]


class Head:
    """lm_head, of which a few rows are in memory at one time."""

    def __init__(
        self,
        weight: LogicalWeight,
        reader: ReadAhead,
        settings: LinearSettings,
        meter: Meter,
        tell: Tell | None = None,
    ) -> None:
        """Take a head; `tell` hears of the product with each part of it."""
        self._tell = tell
        self._reader = reader
        self._settings = settings
        self._meter = meter
        rows, columns = weight.shape
        height = FP8_BLOCK.block_shape[0]
        step = max(1, settings.chunk // (columns * 8 * height)) * height
        self._parts = [
            (start, rows_of(weight, start, min(start + step, rows)))
            for start in range(0, rows, step)
        ]

    def logits(self, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the logits [T, some] of successive parts of the vocabulary, each with its first."""
        self._reader.announce(part for _, part in self._parts)
        for start, part in self._parts:
            linear = StreamedLinear(part, self._reader, self._settings, self._meter)
            if self._tell is None:
                yield start, linear(hidden)
            else:
                yield start, Watched(linear, self._tell, "head")(hidden)


def write_logits(
    folder: Path,
    lengths: Mapping[str, int],
    hidden: torch.Tensor,
    head: Head,
    kept: Logits,
    size: int,
) -> None:
    """Write what is kept of the logits of packed prompts; `hidden` [T, D] is after the norm.

    `size` is that of the vocabulary, `lengths` the number of tokens of each prompt in turn.
    """
    if kept.kind == "hidden":
        states = torch.split(hidden, list(lengths.values()))
        write_tensors(folder / FINAL_HIDDEN_FILE, dict(zip(lengths, states, strict=True)))
    elif kept.kind == "topk":
        write_tensors(folder / LOGITS_FILE, _best(lengths, hidden, head, min(kept.top, size)))
    else:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        with _LogitsFile(folder / LOGITS_FILE, lengths, size, wide) as file:
            for start, logits in head.logits(hidden):
                file.write(start, logits)


def _best(
    lengths: Mapping[str, int], hidden: torch.Tensor, head: Head, count: int
) -> dict[str, torch.Tensor]:
    """Return values, tokens and logsumexp of each prompt."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    values = torch.empty(len(hidden), 0, dtype=wide, device=hidden.device)
    tokens = torch.empty(len(hidden), 0, dtype=torch.int32, device=hidden.device)
    total = torch.full((len(hidden),), float("-inf"), dtype=torch.float64, device=hidden.device)
    for start, logits in head.logits(hidden):
        total = torch.logaddexp(total, logits.double().logsumexp(dim=-1))
        new = torch.arange(start, start + logits.shape[1], dtype=torch.int32, device=hidden.device)
        values = torch.cat((values, logits.to(wide)), dim=1)
        tokens = torch.cat((tokens, new.expand(len(hidden), -1)), dim=1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        values, tokens = values[:, :count], tokens.gather(1, order)[:, :count]
    kept = {"values": values, "tokens": tokens, "logsumexp": total}
    return {
        f"{prompt}/{name}": part
        for name, tensor in kept.items()
        for prompt, part in zip(lengths, torch.split(tensor, list(lengths.values())), strict=True)
    }


class _LogitsFile:
    """A safetensors file of [T, V] logits, written column by column, then renamed into place."""

    def __init__(
        self, path: Path, lengths: Mapping[str, int], vocabulary: int, dtype: torch.dtype
    ) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._dtype = dtype
        self._itemsize = dtype.itemsize
        self._vocabulary = vocabulary
        self._lengths = lengths
        name = "F64" if dtype == torch.float64 else "F32"
        entries, offset = {}, 0
        for prompt, length in lengths.items():
            stop = offset + length * vocabulary * self._itemsize
            shape = [length, vocabulary]
            entries[prompt] = {"dtype": name, "shape": shape, "data_offsets": [offset, stop]}
            offset = stop
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        header += b" " * (-len(header) % 8)
        self._start = 8 + len(header)
        self._header = struct.pack("<Q", len(header)) + header
        self._size = self._start + offset

    def __enter__(self) -> "_LogitsFile":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")
        self._file.write(self._header)
        self._file.truncate(self._size)
        return self

    def write(self, first: int, logits: torch.Tensor) -> None:
        """Write columns `first` and on; one row for each token of all prompts in turn."""
        rows = logits.to(device="cpu", dtype=self._dtype).contiguous().numpy()
        for token, row in enumerate(rows):
            place = (token * self._vocabulary + first) * self._itemsize
            self._file.seek(self._start + place)
            self._file.write(row.tobytes())

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            os.replace(self._temporary, self._path)
        self._temporary.unlink(missing_ok=True)
