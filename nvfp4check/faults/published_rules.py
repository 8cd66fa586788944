"""The tolerance rules that projects publish, re-coded, each with the inputs its tests draw.

Contract:
    judge     (actual, expected) -> accepted; NaN must stand where NaN is expected, and the rule
              judges the rest: more than some of the projects ask
    expected  the exact product of the decoded operands, or of the operands before they were
              quantised where the project compares with that
    inputs    standard normal operands, of a size near those of the project's tests, quantised by
              the reference under the engine's convention with global scales amax / 2688

The projects also run other checks than these, and a rule is judged here alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from nvfp4check.findings import CheckError
from nvfp4ref import nvfp4
from nvfp4ref.conventions import Convention
from nvfp4ref.formats import NVFP4
from nvfp4ref.matmul import exact

Tensor = torch.Tensor

#: Whether an actual result is accepted beside the expected one, both float64 and finite.
Judge = Callable[[Tensor, Tensor], bool]


#: M, N, K, and standard deviations of activations and weights: results of about 0.045.
MODEL_SIZED = ((64, 256, 2048), (0.05, 0.02))


@dataclass(frozen=True, slots=True)
class Sample:
    """Quantised operands, and the two products a result may be compared with."""

    inputs: dict[str, object]
    quantised: Tensor
    unquantised: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRule:
    """One project's way to compare a product with a reference."""

    name: str
    #: Project, file and rule in words.
    rule: str
    source: str
    judge: Judge
    #: M, N, K of the inputs.
    shape: tuple[int, int, int]
    spread: tuple[float, float] = (1.0, 1.0)
    against_unquantised: bool = False

    def sample(self, seed: int) -> Sample:
        """Return operands of the kind that the project's tests draw."""
        return self._sample(seed, self.shape, self.spread)

    def model_sized_sample(self, seed: int) -> Sample:
        """Return operands as large as a model's activations and weights are."""
        return self._sample(seed, *MODEL_SIZED)

    def _sample(
        self, seed: int, shape: tuple[int, int, int], spread: tuple[float, float]
    ) -> Sample:
        m, n, k = shape
        generator = torch.Generator().manual_seed(seed)
        a = (spread[0] * torch.randn(m, k, generator=generator)).to(torch.bfloat16)
        b = (spread[1] * torch.randn(n, k, generator=generator)).to(torch.bfloat16)
        scale_a, scale_b = (one.abs().max().float() / NVFP4.full_scale for one in (a, b))
        a_codes, a_scales = nvfp4.quantize(a, scale_a, Convention.ENGINE)
        b_codes, b_scales = nvfp4.quantize(b, scale_b, Convention.ENGINE)
        alpha = scale_a * scale_b
        taken = {
            "a_codes": a_codes,
            "a_scales": a_scales,
            "b_codes": b_codes,
            "b_scales": b_scales,
            "alpha": alpha,
            "dtype": torch.bfloat16,
        }
        product = exact(a_codes, a_scales, b_codes, b_scales).value * alpha.double()
        return Sample(taken, product, a.double() @ b.double().T)

    def accepts(self, actual: Tensor, expected: Tensor) -> bool:
        """Tell whether the rule takes a result for right."""
        if actual.shape != expected.shape or not actual.numel():
            return actual.shape == expected.shape
        wide = actual.double()
        if not torch.equal(wide.isnan(), expected.isnan()):
            return False
        infinite = wide.isinf() | expected.isinf()
        if not torch.equal(wide[infinite], expected[infinite].to(actual.dtype).double()):
            return False
        judged = ~(wide.isnan() | infinite)
        if not judged.any():
            return True
        if judged.all():
            return self.judge(wide, expected)
        return self.judge(torch.where(judged, wide, 0.0), torch.where(judged, expected, 0.0))


def _close(atol: float, rtol: float, actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, atol=atol, rtol=rtol)


def _cosine(least: float, actual: Tensor, expected: Tensor) -> bool:
    return float(torch.cosine_similarity(actual.flatten(), expected.flatten(), dim=0)) > least


def _diff(most: float, actual: Tensor, expected: Tensor) -> bool:
    """DeepGEMM's calc_diff: 1 - 2 x.y / (x.x + y.y)."""
    total = float((actual.square() + expected.square()).sum())
    return total == 0 or 1 - 2 * float((actual * expected).sum()) / total <= most


