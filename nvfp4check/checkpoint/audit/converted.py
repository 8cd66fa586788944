"""The audit of one weight that was converted to FP8, by tiles, by rows or under one scale.

Contract:
    scale      the largest |x| of its tile, row or tensor, divided by 448, in the dtype in which
               the scales are stored; of zeros any
    element    the nearest of E4M3 to x / scale, ties to even, beyond 448 the largest. The quotient
               is rounded to the wider of both dtypes, so twice where compressed-tensors divides
               bfloat16 by bfloat16, and once to float32 where ModelOpt divides by float32
    different  elements that times their scale are another number than the stored ones
"""

import torch

from nvfp4check.checkpoint.audit.results import Copied, CopyAudit
from nvfp4check.checkpoint.audit.sources import (
    SCALE_DTYPES,
    Reader,
    Source,
    matrix_shape,
    read_scales,
    row_pieces,
    scale_of,
)
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4ref.formats import E4M3, FP8_BLOCK

_HEIGHT, _WIDTH = FP8_BLOCK.block_shape


def audit_converted(
    reader: Reader, weight: LogicalWeight, source: Source, base: LogicalWeight
) -> CopyAudit:
    """Convert the base's weight anew, and compare what both mean.

    Raises:
        StorageError: Bytes cannot be read.
    """
    rows, columns = matrix_shape(weight)
    pieces = row_pieces(rows, columns)
    stored = scale_of(weight)
    dtype = SCALE_DTYPES[stored.dtype]
    whole = None
    if stored.numel == 1:
        largest = [_values(source, *piece).abs().amax() for piece in pieces]
        whole = torch.stack(largest).amax().reshape(1, 1)
    codes = weight.parts[Part.CODES]
    different, first = 0, None
    for start, stop in pieces:
        x = _values(source, start, stop)
        amax = whole if whole is not None else _amax(x, weight.format)
        scales = _spread(_scales(amax, dtype), x, weight.format)
        elements = (x / scales).clamp(-E4M3.max, E4M3.max).to(torch.float8_e4m3fn)
        raw = torch.from_numpy(reader.rows(codes, start, stop, columns).copy())
        theirs = _spread(_stored_scales(reader, weight, start, stop), x, weight.format)
        mine = raw.view(torch.float8_e4m3fn).double() * theirs.double()
        unlike = mine != elements.double() * scales.double()
        different += int(unlike.sum())
        if first is None and bool(unlike.any()):
            first = start * columns + int(unlike.flatten().int().argmax())
    return CopyAudit(
        name=weight.name,
        format=weight.format.value,
        base_format=base.format.value,
        how=(Copied.DIFFERENT if different else Copied.CONVERTED).value,
        elements=rows * columns,
        different=different,
        first=first,
        tensor=codes.name if different else None,
    )


def _values(source: Source, start: int, stop: int) -> torch.Tensor:
    return source.tensor(start, stop, source.stored_dtype)


def _amax(x: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Give the largest |x| of each tile or row, in the dtype of x."""
    if form is not WeightFormat.FP8_BLOCK:
        return x.abs().amax(dim=1, keepdim=True)
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.abs(), (0, -columns % _WIDTH, 0, -rows % _HEIGHT))
    down, across = (
        -(-size // side) for size, side in zip(x.shape, FP8_BLOCK.block_shape, strict=True)
    )
    return padded.reshape(down, _HEIGHT, across, _WIDTH).amax(dim=(1, 3))


def _scales(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    wide = amax.float() if dtype is torch.float32 else amax
    scales = (wide / E4M3.max).to(dtype)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _stored_scales(reader: Reader, weight: LogicalWeight, start: int, stop: int) -> torch.Tensor:
    entry = scale_of(weight)
    if entry.numel == 1:
        return read_scales(reader, entry, 0, 1)
    if weight.format is WeightFormat.FP8_BLOCK:
        return read_scales(reader, entry, start // _HEIGHT, -(-stop // _HEIGHT))
    return read_scales(reader, entry, start, stop)


def _spread(scales: torch.Tensor, x: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Give scales in a shape that goes with x: of every element, of every row, or of all."""
    if form is not WeightFormat.FP8_BLOCK or scales.numel() == 1:
        return scales.reshape(-1, 1)
    tall = scales.repeat_interleave(_HEIGHT, dim=0)[: x.shape[0]]
    return tall.repeat_interleave(_WIDTH, dim=1)[:, : x.shape[1]]
