"""The `compressed-tensors` convention against compressed-tensors itself."""

import pytest
import torch

from nvfp4ref import nvfp4
from nvfp4ref.conventions import Convention

compressed_tensors = pytest.importorskip("compressed_tensors")

CT = Convention.COMPRESSED_TENSORS


def weights(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.manual_seed(0)
    x = torch.randn(256, 256, generator=generator) * 0.02
    x[:64] *= torch.logspace(-22, 0, 64, base=2).unsqueeze(1)
    x[64:68] = 0.0
    x[68:72] = -0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantise_is_theirs(dtype: torch.dtype) -> None:
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    x = weights(dtype)
    scheme = QuantizationScheme(targets=["Linear"], **NVFP4)
    blocks = x.view(256, 16, 16)
    low, high = blocks.amin(-1), blocks.amax(-1)
    their_global = generate_gparam(low.amin(), high.amax())
    their_scales, _ = calculate_qparams(low, high, scheme.weights, their_global)
    state = {"weight": x, "weight_scale": their_scales, "weight_global_scale": their_global}
    theirs = NVFP4PackedCompressor.compress(state, scheme)

    encode = nvfp4.global_encode_scale(x.abs().amax(), CT)
    packed, scales = nvfp4.quantize(x, encode.reciprocal(), CT, global_encode_scale=encode)

    assert torch.equal(encode, their_global[0])
    assert torch.equal(
        scales.view(torch.uint8), theirs["weight_scale"].to(torch.float8_e4m3fn).view(torch.uint8)
    )
    assert torch.equal(packed, theirs["weight_packed"])
