"""Recorded results of other people's casts to E2M1 and E4M3.

Every column of goldens/vectors/casts_*.safetensors is in one of the tables: met on every number, or
with what it does otherwise.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nvfp4ref import e2m1, e4m3
from nvfp4ref.e4m3 import Overflow

VECTORS = Path(__file__).parents[2] / "goldens" / "vectors"

#: Casts to the nearest code, ties to even, with their code of NaN: 254 is a value that is NaN, None
#: one that depends on its bits.
NEAREST_E2M1 = {
    "compressed-tensors-0.13.0-cast_to_fp4": 254,
    "compressed-tensors-0.19.0-cast+pack": 0,
    "compressed-tensors-0.19.0-cast_to_fp4": 254,
    "cuda12.9-hpp-float": 7,
    "cuda13.0-hpp-float": 7,
    "cuda13.5-hpp-float": 7,
    "cutlass-4.2-float_e2m1_t": None,  # 7 or 15 by the sign
    "flashinfer+vllm-ref-cast_to_fp4": 254,
    "gfloat-TiesToEven-sat": 254,
    "jax-0.10.2-cpu-eager": 8,
    "jax-0.10.2-cpu-jit": 8,
    "ml_dtypes-0.6.0": None,  # 0 or 8 by the sign
    "modelopt-0.39-cuda_ext_host": 7,
    "modelopt-0.39.0-_cast_fp4": 7,
    "modelopt-0.47.0-_cast_fp4": 7,
    "onnx-1.23.2-refeval-sat1": None,
    "qwix-convert_to(nvfp4)": 8,
    "torchao-0.18.0-f32_to_f4_unpacked": None,  # 2, 3, 4 and these with the sign, by the payload
    "TransformerEngine-ref-cast_to_fp4x2": 0,
}

#: Casts that make -0.0 code 0.
SIGNLESS_ZERO = {
    "compressed-tensors-0.13.0-cast_to_fp4",
    "compressed-tensors-0.19.0-cast+pack",
    "compressed-tensors-0.19.0-cast_to_fp4",
    "compressed-tensors-0.19.0-cast_to_fp4-bf16in",
    "flashinfer+vllm-ref-cast_to_fp4",
    "modelopt-0.39-cuda_ext_host",
    "modelopt-0.39.0-_cast_fp4",
    "modelopt-0.47.0-_cast_fp4",
    "TransformerEngine-ref-cast_to_fp4x2",
}

#: Casts that round to bfloat16 first.
VIA_BFLOAT16_E2M1 = {
    "compressed-tensors-0.19.0-cast_to_fp4-bf16in",
    "cuda12.9-hpp-bf16raw",
    "cuda13.0-hpp-bf16raw",
    "cuda13.5-hpp-bf16raw",
    "ml_dtypes-0.6.0-via-bf16",
}

OTHER_E2M1 = {
    "cuda12.9-hpp-RZ": "rounds toward zero",
    "cuda13.0-hpp-RZ": "rounds toward zero",
    "cuda13.5-hpp-RZ": "rounds toward zero",
    "fouroversix-1.0.5-fake_quantize_to_e2m1": "does not saturate",
    "gfloat-TiesToAway-sat": "ties away from zero",
    "llm-dequant-0.1.0-pack_fp4": "ties toward zero; infinity and beyond 1e8 give 0",
    "microxcaling-even-nosat": "double rounding below 0.25; does not saturate",
    "microxcaling-even-sat": "double rounding below 0.25",
    "microxcaling-nearest-nosat": "ties away; double rounding below 0.25; does not saturate",
    "microxcaling-nearest-sat": "ties away; double rounding below 0.25",
}

SATURATING_E4M3 = {
    "compressed-tensors-0.19.0-round_to_quantized_type_dtype",
    "cuda12.9-hpp-satfinite",
    "cuda13.0-hpp-satfinite",
    "cuda13.5-hpp-satfinite",
    "cutlass-4.2-float_e4m3_t",
    "gfloat-TiesToEven-sat",
    "modelopt-0.39-cuda_ext_host",
    "onnx-1.23.2-refeval-sat1",
    "onnxruntime-Cast-sat1",
    "torch-2.13-cpu",
}

NAN_E4M3 = {
    "cuda12.9-hpp-nosat",
    "cuda13.0-hpp-nosat",
    "cuda13.5-hpp-nosat",
    "gfloat-TiesToEven-nosat",
    "jax-0.10.2-cpu-jit",
    "ml_dtypes-0.6.0",
    "onnx-1.23.2-refeval-sat0",
    "torch-2.9.1-header",
}

OTHER_E4M3 = {
    "cutlass-4.2-float_ue4m3_t": "unsigned: drops the sign",
    "gguf-0.19-fp32_to_ue4m3": "unsigned; ties up; 448 from 248 on",
    "microxcaling-even-nosat": "double rounding below the least subnormal; has infinities",
    "microxcaling-even-sat": "double rounding below the least subnormal",
    "microxcaling-nearest-nosat": "ties away; has infinities",
    "microxcaling-nearest-sat": "ties away",
    "onnxruntime-Cast-sat0": "448 from 480 to 496, NaN elsewhere above 464",
    "triton-3.7.1-interpreter": "loses the rounding carry",
}


@pytest.fixture(scope="module")
def e2m1_casts() -> dict[str, torch.Tensor]:
    return load_file(VECTORS / "casts_e2m1.safetensors")


@pytest.fixture(scope="module")
def e4m3_casts() -> dict[str, torch.Tensor]:
    return load_file(VECTORS / "casts_e4m3.safetensors")


@pytest.mark.parametrize("cast", sorted({*NEAREST_E2M1, *VIA_BFLOAT16_E2M1}))
def test_a_cast_to_e2m1_is_met_on_every_number(
    cast: str, e2m1_casts: dict[str, torch.Tensor]
) -> None:
    x, recorded = e2m1_casts["x"], e2m1_casts[cast]
    numbers = ~x.isnan()
    x = x.bfloat16() if cast in VIA_BFLOAT16_E2M1 else x
    ours = e2m1.encode(x[numbers])
    if cast in SIGNLESS_ZERO:
        ours = torch.where(x[numbers] == 0, 0, ours).to(torch.uint8)

    assert torch.equal(ours, recorded[numbers])


@pytest.mark.parametrize("cast", [c for c, code in NEAREST_E2M1.items() if code is not None])
def test_a_cast_to_e2m1_makes_of_nan_what_was_written_down(
    cast: str, e2m1_casts: dict[str, torch.Tensor]
) -> None:
    assert set(e2m1_casts[cast][e2m1_casts["x"].isnan()].tolist()) == {NEAREST_E2M1[cast]}


@pytest.mark.parametrize("cast", sorted({*SATURATING_E4M3, *NAN_E4M3}))
def test_a_cast_to_e4m3_is_met_on_every_value(
    cast: str, e4m3_casts: dict[str, torch.Tensor]
) -> None:
    x, recorded = e4m3_casts["x"], e4m3_casts[cast]
    overflow = Overflow.SATURATE if cast in SATURATING_E4M3 else Overflow.NAN
    ours = e4m3.encode(x, overflow)
    nan = (ours & 0x7F) == 0x7F

    assert torch.equal(ours[~nan], recorded[~nan])
    assert (recorded[nan] & 0x7F == 0x7F).all()


@pytest.mark.parametrize("cast", sorted(OTHER_E2M1))
def test_a_cast_to_e2m1_that_is_no_nearest_even_is_told_from_one(
    cast: str, e2m1_casts: dict[str, torch.Tensor]
) -> None:
    x = e2m1_casts["x"]
    numbers = ~x.isnan() & (x != 0)
    differing = e2m1.encode(x[numbers]) != e2m1_casts[cast][numbers]

    assert differing.any()


@pytest.mark.parametrize("cast", sorted(OTHER_E4M3))
def test_a_cast_to_e4m3_that_is_no_nearest_even_is_told_from_one(
    cast: str, e4m3_casts: dict[str, torch.Tensor]
) -> None:
    x = e4m3_casts["x"]
    numbers = ~x.isnan() & (x != 0)
    for overflow in Overflow:
        assert (e4m3.encode(x[numbers], overflow) != e4m3_casts[cast][numbers]).any()


def test_ties_away_differ_from_ours_at_ties_only(e2m1_casts: dict[str, torch.Tensor]) -> None:
    x = e2m1_casts["x"]
    numbers = ~x.isnan()
    differing = e2m1.encode(x[numbers]) != e2m1_casts["gfloat-TiesToAway-sat"][numbers]

    assert set(x[numbers][differing].abs().tolist()) == {0.25, 1.25, 2.5, 5.0}


def test_every_recorded_cast_is_accounted_for(
    e2m1_casts: dict[str, torch.Tensor], e4m3_casts: dict[str, torch.Tensor]
) -> None:
    assert set(e2m1_casts) == {"x", *NEAREST_E2M1, *VIA_BFLOAT16_E2M1, *OTHER_E2M1}
    assert set(e4m3_casts) == {"x", *SATURATING_E4M3, *NAN_E4M3, *OTHER_E4M3}
