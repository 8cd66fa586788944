"""The tensors in which a linear layer is stored, by producer and algorithm.

For a weight of [N, K]:

    NVFP4      ModelOpt            weight U8 [N, K/2], weight_scale E4M3 [N, K/16],
                                   weight_scale_2 [], input_scale [] where activations are FP4,
                                   pre_quant_scale [K] with AWQ
               compressed-tensors  weight_packed, weight_scale, weight_global_scale [1],
                                   input_global_scale [1]
    FP8 block  DeepSeek            weight E4M3 [N, K], weight_scale_inv F32 [N/128, K/128]
               compressed-tensors  weight, weight_scale [N/128, K/128]
               ModelOpt            weight, weight_scale [N/128, 1, K/128, 1]
    FP8        both                weight E4M3 [N, K], weight_scale [], input_scale [] where it is
                                   not made at run time
    by row     compressed-tensors  weight, weight_scale [N, 1], input_scale as above
               ModelOpt            weight, weight_scale [N]
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nvfp4check.checkpoint.header import DTYPE_BITS
from nvfp4check.checkpoint.quant_config import FP8, FP8_BLOCK, FP8_BY_ROW, QuantConfig
from nvfp4ref.formats import FP8_BLOCK as FP8_BLOCK_FORMAT
from nvfp4ref.formats import NVFP4 as NVFP4_FORMAT

#: Engines read a scalar scale in either; ModelOpt has written some in bfloat16.
_SCALAR = ("F32", "BF16")
#: compressed-tensors writes scales in the dtype of the model.
_FLOATS = ("F32", "BF16", "F16")


class UnknownAlgorithmError(ValueError):
    """No map of stored tensors for a quantisation algorithm."""


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor that a checkpoint must hold, or may hold."""

    name: str
    #: Acceptable safetensors dtypes, the usual one first.
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    optional: bool = False
    #: Another shape that engines read alike.
    other_shape: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes it takes in its usual dtype."""
        count = 1
        for size in self.shape:
            count *= size
        return -(-count * DTYPE_BITS[self.dtypes[0]] // 8)

    def accepts_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether a stored shape is the expected one; one element may be [] or [1]."""
        scalars: tuple[tuple[int, ...], ...] = ((), (1,))
        return shape in (self.shape, self.other_shape) or (
            shape in scalars and self.shape in scalars
        )


def stored_linear(
    module: str, shape: tuple[int, int], quantization: QuantConfig, plain: tuple[str, ...]
) -> Iterator[ExpectedTensor]:
    """List the tensors of one linear.

    Raises:
        UnknownAlgorithmError: the declared algorithm has no map here.
    """
    algo = quantization.algo_of(module)
    if algo is None:
        yield ExpectedTensor(f"{module}.weight", plain, shape)
    elif "NVFP4" in algo:
        yield from _nvfp4(module, shape, quantization, plain)
    elif algo == FP8_BLOCK:
        yield from _fp8_block(module, shape, quantization)
    elif algo in (FP8, FP8_BY_ROW):
        yield from _fp8(module, shape, quantization)
    else:
        raise UnknownAlgorithmError(f"no map of stored tensors for algorithm {algo!r} ({module})")


def _nvfp4(
    module: str, shape: tuple[int, int], quantization: QuantConfig, plain: tuple[str, ...]
) -> Iterator[ExpectedTensor]:
    rows, columns = shape
    codes = (rows, -(-columns // 2))
    scales = (rows, -(-columns // NVFP4_FORMAT.block_size))
    has_input_scale = quantization.stores_input_scale(module)
    if quantization.producer == "compressed-tensors":
        yield ExpectedTensor(f"{module}.weight_packed", ("U8",), codes)
        yield ExpectedTensor(f"{module}.weight_scale", ("F8_E4M3",), scales)
        yield ExpectedTensor(f"{module}.weight_global_scale", _SCALAR, (1,))
        if has_input_scale:
            yield ExpectedTensor(f"{module}.input_global_scale", _SCALAR, (1,))
        return
    yield ExpectedTensor(f"{module}.weight", ("U8",), codes)
    yield ExpectedTensor(f"{module}.weight_scale", ("F8_E4M3",), scales)
    yield ExpectedTensor(f"{module}.weight_scale_2", _SCALAR, ())
    if has_input_scale:
        yield ExpectedTensor(f"{module}.input_scale", _SCALAR, ())
    if "AWQ" in (quantization.algo_of(module) or ""):
        yield ExpectedTensor(f"{module}.pre_quant_scale", plain, (columns,), optional=True)


def _fp8_block(
    module: str, shape: tuple[int, int], quantization: QuantConfig
) -> Iterator[ExpectedTensor]:
    rows, columns = shape
    height, width = quantization.weight_block_size or FP8_BLOCK_FORMAT.block_shape
    scales = (-(-rows // height), -(-columns // width))
    yield ExpectedTensor(f"{module}.weight", ("F8_E4M3",), shape)
    in_four = (scales[0], 1, scales[1], 1)
    if quantization.producer == "compressed-tensors":
        yield ExpectedTensor(f"{module}.weight_scale", _FLOATS, scales)
    elif quantization.producer == "modelopt":
        yield ExpectedTensor(f"{module}.weight_scale", _FLOATS, in_four, other_shape=scales)
    else:
        yield ExpectedTensor(f"{module}.weight_scale_inv", ("F32",), scales)


def _fp8(
    module: str, shape: tuple[int, int], quantization: QuantConfig
) -> Iterator[ExpectedTensor]:
    yield ExpectedTensor(f"{module}.weight", ("F8_E4M3",), shape)
    scale = f"{module}.weight_scale"
    rows = shape[0]
    group = quantization.group_of(module)
    if quantization.algo_of(module) == FP8_BY_ROW:
        yield ExpectedTensor(scale, _FLOATS, (rows,), other_shape=(rows, 1))
    elif group is not None and group.weight_strategy == "channel":
        yield ExpectedTensor(scale, _FLOATS, (rows, 1), other_shape=(rows,))
    else:
        yield ExpectedTensor(scale, _SCALAR, ())
    if quantization.stores_input_scale(module):
        yield ExpectedTensor(f"{module}.input_scale", _SCALAR, ())
