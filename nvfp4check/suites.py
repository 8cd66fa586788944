"""Test suites to subclass: one class an operation, one pytest test a property.

    from nvfp4check.suites import QuantizeSuite

    class TestMyQuantize(QuantizeSuite):
        convention = "engine"

        def kernel(self, x, global_decode_scale):
            return my_lib.nvfp4_quantize(x, global_decode_scale)

A kernel declares facts as attributes of the class (`nvfp4check.tolerance.Facts`), never a
tolerance. It raises `UnsupportedError` for a shape or dtype that it does not take: such cases are
counted, and a property with no other case is skipped. A test that is set to None is left out.

Cases come from the seed alone (`--nvfp4-seed`), so every process of pytest-xdist draws the same.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from nvfp4check.ops import OPERATIONS, UnsupportedError
from nvfp4check.properties import properties_of
from nvfp4check.properties.law import (
    DEFAULT_EXAMPLES,
    Property,
    PropertyOutcome,
    Setting,
    Verdict,
    context_lost,
)
from nvfp4check.tolerance import Facts

__all__ = [
    "DequantizeFp8BlockSuite",
    "DequantizeSuite",
    "GroupedMatmulSuite",
    "KernelSuite",
    "MatmulSuite",
    "MlaDecodeSuite",
    "QuantizeSuite",
    "RmsNormQuantizeSuite",
    "RopeSuite",
    "RouteSuite",
    "SiluMulQuantizeSuite",
    "SwizzleSuite",
    "UnsupportedError",
    "UnswizzleSuite",
]


#: What a test says that could not be asked: CUDA gives some errors again on every later call.
_UNUSABLE = (
    "not asked: an earlier test left the GPU in error for this process; see the first that failed, "
    "and run this one alone"
)


class KernelSuite:
    """What the suites have in common: a kernel, its facts, and a test for each property."""

    #: Name of the operation.
    operation: ClassVar[str]
    #: Name of the quantisation convention, for operations that have one.
    convention: ClassVar[str | None] = None

    def kernel(self, *arguments: Any) -> Any:
        """Return the outputs of the kernel under test.

        Raises:
            NotImplementedError: The suite was not given a kernel.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: define kernel(self, ...) with the arguments of "
            f"{OPERATIONS[self.operation].signature}"
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the suite of an operation its tests; a user's subclass inherits them."""
        super().__init_subclass__(**kwargs)
        if "operation" not in vars(cls):
            return
        for law in properties_of(cls.operation):
            name = test_name(law)
            if name not in vars(cls):
                setattr(cls, name, _test(law))


def test_name(law: Property) -> str:
    """Return the name of the test of a property: every-width is test_every_width."""
    return f"test_{law.name.replace('-', '_')}"


test_name.__test__ = False  # type: ignore[attr-defined]


def _test(law: Property) -> Callable[[KernelSuite, pytest.FixtureRequest], None]:
    def test(self: KernelSuite, request: pytest.FixtureRequest) -> None:
        setting = setting_of(self, request.config)
        if context_lost(setting.device):
            pytest.fail(_UNUSABLE, pytrace=False)
        outcome = law.run(self.kernel, setting)
        if outcome.verdict is Verdict.SKIP:
            pytest.skip(outcome.message)
        if outcome.verdict is Verdict.FAIL:
            from nvfp4check.faults.diagnosis import with_diagnosis

            if not context_lost(setting.device):
                outcome = with_diagnosis(outcome, self.kernel, setting)
            pytest.fail(report(outcome, setting), pytrace=False)

    test.__name__ = test_name(law)
    test.__qualname__ = test.__name__
    test.__doc__ = law.law
    return test


def setting_of(source: object, config: pytest.Config) -> Setting:
    """Return what a suite is tried under: its convention and facts, and the options of the run."""
    examples = config.getoption("--nvfp4-max-examples", default=None)
    return Setting(
        convention=getattr(source, "convention", None),
        facts=Facts.declared_by(source),
        device=config.getoption("--nvfp4-device", default="cpu"),
        seed=config.getoption("--nvfp4-seed", default=0),
        max_examples=DEFAULT_EXAMPLES if examples is None else examples,
    )


def report(outcome: PropertyOutcome, setting: Setting) -> str:
    """Return a failed property as the text that a test shows."""
    convention = f", convention {setting.convention}" if setting.convention else ""
    lines = [
        f"{outcome.operation}: {outcome.law}",
        f"broken by case {outcome.cases}: {outcome.message}",
    ]
    if outcome.diagnosis:
        lines.append(f"diagnosis: {outcome.diagnosis}")
    lines.append(f"(seed {setting.seed}, device {setting.device}{convention})")
    return "\n".join(lines)


class QuantizeSuite(KernelSuite):
    """kernel(self, x, global_decode_scale) -> packed_codes, block_scales."""

    operation = "quantize"


class DequantizeSuite(KernelSuite):
    """kernel(self, packed_codes, block_scales, global_decode_scale, dtype) -> values."""

    operation = "dequantize"


class SwizzleSuite(KernelSuite):
    """kernel(self, block_scales) -> flat."""

    operation = "swizzle"


class UnswizzleSuite(KernelSuite):
    """kernel(self, flat, rows, columns) -> block_scales."""

    operation = "unswizzle"


class MatmulSuite(KernelSuite):
    """kernel(self, a_codes, a_scales, b_codes, b_scales, alpha, dtype) -> product."""

    operation = "matmul"


class GroupedMatmulSuite(KernelSuite):
    """As MatmulSuite, with kernel(..., alpha, expert_offsets, dtype) and B of all experts."""

    operation = "grouped_matmul"


class SiluMulQuantizeSuite(KernelSuite):
    """kernel(self, gate, up, global_decode_scale) -> packed_codes, block_scales."""

    operation = "silu_mul_quantize"


class RmsNormQuantizeSuite(KernelSuite):
    """kernel(self, x, weight, eps, global_decode_scale, residual=None) -> codes, scales[, sum]."""

    operation = "rms_norm_quantize"


class RopeSuite(KernelSuite):
    """kernel(self, x, positions, config) -> rotated."""

    operation = "rope"


class RouteSuite(KernelSuite):
    """kernel(self, logits, bias, n_group, topk_group, top_k, scaling) -> experts, weights."""

    operation = "route"


class MlaDecodeSuite(KernelSuite):
    """kernel(self, q_latent, q_rope, latent_pages, rope_pages, page_table, lengths, scale)."""

    operation = "mla_decode"


class DequantizeFp8BlockSuite(KernelSuite):
    """kernel(self, w, scale_inv, dtype) -> values."""

    operation = "dequantize_fp8_block"
