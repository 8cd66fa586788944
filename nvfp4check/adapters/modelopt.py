"""NVIDIA ModelOpt's NVFP4 (`NVFP4QTensor`), the path of its checkpoint export."""

import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor

_BLOCK = 16


def quantize(
    x: torch.Tensor, global_decode_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize by `NVFP4QTensor.quantize` with a given second scale."""
    tensor, scales, _ = NVFP4QTensor.quantize(
        x, _BLOCK, None, global_decode_scale, try_tensorrt=False
    )
    return tensor._quantized_data, scales


def dequantize(
    packed_codes: torch.Tensor,
    block_scales: torch.Tensor,
    global_decode_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dequantize by `NVFP4QTensor.dequantize`."""
    rows, columns = packed_codes.shape
    tensor = NVFP4QTensor(torch.Size((rows, 2 * columns)), dtype, packed_codes)
    values: torch.Tensor = tensor.dequantize(
        dtype,
        scale=block_scales,
        double_scale=global_decode_scale,
        block_sizes={-1: _BLOCK},
    )
    return values
