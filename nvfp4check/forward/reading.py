"""Weights read from a checkpoint by a thread that runs ahead of the computation.

Whoever computes says early what it will need, and takes it when it does. Taken weights leave the
reader; those waiting to be taken never hold more than a limit of bytes, unless one alone does.
Whatever was not announced, or is still waiting its turn, is read on the spot: a wrong order costs
time and cannot lock.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Self

import numpy as np
import torch

from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.storage import Storage, StorageError
from nvfp4check.findings import CheckError
from nvfp4check.forward.meter import Meter
from nvfp4ref.formats import FP8_BLOCK

#: The dtypes that a weight of the forward may be stored in.
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}

#: The stored bytes of each part of a weight, flat and in memory of their own.
RawParts = Mapping[Part, torch.Tensor]


class ReadAhead:
    """Reads announced weights in their order, in one thread."""

    def __init__(
        self, storage: Storage, limit: int, meter: Meter, taken: Callable[[], None] = lambda: None
    ) -> None:
        self._storage = storage
        self._limit = limit
        self._meter = meter
        #: Called after each weight that was taken.
        self._taken = taken
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        #: Announced, and not handed to the thread for lack of room.
        self._announced: deque[LogicalWeight] = deque()
        #: With the thread: waiting, being read, or ready to be taken.
        self._handed: dict[str, Future[RawParts]] = {}
        self._held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._announced.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def announce(self, weights: Iterable[LogicalWeight]) -> None:
        """Say what will be taken next, in this order."""
        self._announced.extend(weights)
        self._hand_over()

    def take(self, weight: LogicalWeight) -> RawParts:
        """Return the bytes of a weight; they are the caller's from here on.

        Raises:
            CheckError: They cannot be read.
        """
        reading = self._handed.pop(weight.name, None)
        if reading is not None:
            self._held -= weight.nbytes
        with self._meter.timing("wait"):
            if reading is not None and not reading.cancel():
                parts = reading.result()
            else:
                if reading is None and weight in self._announced:
                    self._announced.remove(weight)
                parts = self._read(weight)
        self._meter.bytes_read += weight.nbytes
        self._taken()
        self._hand_over()
        return parts

    def _hand_over(self) -> None:
        while self._announced and (
            not self._held or self._held + self._announced[0].nbytes <= self._limit
        ):
            weight = self._announced.popleft()
            self._held += weight.nbytes
            self._handed[weight.name] = self._thread.submit(self._read_ahead, weight)

    def _read_ahead(self, weight: LogicalWeight) -> RawParts:
        with self._meter.timing("read"):
            return self._read(weight)

    def _read(self, weight: LogicalWeight) -> RawParts:
        parts = {}
        for part, entry in weight.parts.items():
            try:
                data = self._storage.read(entry.shard, entry.start, entry.stop)
            except StorageError as error:
                raise CheckError(f"{entry.name}: {error}") from error
            parts[part] = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
        return parts


def as_stored(data: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """Return the bytes of a tensor as its dtype and shape, without a copy."""
    return data.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)


def rows_of(weight: LogicalWeight, start: int, stop: int) -> LogicalWeight:
    """Return rows start to stop of a weight as a weight of its own.

    Raises:
        ValueError: The rows do not begin at the border of a block of 128 x 128.
    """
    height = FP8_BLOCK.block_shape[0]
    if weight.format is WeightFormat.FP8_BLOCK and start % height:
        raise ValueError(f"{weight.name}: row {start} is not the first of a block of {height}")
    parts: dict[Part, TensorEntry] = {}
    for part, entry in weight.parts.items():
        if part is Part.SCALE_INV:
            parts[part] = entry_rows(entry, start // height, -(-stop // height))
        elif part in (Part.CODES, Part.BLOCK_SCALES, Part.PLAIN) or (
            part is Part.SCALE and entry.shape[:1] == weight.shape[:1]
        ):
            parts[part] = entry_rows(entry, start, stop)
        else:
            parts[part] = entry
    name = f"{weight.name}[{start}:{stop}]"
    return replace(weight, name=name, parts=parts, shape=(stop - start, *weight.shape[1:]))


def entry_rows(entry: TensorEntry, start: int, stop: int) -> TensorEntry:
    """Return rows start to stop of a stored tensor as a tensor of its own."""
    row = entry.nbytes // entry.shape[0]
    return replace(
        entry,
        shape=(stop - start, *entry.shape[1:]),
        start=entry.start + start * row,
        stop=entry.start + stop * row,
    )
