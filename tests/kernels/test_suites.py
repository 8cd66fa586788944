from functools import partial

import pytest

from nvfp4check.kernels import grouped_matmul as grouped
from nvfp4check.kernels import matmul as products
from nvfp4check.kernels.dequantize import dequantize
from nvfp4check.kernels.dequantize_fp8_block import dequantize_fp8_block
from nvfp4check.kernels.mla_decode import mla_decode
from nvfp4check.kernels.quantize import quantize
from nvfp4check.kernels.registry import LAUNCHERS
from nvfp4check.kernels.rms_norm_quantize import rms_norm_quantize
from nvfp4check.kernels.rope import rope
from nvfp4check.kernels.route import route
from nvfp4check.kernels.silu_mul_quantize import silu_mul_quantize
from nvfp4check.kernels.swizzle import swizzle, unswizzle
from nvfp4check.ops import OPERATIONS, resolve
from nvfp4check.suites import (
    DequantizeFp8BlockSuite,
    DequantizeSuite,
    GroupedMatmulSuite,
    MatmulSuite,
    MlaDecodeSuite,
    QuantizeSuite,
    RmsNormQuantizeSuite,
    RopeSuite,
    RouteSuite,
    SiluMulQuantizeSuite,
    SwizzleSuite,
    UnswizzleSuite,
)


class TestQuantizeEngine(QuantizeSuite):
    convention = "engine"
    reciprocal = "ieee"
    kernel = staticmethod(partial(quantize, convention="engine"))


class TestQuantizeEngineVllm(QuantizeSuite):
    convention = "engine-vllm"
    reciprocal = "ieee"
    kernel = staticmethod(partial(quantize, convention="engine-vllm"))


class TestQuantizeModelopt(QuantizeSuite):
    convention = "modelopt"
    reciprocal = "ieee"
    kernel = staticmethod(partial(quantize, convention="modelopt"))


class TestDequantize(DequantizeSuite):
    kernel = staticmethod(dequantize)


class TestSwizzle(SwizzleSuite):
    kernel = staticmethod(swizzle)


class TestUnswizzle(UnswizzleSuite):
    kernel = staticmethod(unswizzle)


class TestMatmul(MatmulSuite):
    kernel = staticmethod(products.matmul)


class TestMatmulFloat16(MatmulSuite):
    kernel = staticmethod(products._matmul_pointer)


class TestGroupedMatmul(GroupedMatmulSuite):
    kernel = staticmethod(grouped.grouped_matmul)


class TestGroupedMatmulFloat16(GroupedMatmulSuite):
    kernel = staticmethod(grouped._grouped_pointer)


class TestSiluMulQuantize(SiluMulQuantizeSuite):
    convention = "engine"
    reciprocal = "ieee"
    kernel = staticmethod(silu_mul_quantize)


class TestRmsNormQuantize(RmsNormQuantizeSuite):
    batch_invariant = True
    convention = "engine"
    reciprocal = "ieee"
    kernel = staticmethod(rms_norm_quantize)


class TestRope(RopeSuite):
    kernel = staticmethod(rope)


class TestRoute(RouteSuite):
    ties = "lower-index"
    kernel = staticmethod(route)


class TestMlaDecode(MlaDecodeSuite):
    batch_invariant = True
    intermediate = "bfloat16"
    kernel = staticmethod(mla_decode)


class TestDequantizeFp8Block(DequantizeFp8BlockSuite):
    kernel = staticmethod(dequantize_fp8_block)


def test_every_operation_has_a_kernel_of_the_project():
    assert LAUNCHERS.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("operation", LAUNCHERS)
def test_every_launcher_is_where_the_registry_says(operation):
    assert callable(resolve(LAUNCHERS[operation]))


def test_launchers_declare_the_facts_that_are_theirs():
    assert resolve(LAUNCHERS["mla_decode"]).intermediate == "bfloat16"
    assert resolve(LAUNCHERS["quantize"]).reciprocal == "ieee"
