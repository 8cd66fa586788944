"""The tolerance rules that projects publish, with the inputs that their tests draw.

Contract:
    judge     the project's own comparison (`judges`), in the dtype of the kernel's output
    expected  what the project compares with: the product of the decoded operands, or that of the
              values before they were quantised
    inputs    operands that the project's tests draw, of a size they use or near it
    model-sized inputs  activations and weights as large as a model's: results of about 0.045

Each `source` names repository, path and commit. The projects run other checks too; a rule is
judged here alone. Products of the suite have no values before quantisation, and some hold NaN or
infinity: there a rule compares with the exact product, NaN and infinity must stand where they are
due, and the rule judges the rest, which is more than some projects ask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from nvfp4check.faults import draws, judges
from nvfp4check.faults.draws import Draw, Operand
from nvfp4check.faults.judges import Judge
from nvfp4check.findings import CheckError
from nvfp4ref.matmul import exact
from nvfp4ref.rounding import round_to

Tensor = torch.Tensor

#: M, N, K and the deviations of activations and weights of model-sized inputs.
MODEL_SHAPE = (64, 256, 2048)
MODEL_DEVIATIONS = (0.05, 0.02)


@dataclass(frozen=True, slots=True)
class Sample:
    """Quantised operands as the arguments of `matmul`, and what projects compare with."""

    inputs: dict[str, object]
    a: Operand
    b: Operand

    @property
    def product(self) -> Tensor:
        """The exact product of the decoded operands."""
        product = exact(self.a.codes, self.a.scales, self.b.codes, self.b.scales)
        return product.value * (self.a.global_scale * self.b.global_scale).double()

    @property
    def unquantised(self) -> Tensor:
        """The product of the values before they were quantised, in float64."""
        return self.a.original.double() @ self.b.original.double().T


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRule:
    """One project's way to compare a product with a reference."""

    name: str
    #: What the rule accepts, in words.
    rule: str
    source: str
    judge: Judge
    #: M, N, K of the inputs.
    shape: tuple[int, int, int]
    draw: Draw = draws.normal
    #: Draws operands of a given deviation, of a kind that the project's reference is made for.
    draw_model_sized: Callable[..., Operand] = draws.normal
    #: Whether it compares with the product of the values before they were quantised.
    against_unquantised: bool = False
    dtype: torch.dtype = torch.bfloat16

    def sample(self, seed: int) -> Sample:
        """Return operands of the kind that the project's tests draw."""
        return _sample(seed, self.shape, self.draw, self.draw, self.dtype)

    def model_sized_sample(self, seed: int) -> Sample:
        """Return operands as large as a model's activations and weights are."""
        a, b = (partial(self.draw_model_sized, deviation=one) for one in MODEL_DEVIATIONS)
        return _sample(seed, MODEL_SHAPE, a, b, self.dtype)

    def drawing(self, model_sized: bool) -> object:
        """Return what makes two rules draw the same sample from the same seed."""
        kind = self.draw_model_sized if model_sized else (self.draw, self.shape)
        return kind, self.dtype

    def expected(self, sample: Sample) -> Tensor:
        """Return what the project compares a result with, in float64."""
        return sample.unquantised if self.against_unquantised else sample.product

    def accepts(self, actual: Tensor, expected: Tensor) -> bool:
        """Tell whether the rule takes a result for right."""
        if actual.shape != expected.shape or not actual.numel():
            return actual.shape == expected.shape
        rounded = round_to(expected, actual.dtype)
        due = ~rounded.isfinite()
        if not due.any():
            return self.judge(actual, expected)
        found, wanted = actual[due], rounded[due]
        if not torch.equal(found.isnan(), wanted.isnan()):
            return False
        if not torch.equal(found[~found.isnan()], wanted[~wanted.isnan()]):
            return False
        return bool(due.all()) or self.judge(actual[~due], expected[~due])


