"""The `vllm-reference` convention and the 128x4 layout against vLLM's emulation of NVFP4.

engine, engine-vllm   the arithmetic of vLLM's kernel; its emulation is `vllm-reference`, and
                      differs from them in -0.0, NaN and blocks whose scale is lost
"""

import pytest
import torch

from nvfp4check import inputs
from nvfp4ref import e2m1, layout, nvfp4, packing
from nvfp4ref.conventions import Convention

emulation = pytest.importorskip(
    "vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils"
)

#: Global scales: powers of two meet the boundaries exactly, others as near as the dtype comes.
SCALES = (1.0, 2.0**-12, 0.7123456, 3.3e-5)


def tables(dtype: torch.dtype, scale: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    plain = [
        inputs.element_boundaries(dtype),
        inputs.scale_boundaries(dtype),
        inputs.small_blocks(dtype),
        *(family(generator, 64, 256).to(dtype) for family in inputs.FAMILIES.values()),
    ]
    return [(table.double() * scale).to(dtype) for table in plain]


def theirs(x: torch.Tensor, decode: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales = emulation.ref_nvfp4_quant(x, 1.0 / decode, 16)
    return values, scales.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", inputs.INPUT_DTYPES)
def test_quantise_is_that_of_vllms_emulation(dtype: torch.dtype, scale: float) -> None:
    decode = torch.tensor(scale)
    for x in [*tables(dtype, scale), inputs.zero_blocks(dtype)]:
        packed, scales = nvfp4.quantize(x, decode, Convention.VLLM_REFERENCE)
        their_values, their_scales = theirs(x, decode)
        values = e2m1.decode(packing.unpack(packed))

        assert torch.equal(scales.view(torch.uint8), their_scales.view(torch.uint8))
        assert torch.equal(values, their_values)


@pytest.mark.parametrize("convention", [Convention.ENGINE, Convention.ENGINE_VLLM])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", inputs.INPUT_DTYPES)
def test_engines_agree_with_it_wherever_a_block_keeps_its_scale(
    dtype: torch.dtype, scale: float, convention: Convention
) -> None:
    decode = torch.tensor(scale)
    for x in tables(dtype, scale):
        packed, scales = nvfp4.quantize(x, decode, convention)
        their_values, their_scales = theirs(x, decode)
        kept = (scales.float() > 0).repeat_interleave(16, dim=1)
        values = e2m1.decode(packing.unpack(packed))

        assert torch.equal(scales.view(torch.uint8), their_scales.view(torch.uint8))
        assert torch.equal(values[kept], their_values[kept])


@pytest.mark.parametrize("dtype", inputs.OUTPUT_DTYPES)
def test_dequantise_is_that_of_vllm(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    codes, scales = inputs.random_codes(generator, 64, 128), inputs.random_scales(generator, 64, 16)
    for scale in SCALES:
        decode = torch.tensor(scale)
        ours = nvfp4.dequantize(codes, scales, decode, dtype)

        assert torch.equal(
            ours, emulation.dequantize_to_dtype(codes, scales, decode, dtype, swizzle=False)
        )
        swizzled = layout.swizzle(scales.view(torch.uint8)).view(torch.float8_e4m3fn)
        assert torch.equal(
            ours, emulation.dequantize_to_dtype(codes, swizzled, decode, dtype, swizzle=True)
        )
