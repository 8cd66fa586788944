"""Safetensors files written: the header, then the data it promises.

Layout as the safetensors library writes it: 8 bytes of length, JSON padded with spaces so that the
data begins at a multiple of 8, the tensors in the given order.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from nvfp4check.checkpoint.header import DTYPE_BITS

_ALIGNMENT = 8


class TensorSpec(NamedTuple):
    """Name, safetensors dtype and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes its data takes."""
        count = 1
        for size in self.shape:
            count *= size
        return -(-count * DTYPE_BITS[self.dtype] // 8)


def encode_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Make the bytes of a file up to its data, for tensors that follow one another."""
    document: dict[str, object] = {}
    if metadata:
        document["__metadata__"] = dict(metadata)
    position = 0
    for spec in specs:
        stop = position + spec.nbytes
        document[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    return frame_header(document)


def frame_header(document: Mapping[str, object] | Sequence[object] | bytes) -> bytes:
    """Put length and padding around a header, whatever it says."""
    text = (
        document
        if isinstance(document, bytes)
        else json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    )
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
