"""NV801: the scales of FP8 weights, of the checkpoint or of its base: by tile, row or tensor."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.quant_config import FP8_BLOCK as FP8_BLOCK_ALGO
from nvfp4check.checkpoint.rules.base import (
    Problem,
    Rule,
    RuleContext,
    RuleLevel,
    counted,
    printable,
    rule,
)
from nvfp4check.checkpoint.rules.shared import Absence, at
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.findings import Severity
from nvfp4ref.formats import FP8_BLOCK

DEEPSEEK_FP8 = "deepseek-fp8"
_UE8M0 = "ue8m0"
_FP8 = (WeightFormat.FP8, WeightFormat.FP8_BLOCK)
_MANTISSA = np.uint32(0x7FFFFF)
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


@rule(
    "NV801",
    "fp8-scale",
    Severity.ERROR,
    fires_when="a weight in DeepSeek's FP8, of the checkpoint or of --base, lacks its "
    "weight_scale_inv, or the scales of an FP8 weight have the wrong shape, are zero, negative or "
    "not finite, or are no powers of two though scale_fmt says ue8m0",
    why="The scale multiplies its 128 x 128 block, row or tensor, whatever its name says. Engines "
    "that take ue8m0 at its word keep the exponent and drop the mantissa: the block comes out up "
    "to two times off. A base with such scales makes every conversion of it wrong.",
    repair="Fetch the tensor again from the published model. Where scales are no powers of two, "
    "take `scale_fmt` out of quantization_config, or requantise with scales rounded up.",
    incidents=(
        "https://github.com/sgl-project/sglang/issues/39193",
        "https://github.com/vllm-project/vllm/pull/51946",
        "https://github.com/huggingface/transformers/issues/47030",
    ),
)
def fp8_scale(context: RuleContext) -> Iterator[Problem]:
    """Check the scales of the checkpoint and of its base."""
    yield from _scales(context, context.checkpoint, "")
    if context.base is not None:
        yield from _scales(context, context.base, "in the base: ")


def _scales(context: RuleContext, checkpoint: Checkpoint, where: str) -> Iterator[Problem]:
    declared = checkpoint.quantization
    block = declared.weight_block_size or FP8_BLOCK.block_shape
    absence = Absence(checkpoint)
    ours = declared.producer == DEEPSEEK_FP8
    for weight in checkpoint.weights.values():
        if weight.format not in _FP8 or Part.CODES not in weight.parts or len(weight.shape) != 2:
            continue
        tiles, scale = weight.parts.get(Part.SCALE_INV), weight.parts.get(Part.SCALE)
        if tiles is None and declared.algo_of(weight.module) == FP8_BLOCK_ALGO:
            tiles = scale
        if tiles is None and scale is not None:
            yield from _of_rows(context, checkpoint, weight, scale, where)
            continue
        if tiles is None:
            name = f"{weight.module}.weight_scale_inv"
            if not ours or absence.explained(name) or declared.excludes(weight.module):
                continue
            if absence.uncertain:
                context.skip("NV801 fp8-scale, missing scales", absence.why)
                continue
            yield at(
                weight.parts[Part.CODES],
                f"{where}{printable(weight.name)} has no weight_scale_inv",
                expected=name,
            )
            continue
        expected = tuple(-(-n // side) for n, side in zip(weight.shape, block, strict=True))
        if tiles.shape != expected:
            yield at(
                tiles,
                f"{where}shape {list(tiles.shape)}, expected {list(expected)}: one for each block "
                f"of {block[0]} x {block[1]} of a weight of {list(weight.shape)}",
                observed=[*tiles.shape],
                expected=[*expected],
            )
        else:
            yield from _read(context, checkpoint, weight, tiles, where)


def _of_rows(
    context: RuleContext,
    checkpoint: Checkpoint,
    weight: LogicalWeight,
    scale: TensorEntry,
    where: str,
) -> Iterator[Problem]:
    """Check one scale, or one for each row."""
    rows = weight.shape[0]
    if scale.shape in ((), (1,), (rows,), (rows, 1)):
        yield from _read(context, checkpoint, weight, scale, where)
        return
    yield at(
        scale,
        f"{where}shape {list(scale.shape)}, expected one scale, or one for each of the {rows:,} "
        f"rows of a weight of {list(weight.shape)}",
        observed=[*scale.shape],
        expected=[rows, 1],
    )


def _read(
    context: RuleContext,
    checkpoint: Checkpoint,
    weight: LogicalWeight,
    entry: TensorEntry,
    where: str,
) -> Iterator[Problem]:
    if context.level is not RuleLevel.BYTES or entry.dtype not in _SCALE_DTYPES:
        return
    try:
        values = _floats(checkpoint, entry)
    except StorageError as error:
        context.skip(f"NV801 fp8-scale, {where}{printable(weight.name)}", printable(str(error)))
        return
    bits = values.view("<u4")
    ue8m0 = (checkpoint.quantization.scale_fmt or "").lower() == _UE8M0
    for bad, what, expected in (
        (~np.isfinite(values), "not finite", "a finite number"),
        (values == 0, "zero", "a positive number"),
        (np.isfinite(values) & (values < 0), "negative", "a positive number"),
        (
            np.isfinite(values) & (values > 0) & (bits & _MANTISSA != 0) & ue8m0,
            "no power of two, though scale_fmt says ue8m0",
            "a power of two",
        ),
    ):
        if bad.any():
            yield _problem(entry, bad, values, f"{where}{{}} {what}", expected)


def _floats(checkpoint: Checkpoint, entry: TensorEntry) -> npt.NDArray[np.float32]:
    """Read scales as float32: exact but for 2**-127 of E8M0, which becomes 2**-126."""
    if entry.numel == 1 and entry.dtype != "F8_E8M0":
        return np.array([checkpoint.scalar(entry)], np.float32)
    data = checkpoint.tensor_bytes(entry)
    if entry.dtype == "F16":
        return np.frombuffer(data.tobytes(), "<f2").astype(np.float32)
    if entry.dtype == "F32":
        return np.frombuffer(data.tobytes(), "<f4")
    if entry.dtype == "BF16":
        return (np.frombuffer(data.tobytes(), "<u2").astype("<u4") << 16).view("<f4")
    # E8M0: the exponent of a float32 as it stands, but for 0xFF, which is NaN.
    bits = np.maximum(data, 1).astype("<u4") << 23
    values: npt.NDArray[np.float32] = (bits | (data == 0xFF).astype("<u4")).view("<f4")
    return values


def _problem(
    entry: TensorEntry,
    bad: npt.NDArray[np.bool_],
    values: npt.NDArray[np.float32],
    message: str,
    expected: str,
) -> Problem:
    first, count = int(bad.argmax()), int(bad.sum())
    place = [int(index) for index in np.unravel_index(first, entry.shape or (1,))]
    value = float(values[first])
    who = f"{count:,} of {counted(values.size, 'scale')}, the first at {place},"
    return Problem(
        message.format(f"{who} {'is' if count == 1 else 'are'}"),
        tensor=entry.name,
        shard=entry.shard,
        offset=entry.start + first * entry.nbytes // max(1, entry.numel),
        count=count,
        observed=value if math.isfinite(value) else str(value),
        expected=expected,
    )


RULES: tuple[Rule, ...] = (fp8_scale,)