def _sample(
    seed: int, shape: tuple[int, int, int], draw_a: Draw, draw_b: Draw, dtype: torch.dtype
) -> Sample:
    m, n, k = shape
    generator = torch.Generator().manual_seed(seed)
    a, b = draw_a(generator, m, k), draw_b(generator, n, k)
    taken = {
        "a_codes": a.codes,
        "a_scales": a.scales,
        "b_codes": b.codes,
        "b_scales": b.scales,
        "alpha": a.global_scale * b.global_scale,
        "dtype": dtype,
    }
    return Sample(taken, a, b)


def tolerance_rule(atol: float, rtol: float) -> PublishedRule:
    """Return `assert_close` with tolerances that a user names.

    Raises:
        CheckError: One is negative, or NaN.
    """
    if not (atol >= 0 and rtol >= 0):
        raise CheckError(f"--atol {atol} and --rtol {rtol} must be numbers, and not negative")
    return PublishedRule(
        name=f"atol {atol:g}, rtol {rtol:g}",
        rule="|actual - expected| <= atol + rtol |expected|",
        source="the command line",
        judge=partial(judges.assert_close, atol, rtol),
        shape=(128, 128, 1024),
    )


def _close(atol: float, judge: Callable[[float, float, Tensor, Tensor], bool]) -> Judge:
    return partial(judge, atol, atol)