def _both(atol: float, rtol: float, actual: Tensor, expected: Tensor) -> bool:
    """flashinfer-bench: an element is wrong only if both its errors exceed their limits."""
    error = (actual - expected).abs()
    relative = error / (expected.abs() + 1e-8)
    return not bool(((error > atol) & (relative > rtol)).any())


def _scale_free(largest: float, mean: float, actual: Tensor, expected: Tensor) -> bool:
    """triton_kernels: errors relative to max(RMS of the reference, its element)."""
    rms = expected.square().mean().sqrt()
    scale = torch.maximum(rms, expected.abs()).clamp(min=1e-30)
    relative = (actual - expected).abs() / scale
    return float(relative.max()) <= largest and float(relative.square().mean().sqrt()) <= mean


def _correlation(least: float, actual: Tensor, expected: Tensor) -> bool:
    x, y = (one.flatten() - one.mean() for one in (actual, expected))
    norms = float(x.norm() * y.norm())
    if norms == 0:
        return bool(torch.equal(actual, expected)) or float(x.norm()) == float(y.norm())
    return float(x @ y) / norms >= least


def tolerance_rule(atol: float, rtol: float) -> PublishedRule:
    """Return allclose with tolerances that a user names.

    Raises:
        CheckError: One is negative, or NaN.
    """
    if not (atol >= 0 and rtol >= 0):
        raise CheckError(f"--atol {atol} and --rtol {rtol} must be numbers, and not negative")
    return PublishedRule(
        name=f"atol {atol:g}, rtol {rtol:g}",
        rule="|actual - expected| <= atol + rtol |expected|",
        source="the command line",
        judge=partial(_close, atol, rtol),
        shape=(128, 128, 1024),
    )


RULES = (
    PublishedRule(
        name="vllm",
        rule="allclose, atol = rtol = 0.1, K <= 256",
        source="vLLM, tests/kernels/quantization/test_nvfp4_scaled_mm.py",
        judge=partial(_close, 1e-1, 1e-1),
        shape=(128, 128, 256),
    ),
    PublishedRule(
        name="flashinfer",
        rule="cosine > 0.97 with the product before quantisation",
        source="FlashInfer, tests/gemm/test_mm_fp4.py",
        judge=partial(_cosine, 0.97),
        shape=(48, 256, 512),
        against_unquantised=True,
    ),
    PublishedRule(
        name="deepgemm",
        rule="1 - 2xy / (xx + yy) < 0.02 with the product before quantisation",
        source="DeepGEMM, QuantConfig.max_diff in tests/generators.py; calc_diff in "
        "deep_gemm/testing/numeric.py",
        judge=partial(_diff, 2e-2),
        shape=(64, 256, 2048),
        against_unquantised=True,
    ),
    PublishedRule(
        name="transformer-engine",
        rule="allclose, atol = rtol = 8e-3",
        source="TransformerEngine, tests/pytorch/nvfp4/test_nvfp4_gemm_exact.py",
        judge=partial(_close, 8e-3, 8e-3),
        shape=(128, 128, 256),
    ),
    PublishedRule(
        name="flashinfer-bench",
        rule="wrong where the error is above 1e-2 and above 1e-2 of the value",
        source="flashinfer-bench, flashinfer_bench/bench/evaluators/default.py",
        judge=partial(_both, 1e-2, 1e-2),
        shape=(64, 256, 2048),
    ),
    PublishedRule(
        name="triton_kernels",
        rule="errors over max(RMS, |value|): at most 2e-2, RMS at most 4e-3",
        source="Triton, python/triton_kernels/triton_kernels/testing.py, assert_close",
        judge=partial(_scale_free, 2e-2, 4e-3),
        shape=(128, 256, 1024),
    ),
    PublishedRule(
        name="sglang",
        rule="1 - 2xy / (xx + yy) <= 1e-3",
        source="SGLang, its FP4 and FP8 GEMM tests with DeepGEMM's calc_diff",
        judge=partial(_diff, 1e-3),
        shape=(64, 256, 2048),
    ),
    PublishedRule(
        name="tt-metal",
        rule="Pearson correlation >= 0.99",
        source="Tenstorrent tt-metal, models/demos/deepseek_v3/tests",
        judge=partial(_correlation, 0.99),
        shape=(32, 256, 2048),
        spread=(1.0, 0.02),
    ),
    PublishedRule(
        name="kernelbench",
        rule="allclose, atol = rtol = 1e-2",
        source="KernelBench, src/kernelbench/eval.py",
        judge=partial(_close, 1e-2, 1e-2),
        shape=(128, 256, 1024),
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
