"""The project's own kernels by operation, as `module:function`; importing this loads no torch."""

#: Launchers in the form of their operations.
LAUNCHERS = {
    "quantize": "nvfp4check.kernels.quantize:quantize",
    "dequantize": "nvfp4check.kernels.dequantize:dequantize",
    "swizzle": "nvfp4check.kernels.swizzle:swizzle",
    "unswizzle": "nvfp4check.kernels.swizzle:unswizzle",
    "matmul": "nvfp4check.kernels.matmul:matmul",
    "grouped_matmul": "nvfp4check.kernels.grouped_matmul:grouped_matmul",
    "silu_mul_quantize": "nvfp4check.kernels.silu_mul_quantize:silu_mul_quantize",
    "rms_norm_quantize": "nvfp4check.kernels.rms_norm_quantize:rms_norm_quantize",
    "rope": "nvfp4check.kernels.rope:rope",
    "route": "nvfp4check.kernels.route:route",
    "mla_decode": "nvfp4check.kernels.mla_decode:mla_decode",
    "dequantize_fp8_block": "nvfp4check.kernels.dequantize_fp8_block:dequantize_fp8_block",
}
