"""E2M1 and E4M3 against casts that others wrote, each where it is installed."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from nvfp4ref import e2m1, e4m3
from nvfp4ref.e4m3 import Overflow

HALF_TYPES = [torch.bfloat16, torch.float16]


def every_value(dtype: torch.dtype) -> torch.Tensor:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype).float()


def beside_midpoints() -> torch.Tensor:
    """Return every midpoint of both formats and four float32 on each side, with both signs."""
    middles = torch.tensor(e2m1.MIDPOINTS + e4m3.MIDPOINTS)
    bits = middles.view(torch.int32).unsqueeze(1) + torch.arange(-4, 5, dtype=torch.int32)
    values = bits.view(torch.float32).flatten()
    return torch.cat([values, -values])


def samples() -> torch.Tensor:
    return torch.cat([*map(every_value, HALF_TYPES), beside_midpoints()])


def overflow_of_torch() -> Overflow:
    """Torch saturates from 2.13 on, and gave NaN before."""
    beyond = torch.tensor(1000.0).to(torch.float8_e4m3fn).float()
    return Overflow.NAN if beyond.isnan() else Overflow.SATURATE


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
def test_e4m3_is_torchs_cast_on_numbers(dtype: torch.dtype) -> None:
    values = samples().to(dtype)
    values = values[~values.isnan()]

    assert torch.equal(
        e4m3.encode(values, overflow_of_torch()), values.to(torch.float8_e4m3fn).view(torch.uint8)
    )


def test_e4m3_values_are_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 0x7F) != 0x7F]

    assert torch.equal(e4m3.decode(numbers), numbers.view(torch.float8_e4m3fn).float())


def test_e2m1_and_e4m3_are_those_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = samples()
    numbers = values[~values.isnan()]
    with np.errstate(invalid="ignore"):
        fp4 = numbers.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        fp8 = values.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8)

    assert np.array_equal(e2m1.encode(numbers).numpy(), fp4)
    assert np.array_equal(e4m3.encode(values, Overflow.NAN).numpy(), fp8)


def test_e8m0_values_are_those_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    from nvfp4ref import e8m0

    codes = torch.arange(255, dtype=torch.uint8)
    theirs = codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)

    assert np.array_equal(e8m0.decode(codes).numpy(), theirs)


@pytest.mark.parametrize("overflow", Overflow)
def test_rounding_is_that_of_gfloat(overflow: Overflow) -> None:
    gfloat = pytest.importorskip("gfloat")
    formats = pytest.importorskip("gfloat.formats")
    values = beside_midpoints().double()
    saturates = overflow is Overflow.SATURATE
    fp8 = gfloat.round_ndarray(formats.format_info_ocp_e4m3, values.numpy(), sat=saturates)
    fp4 = gfloat.round_ndarray(formats.format_info_ocp_e2m1, values.numpy(), sat=True)

    assert np.array_equal(e4m3.round_(values, overflow).double().numpy(), fp8, equal_nan=True)
    assert np.array_equal(e2m1.round_(values).double().numpy(), fp4)


CUDA_PROGRAM = r"""
#include <cstdio>
#include <vector>
#include <cuda_fp4.h>
#include <cuda_fp8.h>
int main() {
  std::vector<float> values(1 << 20);
  size_t count;
  while ((count = fread(values.data(), sizeof(float), values.size(), stdin)) > 0)
    for (size_t i = 0; i < count; ++i) {
      unsigned char bytes[3] = {
          __nv_cvt_float_to_fp4(values[i], __NV_E2M1, cudaRoundNearest),
          __nv_cvt_float_to_fp8(values[i], __NV_SATFINITE, __NV_E4M3),
          __nv_cvt_float_to_fp8(values[i], __NV_NOSAT, __NV_E4M3)};
      fwrite(bytes, 1, sizeof bytes, stdout);
    }
}
"""


def cuda_include() -> Path | None:
    """Return a folder with NVIDIA's headers: a toolkit's, or those inside the triton package."""
    candidates = [Path("/usr/local/cuda/include")]
    try:
        import triton

        candidates.append(Path(triton.__file__).parent / "backends/nvidia/include")
    except ImportError:
        pass
    needed = ("cuda_fp4.hpp", "cuda_fp8.hpp", "cuda_runtime.h")
    return next((c for c in candidates if all((c / name).exists() for name in needed)), None)


def test_casts_are_those_of_nvidias_headers(tmp_path: Path) -> None:
    compiler, include = shutil.which("g++"), cuda_include()
    if compiler is None or include is None:
        pytest.skip("needs g++ and CUDA headers with cuda_fp4.hpp (CUDA 12.8 or later)")
    source, program = tmp_path / "casts.cpp", tmp_path / "casts"
    source.write_text(CUDA_PROGRAM)
    subprocess.run([compiler, "-O1", "-I", include, source, "-o", program], check=True)
    values = samples()
    result = subprocess.run([program], input=values.numpy().tobytes(), capture_output=True)
    assert result.returncode == 0, result.stderr
    fp4, saturated, nan = np.frombuffer(result.stdout, np.uint8).reshape(-1, 3).T
    numbers = ~values.isnan()

    assert np.array_equal(e2m1.encode(values[numbers]).numpy(), fp4[numbers])
    assert set(fp4[~numbers].tolist()) == {7}
    for theirs, overflow in ((saturated, Overflow.SATURATE), (nan, Overflow.NAN)):
        assert np.array_equal(e4m3.encode(values[numbers], overflow).numpy(), theirs[numbers])
        assert set(theirs[~numbers].tolist()) == {0x7F}  # CUDA drops the sign of a NaN
