"""vLLM's emulation of NVFP4 in torch, which it uses where no kernel runs: on CPUs too.

`ref_nvfp4_quant` takes the global encode scale and returns values and scales in float32; both are
exact, so they are turned into codes and E4M3 without rounding.
"""

import torch
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    convert_swizzled_to_linear,
    dequantize_to_dtype,
    ref_nvfp4_quant,
)

_BLOCK = 16

#: E2M1 magnitudes by code.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def quantize(
    x: torch.Tensor, global_decode_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize by `ref_nvfp4_quant`, and pack its values."""
    values, scales = ref_nvfp4_quant(x, 1.0 / global_decode_scale, _BLOCK)
    magnitudes = torch.tensor(_VALUES, device=x.device)
    codes = torch.searchsorted(magnitudes, values.abs().nan_to_num(0.0).contiguous())
    codes = (codes | (values.signbit() & ~values.isnan()).long() << 3).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales.to(torch.float8_e4m3fn)


def dequantize(
    packed_codes: torch.Tensor,
    block_scales: torch.Tensor,
    global_decode_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dequantize by `dequantize_to_dtype` from row-major scales."""
    values: torch.Tensor = dequantize_to_dtype(
        packed_codes, block_scales, global_decode_scale, dtype, _BLOCK, swizzle=False
    )
    return values


def unswizzle(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Read the tiles back by `convert_swizzled_to_linear`."""
    width = columns * _BLOCK
    scales: torch.Tensor = convert_swizzled_to_linear(flat, rows, width, _BLOCK)
    return scales[:, :columns]
