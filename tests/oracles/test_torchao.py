"""The `torchao` convention and the 128x4 layout against torchao itself."""

import pytest
import torch

from nvfp4ref import layout, nvfp4
from nvfp4ref.conventions import Convention

torchao = pytest.importorskip("torchao", minversion="0.18")  # earlier ones divide elements


def weights(dtype: torch.dtype) -> torch.Tensor:
    """Return blocks of every magnitude: normal, subnormal and lost scales, zeros of both signs."""
    generator = torch.manual_seed(0)
    x = torch.randn(512, 256, generator=generator)
    x *= torch.logspace(-14, 0, 512, base=2).unsqueeze(1)
    x[:8] *= 2.0**-20
    x[8:12] = 0.0
    x[12:16] = -0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantise_is_torchaos(dtype: torch.dtype) -> None:
    from torchao.prototype.mx_formats import nvfp4_tensor

    x = weights(dtype)
    decode = nvfp4.global_decode_scale(x.abs().amax(), Convention.TORCHAO)
    packed, scales = nvfp4.quantize(x, decode, Convention.TORCHAO)
    their_scales, their_packed = nvfp4_tensor.nvfp4_quantize(x, 16, decode)

    assert decode == nvfp4_tensor.per_tensor_amax_to_scale(x.abs().amax())
    assert torch.equal(scales.view(torch.uint8), their_scales.view(torch.uint8))
    assert torch.equal(packed, their_packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantise_is_torchaos(dtype: torch.dtype) -> None:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    x = weights(torch.bfloat16).to(dtype)
    decode = nvfp4.global_decode_scale(x.abs().amax(), Convention.TORCHAO)
    packed, scales = nvfp4.quantize(x, decode, Convention.TORCHAO)
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=decode).dequantize(dtype)

    assert torch.equal(nvfp4.dequantize(packed, scales, decode, dtype), theirs)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (100, 3), (129, 5), (256, 12)])
def test_swizzle_is_torchaos(rows: int, columns: int) -> None:
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scales = torch.arange(rows * columns).remainder(255).to(torch.uint8).view(rows, columns)

    assert torch.equal(layout.swizzle(scales), utils.to_blocked(scales).flatten())
