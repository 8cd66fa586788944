"""TransformerEngine's NVFP4 quantiser on Blackwell, by its documented entry point.

It derives the encode scale 2688 / amax from the tensor, so it can only be asked where the decode
scale's reciprocal is that. Its arguments are held to the source of release 2.20.2; not run by this
project, which has no such GPU.
"""

import torch
from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

from nvfp4check.ops import UnsupportedError

_FULL_SCALE = 6.0 * 448.0


def quantize(
    x: torch.Tensor, global_decode_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize row-wise, without rotation, stochastic rounding or 2D blocks."""
    rows, columns = x.shape
    if rows == 0 or rows % 16 or columns % 16:
        raise UnsupportedError("TransformerEngine takes rows and columns in multiples of 16")
    if x.dtype == torch.float16 or not x.is_contiguous():
        raise UnsupportedError("TransformerEngine takes contiguous bfloat16 and float32")
    own = _FULL_SCALE / x.abs().max().float()
    if not torch.equal(own.cpu(), (1.0 / global_decode_scale).cpu().reshape(())):
        raise UnsupportedError("TransformerEngine derives the global scale from the tensor")
    quantizer = NVFP4Quantizer(
        rowwise=True, columnwise=False, with_rht=False, stochastic_rounding=False
    )
    quantized = quantizer(x)
    scales = quantized._rowwise_scale_inv.view(torch.float8_e4m3fn)
    return quantized._rowwise_data.view(torch.uint8), scales[:rows, : columns // 16]
