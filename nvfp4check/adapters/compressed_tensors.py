"""compressed-tensors' NVFP4 (`nvfp4-pack-quantized`), as its compressor calls it.

It stores the reciprocal of the global decode scale and works with that.
"""

import torch
from compressed_tensors.compressors.nvfp4.helpers import (
    pack_fp4_to_uint8,
    unpack_fp4_from_uint8,
)
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.quantization.lifecycle import forward
from compressed_tensors.quantization.utils import calculate_qparams

_BLOCK = 16


def _arguments() -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=4,
        type=QuantizationType.FLOAT,
        strategy=QuantizationStrategy.TENSOR_GROUP,
        group_size=_BLOCK,
        symmetric=True,
        dynamic=False,
        scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    )


def quantize(
    x: torch.Tensor, global_decode_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize by `calculate_qparams`, `quantize` and `pack_fp4_to_uint8`."""
    encode = (1.0 / global_decode_scale).reshape(1)
    blocks = x.reshape(x.shape[0], x.shape[1] // _BLOCK, _BLOCK)
    scales, zero_points = calculate_qparams(
        blocks.amin(-1), blocks.amax(-1), _arguments(), global_scale=encode
    )
    codes = forward.quantize(x, scales, zero_points, _arguments(), global_scale=encode)
    return pack_fp4_to_uint8(codes), scales.to(torch.float8_e4m3fn)


def dequantize(
    packed_codes: torch.Tensor,
    block_scales: torch.Tensor,
    global_decode_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dequantize by `unpack_fp4_from_uint8` and `dequantize`."""
    rows, columns = packed_codes.shape
    unpacked = unpack_fp4_from_uint8(packed_codes, rows, 2 * columns, dtype=dtype)
    encode = (1.0 / global_decode_scale).reshape(1)
    values: torch.Tensor = forward.dequantize(
        x_q=unpacked,
        scale=block_scales.to(dtype),
        args=_arguments(),
        global_scale=encode,
        dtype=dtype,
    )
    return values
