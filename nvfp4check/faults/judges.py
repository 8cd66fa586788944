"""How projects compare a product with the one they expect, each as its own source has it.

Contract:
    a judge takes (actual, expected): the kernel's output in its dtype, and the expected product in
    float64; it casts, treats NaN and infinity, and compares as the project does, no better

Read from the sources that `published_rules` names, and written anew.
"""

from collections.abc import Callable

import torch

Tensor = torch.Tensor

#: Whether a project takes an actual result for right beside the expected one.
Judge = Callable[[Tensor, Tensor], bool]


def assert_close(atol: float, rtol: float, actual: Tensor, expected: Tensor) -> bool:
    """`torch.testing.assert_close` in the output's dtype: a NaN equals nothing."""
    wanted = expected.to(actual.dtype)
    return bool(torch.isclose(actual, wanted, rtol=rtol, atol=atol).all())


def assert_close_without_nan(atol: float, rtol: float, actual: Tensor, expected: Tensor) -> bool:
    """TransformerEngine: NaN becomes 0 on both sides, unless all that is expected is NaN."""
    wanted = expected.to(actual.dtype)
    if bool(wanted.isnan().all()):
        return False
    actual, wanted = (torch.where(one.isnan(), 0.0, one) for one in (actual, wanted))
    return assert_close(atol, rtol, actual, wanted)


def allclose_by_actual(atol: float, rtol: float, actual: Tensor, expected: Tensor) -> bool:
    """`allclose(expected, actual)`: the relative part is of the actual value."""
    wanted = expected.to(actual.dtype)
    return bool(torch.allclose(wanted, actual, atol=atol, rtol=rtol))


def allclose_in_float32(atol: float, rtol: float, actual: Tensor, expected: Tensor) -> bool:
    """TensorRT-LLM: `allclose(expected, actual.float())`, nothing rounded to the output's dtype."""
    return bool(torch.allclose(expected.float(), actual.float(), atol=atol, rtol=rtol))


def cosine(least: float, actual: Tensor, expected: Tensor) -> bool:
    """FlashInfer: `cosine_similarity` of the flattened tensors in float32."""
    wanted = expected.to(actual.dtype).float().flatten()
    return float(torch.cosine_similarity(wanted, actual.float().flatten(), dim=0)) > least


def fraction_of_largest(fraction: float, rtol: float, actual: Tensor, expected: Tensor) -> bool:
    """FlashInfer's fuzzer: |error| <= fraction of the largest + 1e-3 + rtol |expected|.

    A NaN compares false, so it is refused only where something finite is expected.
    """
    found, wanted = actual.float(), expected.float()
    if bool((~found.isfinite() & wanted.isfinite()).any()):
        return False
    if not wanted.numel():
        return True
    atol = fraction * float(wanted.abs().max()) + 1e-3
    return not bool(((found - wanted).abs() > atol + rtol * wanted.abs()).any())


def difference(actual: Tensor, expected: Tensor) -> float:
    """DeepGEMM's `calc_diff`: 1 - 2 x.y / (x.x + y.y), 0 where both are 0 throughout."""
    x, y = actual.double(), expected.to(actual.dtype).double()
    total = float((x * x + y * y).sum())
    return 0.0 if total == 0 else 1 - 2 * float((x * y).sum()) / total


def difference_below(limit: float, actual: Tensor, expected: Tensor) -> bool:
    """DeepGEMM: the difference is below a limit."""
    return difference(actual, expected) < limit


def difference_at_most(limit: float, actual: Tensor, expected: Tensor) -> bool:
    """SGLang's comparator: the same without the case of zeros, which gives 0/0 and fails."""
    if not actual.numel():
        return True
    if not bool(actual.any()) and not bool(expected.to(actual.dtype).any()):
        return False
    return difference(actual, expected) <= limit


def matched(ratio: float, atol: float, rtol: float, actual: Tensor, expected: Tensor) -> bool:
    """flashinfer-bench: an element is wrong only if both its errors exceed their limits."""
    found, wanted = actual.float(), expected.to(actual.dtype).float()
    if not bool(found.isfinite().all()):
        return False
    if not found.numel():
        return True
    error = (found - wanted).abs()
    wrong = (error > atol) & (error / (wanted.abs() + 1e-8) > rtol)
    return 1 - float(wrong.sum()) / wrong.numel() >= ratio


def scale_free(largest: float, mean: float, actual: Tensor, expected: Tensor) -> bool:
    """triton_kernels: errors over max(RMS of the reference, its element)."""
    if not expected.numel():
        return True
    found, wanted = actual.float(), expected.float()
    if not torch.equal(found.isinf(), wanted.isinf()):
        return False
    found, wanted = (torch.where(one.isinf(), 0.0, one) for one in (found, wanted))
    factor = 1.0 / (wanted.abs().max() + 1e-30)
    found, wanted = found * factor, wanted * factor
    rms = wanted.square().mean().sqrt() + 1e-30
    relative = (wanted - found).abs() / torch.maximum(rms, wanted.abs())
    return float(relative.max()) <= largest and float(relative.square().mean().sqrt()) <= mean


def correlation(least: float, actual: Tensor, expected: Tensor) -> bool:
    """tt-metal's `comp_pcc`: what is not finite counts as 0; a constant correlates with all."""
    found, wanted = actual.float(), expected.to(actual.dtype).float()
    none, all_ = wanted.isnan().all(), found.isnan().all()
    if bool(none) or bool(all_):
        return bool(none) and bool(all_)
    if bool(wanted.any()) != bool(found.any()):
        return False
    x, y = (torch.where(one.isfinite(), one, 0.0).flatten().double() for one in (wanted, found))
    if torch.equal(x, y):
        return True
    x, y = x - x.mean(), y - y.mean()
    norms = float(x.norm() * y.norm())
    return norms == 0 or float(x @ y) / norms >= least


def signal_to_noise(least: float, actual: Tensor, expected: Tensor) -> bool:
    """`compute_error` of torchao in dB, of norms in the output's dtype."""
    wanted = expected.to(actual.dtype)
    signal, noise = torch.linalg.vector_norm(wanted), torch.linalg.vector_norm(wanted - actual)
    return float(20 * torch.log10(signal / noise)) >= least


def equal(actual: Tensor, expected: Tensor) -> bool:
    """CUTLASS: every element equal, and neither tensor all zeros."""
    wanted = expected.to(actual.dtype)
    return torch.equal(actual, wanted) and bool(actual.any()) and bool(wanted.any())
