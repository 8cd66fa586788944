from nvfp4check.kernels.dequantize import dequantize
from nvfp4check.kernels.matmul import matmul
from nvfp4check.kernels.quantize import quantize
from nvfp4check.kernels.swizzle import swizzle, unswizzle
from nvfp4check.suites import (
    DequantizeSuite,
    MatmulSuite,
    QuantizeSuite,
    SwizzleSuite,
    UnswizzleSuite,
)


class TestQuantizeEngine(QuantizeSuite):
    convention = "engine"
    reciprocal = "ieee"

    def kernel(self, x, global_decode_scale):
        return quantize(x, global_decode_scale, "engine")


class TestQuantizeEngineVllm(QuantizeSuite):
    convention = "engine-vllm"
    reciprocal = "ieee"

    def kernel(self, x, global_decode_scale):
        return quantize(x, global_decode_scale, "engine-vllm")


class TestQuantizeModelopt(QuantizeSuite):
    convention = "modelopt"
    reciprocal = "ieee"

    def kernel(self, x, global_decode_scale):
        return quantize(x, global_decode_scale, "modelopt")


class TestDequantize(DequantizeSuite):
    def kernel(self, *given):
        return dequantize(*given)


class TestSwizzle(SwizzleSuite):
    def kernel(self, *given):
        return swizzle(*given)


class TestUnswizzle(UnswizzleSuite):
    def kernel(self, *given):
        return unswizzle(*given)


class TestMatmul(MatmulSuite):
    def kernel(self, *given):
        return matmul(*given)
