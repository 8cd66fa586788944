"""The `modelopt` convention against nvidia-modelopt's NVFP4QTensor."""

import pytest
import torch

from nvfp4ref import nvfp4
from nvfp4ref.conventions import Convention

modelopt = pytest.importorskip("modelopt")

# its imports use what torch, transformers and the standard library have deprecated
pytestmark = pytest.mark.filterwarnings("ignore")


def convention() -> Convention:
    """Return the convention of the version that is installed: scales are clamped from 0.45 on."""
    version = tuple(int(part) for part in modelopt.__version__.split(".")[:2])
    return Convention.MODELOPT if version >= (0, 45) else Convention.MODELOPT_0_39


def weights(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.manual_seed(0)
    x = torch.randn(256, 256, generator=generator) * 0.02
    x[:64] *= torch.logspace(-22, 0, 64, base=2).unsqueeze(1)
    x[64:68] = 0.0
    x[68:72] = -0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantise_and_dequantise_are_modelopts(dtype: torch.dtype) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    x = weights(dtype)
    decode = nvfp4.global_decode_scale(x.abs().amax(), convention())
    packed, scales = nvfp4.quantize(x, decode, convention())
    theirs, their_scales, their_global = NVFP4QTensor.quantize(x.clone(), 16)

    assert torch.equal(decode, their_global)
    assert torch.equal(scales.view(torch.uint8), their_scales.view(torch.uint8))
    assert torch.equal(packed, theirs._quantized_data)

    values = theirs.dequantize(
        dtype=dtype, scale=their_scales, double_scale=their_global, block_sizes={-1: 16}
    )
    assert torch.equal(nvfp4.dequantize(packed, scales, decode, dtype), values)