RULES = (
    PublishedRule(
        name="vllm",
        rule="assert_close 0.1 / 0.1",
        source="vllm-project/vllm tests/kernels/quantization/test_nvfp4_scaled_mm.py and "
        "nvfp4_utils.py at 630fe7e; the same numbers in sgl-project/sglang "
        "sgl-kernel/tests/test_fp4_gemm.py at 500e7eb. vLLM rounds the decoded operands to the "
        "output's dtype before it multiplies them; here they stay as they are",
        judge=_close(1e-1, judges.assert_close),
        shape=(128, 128, 256),
        draw=draws.normal_by_largest_value,
    ),
    PublishedRule(
        name="flashinfer",
        rule="cosine > 0.97, with the unquantised product",
        source="flashinfer-ai/flashinfer tests/gemm/test_mm_fp4.py at fb28d72",
        judge=partial(judges.cosine, 0.97),
        shape=(48, 256, 512),
        against_unquantised=True,
    ),
    PublishedRule(
        name="flashinfer-fuzz",
        rule="|error| <= 0.12 max|expected| + 1e-3 + 0.1 |expected|",
        source="flashinfer-ai/flashinfer tests/gemm/test_unified_gemm_fuzz.py at fb28d72, "
        "_QMODE nvfp4: sparse operands on the grid",
        judge=partial(judges.fraction_of_largest, 0.12, 0.1),
        shape=(48, 256, 512),
        draw=draws.sparse_on_the_grid,
        draw_model_sized=draws.normal_on_the_grid,
        against_unquantised=True,
    ),
    PublishedRule(
        name="deepgemm",
        rule="1 - 2xy / (xx + yy) < 0.02, with the unquantised product",
        source="deepseek-ai/DeepGEMM tests/generators.py (QuantConfig.max_diff for FP4 x FP4), "
        "tests/test_fp8_fp4.py, deep_gemm/testing/numeric.py at 54e2261; its sizes begin at "
        "1 x 576 x 7168, and the pairs it lists are FP8 x FP4, held to 0.01",
        judge=partial(judges.difference_below, 2e-2),
        shape=(64, 256, 2048),
        against_unquantised=True,
    ),
    PublishedRule(
        name="transformer-engine",
        rule="assert_close 8e-3 / 8e-3, NaN set to 0 on both sides",
        source="NVIDIA/TransformerEngine tests/pytorch/nvfp4/test_nvfp4_gemm_exact.py at d0067d0",
        judge=_close(8e-3, judges.assert_close_without_nan),
        shape=(256, 256, 256),
    ),
    PublishedRule(
        name="tensorrt-llm",
        rule="allclose 1e-2 / 1e-2 in float32, output float16",
        source="NVIDIA/TensorRT-LLM tests/unittest/_torch/thop/parallel/"
        "test_fp4_gemm_quantize.py at aaedbf9",
        judge=_close(1e-2, judges.allclose_in_float32),
        shape=(256, 128, 512),
        draw=draws.normal_float16,
        dtype=torch.float16,
    ),
    PublishedRule(
        name="torchao",
        rule="SQNR >= 16 dB, with the unquantised product",
        source="pytorch/ao test/prototype/mx_formats/test_nvfp4_tensor.py at 36027d8",
        judge=partial(judges.signal_to_noise, 16.0),
        shape=(128, 256, 64),
        against_unquantised=True,
    ),
    PublishedRule(
        name="cutlass",
        rule="every element equal, neither all zeros",
        source="NVIDIA/cutlass examples/72_blackwell_narrow_precision_gemm/"
        "72a_blackwell_nvfp4_bf16_gemm.cu at 0d2b201: codes of -2 to 2; its scales between -1 and "
        "1 are taken as 0 and 1, its 1024 x 1024 x 1024 cut down",
        judge=judges.equal,
        shape=(128, 256, 1024),
        draw=draws.small_integers,
    ),
    PublishedRule(
        name="flashinfer-bench",
        rule="wrong where abs > 1e-2 and rel > 1e-2",
        source="flashinfer-ai/flashinfer-bench bench/evaluators/default.py, bench/utils.py, "
        "bench/config.py at 40e6ca7",
        judge=partial(judges.matched, 1.0, 1e-2, 1e-2),
        shape=(64, 256, 2048),
    ),
    PublishedRule(
        name="flashinfer-bench-low-bit",
        rule="the same for 95 % of the elements",
        source="flashinfer-ai/flashinfer-bench bench/evaluators/lowbit.py at 40e6ca7, used there "
        "for moe_fp8_block_scale",
        judge=partial(judges.matched, 0.95, 1e-2, 1e-2),
        shape=(64, 256, 2048),
    ),
    PublishedRule(
        name="triton_kernels",
        rule="error / max(RMS, |expected|): at most 2e-2, RMS at most 4e-3",
        source="triton-lang/triton python/triton_kernels/triton_kernels/testing.py at 1084e81",
        judge=partial(judges.scale_free, 2e-2, 4e-3),
        shape=(128, 256, 1024),
        draw=draws.planted_maxima,
    ),
    PublishedRule(
        name="sglang",
        rule="1 - 2xy / (xx + yy) <= 1e-3",
        source="sgl-project/sglang python/sglang/srt/debug_utils/comparator/tensor_comparator/"
        "comparator.py at 1cc87e6, the default of its comparison of dumps",
        judge=partial(judges.difference_at_most, 1e-3),
        shape=(64, 256, 2048),
    ),
    PublishedRule(
        name="tt-metal",
        rule="Pearson correlation >= 0.975",
        source="tenstorrent/tt-metal models/demos/deepseek_v3/tests/test_mlp.py at 0586c8b, "
        "comp_pcc in models/common/utility_functions.py at 022e2c5",
        judge=partial(judges.correlation, 0.975),
        shape=(32, 256, 2048),
    ),
    PublishedRule(
        name="kernelbench",
        rule="allclose 1e-2 / 1e-2",
        source="ScalingIntelligence/KernelBench src/kernelbench/eval.py at 423217d, its tolerance "
        "for bfloat16; inputs between 0 and 1 as in KernelBench/level1",
        judge=_close(1e-2, judges.allclose_by_actual),
        shape=(128, 256, 1024),
        draw=draws.uniform,
    ),
)


def published_rule(name: str) -> PublishedRule:
    """Return the rule of this project.

    Raises:
        CheckError: There is none.
    """
    for known in RULES:
        if known.name == name:
            return known
    raise CheckError(f"unknown rule {name!r}: one of {', '.join(one.name for one in RULES)}")
