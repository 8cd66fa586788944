"""The kernels that memory bounds, as they are specialised for the compiler."""

from nvfp4check.kernels import (
    dequantize,
    dequantize_fp8_block,
    quantize,
    rms_norm_quantize,
    rope,
    route,
    silu_mul_quantize,
    swizzle,
)
from nvfp4check.kernels.arch import Architecture
from nvfp4check.kernels.codegen import KernelSource
from nvfp4check.kernels.codegen_case import COLUMNS, ROWS, Case, specialised
from nvfp4check.kernels.codegen_checks import Needs


def _quantize(layout: quantize.ScaleLayout) -> Case:
    name = f"quantize ({layout})"

    def source(arch: Architecture) -> KernelSource:
        block_m, block_k = quantize.tile_shape(arch, ROWS, COLUMNS)
        return specialised(
            name,
            quantize._quantize_kernel,
            {
                "x_ptr": "*bf16",
                "decode_ptr": "*fp32",
                "codes_ptr": "*u8",
                "scales_ptr": "*u8",
                "M": "i32",
                "K": "i32",
                "stride_xm": "i32",
                "tiles_across": "i32",
            },
            {
                "BLOCK_M": block_m,
                "BLOCK_K": block_k,
                "CONVENTION": "engine",
                "SWIZZLED": layout is quantize.ScaleLayout.SWIZZLED,
                "NATIVE": arch.converts_e2m1,
            },
        )

    return Case(
        name,
        source,
        _quantizes,
    )


def _dequantize(arch: Architecture) -> KernelSource:
    block_m, block_k = quantize.tile_shape(arch, ROWS, COLUMNS)
    return specialised(
        "dequantize",
        dequantize._dequantize_kernel,
        {
            "codes_ptr": "*u8",
            "scales_ptr": "*u8",
            "decode_ptr": "*fp32",
            "out_ptr": "*bf16",
            "M": "i32",
            "K": "i32",
            "stride_cm": "i32",
            "stride_sm": "i32",
        },
        {"BLOCK_M": block_m, "BLOCK_K": block_k, "NATIVE": arch.converts_e2m1},
    )


def _swizzle(arch: Architecture) -> KernelSource:
    return specialised(
        "swizzle",
        swizzle._swizzle_kernel,
        {
            "linear_ptr": "*u8",
            "flat_ptr": "*u8",
            "M": "i32",
            "C": "i32",
            "stride_sm": "i32",
            "tiles_across": "i32",
        },
        {"TILES": swizzle.swizzle_tiles(arch, COLUMNS // 64)},
    )


def _unswizzle(arch: Architecture) -> KernelSource:
    return specialised(
        "unswizzle",
        swizzle._unswizzle_kernel,
        {"flat_ptr": "*u8", "linear_ptr": "*u8", "M": "i32", "C": "i32", "tiles_across": "i32"},
        {"TILES": swizzle.swizzle_tiles(arch, COLUMNS // 64)},
    )


def _silu_mul_quantize(arch: Architecture) -> KernelSource:
    block_m, block_k = quantize.tile_shape(arch, ROWS, COLUMNS)
    return specialised(
        "silu_mul_quantize",
        silu_mul_quantize._silu_mul_quantize_kernel,
        {
            "gate_ptr": "*bf16",
            "up_ptr": "*bf16",
            "decode_ptr": "*fp32",
            "codes_ptr": "*u8",
            "scales_ptr": "*u8",
            "M": "i32",
            "K": "i32",
            "stride_gm": "i32",
            "stride_um": "i32",
            "tiles_across": "i32",
        },
        {
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
            "CONVENTION": "engine",
            "SWIZZLED": True,
            "NATIVE": arch.converts_e2m1,
        },
    )


def _rms_norm_quantize(arch: Architecture) -> KernelSource:
    tile = rms_norm_quantize.row_tile(arch, ROWS, COLUMNS)
    return specialised(
        "rms_norm_quantize",
        rms_norm_quantize._rms_norm_quantize_kernel,
        {
            "x_ptr": "*bf16",
            "residual_ptr": "*bf16",
            "weight_ptr": "*bf16",
            "summed_ptr": "*bf16",
            "decode_ptr": "*fp32",
            "codes_ptr": "*u8",
            "scales_ptr": "*u8",
            "M": "i32",
            "K": "i32",
            "eps": "fp32",
            "stride_xm": "i32",
            "stride_rm": "i32",
            "tiles_across": "i32",
        },
        {
            "BLOCK_M": tile.block_m,
            "BLOCK_K": tile.block_k,
            "HAS_RESIDUAL": True,
            "CONVENTION": "engine",
            "SWIZZLED": True,
            "NATIVE": arch.converts_e2m1,
        },
        warps=tile.warps,
    )


def _rope(arch: Architecture) -> KernelSource:
    block, block_r = rope.rope_tile(arch, ROWS * 128, 64)
    return specialised(
        "rope",
        rope._rope_kernel,
        {
            "x_ptr": "*bf16",
            "cosine_ptr": "*fp32",
            "sine_ptr": "*fp32",
            "out_ptr": "*bf16",
            "ROWS": "i32",
            "H": "i32",
            "R": "i32",
            "stride_xt": "i32",
            "stride_xh": "i32",
        },
        {"BLOCK": block, "BLOCK_R": block_r},
    )


def _route(arch: Architecture) -> KernelSource:
    return specialised(
        "route",
        route._route_kernel,
        {
            "logits_ptr": "*fp32",
            "bias_ptr": "*fp32",
            "experts_ptr": "*i32",
            "weights_ptr": "*fp32",
            "T": "i32",
            "scaling": "fp32",
            "stride_lt": "i32",
        },
        {
            "N_GROUP": 8,
            "SIZE": 32,
            "TOPK_GROUP": 4,
            "TOP_K": 8,
            "GROUPS": 8,
            "WIDTH": 32,
            "SLOTS": 8,
            "BLOCK_T": 1,
        },
        warps=1,
    )


def _dequantize_fp8_block(arch: Architecture) -> KernelSource:
    block_n, block_k = dequantize_fp8_block.fp8_tile(arch)
    return specialised(
        "dequantize_fp8_block",
        dequantize_fp8_block._dequantize_fp8_block_kernel,
        {
            "w_ptr": "*u8",
            "scale_ptr": "*fp32",
            "out_ptr": "*bf16",
            "N": "i32",
            "K": "i32",
            "stride_wn": "i32",
            "stride_sn": "i32",
        },
        {"stride_sk": 1, "BLOCK_N": block_n, "BLOCK_K": block_k},
        unaligned=("stride_sn",),
    )


def _quantizes(arch: Architecture) -> Needs:
    return Needs(load_width=16, store_width=8, e2m1_encodes=arch.converts_e2m1)


ELEMENTWISE = (
    _quantize(quantize.ScaleLayout.LINEAR),
    _quantize(quantize.ScaleLayout.SWIZZLED),
    Case(
        "dequantize",
        _dequantize,
        lambda arch: Needs(load_width=8, store_width=16, e2m1_decodes=arch.converts_e2m1),
    ),
    Case("swizzle", _swizzle, lambda arch: Needs(load_width=16, store_width=16)),
    Case("unswizzle", _unswizzle, lambda arch: Needs(load_width=16, store_width=16)),
    Case("silu_mul_quantize", _silu_mul_quantize, _quantizes),
    Case("rms_norm_quantize", _rms_norm_quantize, _quantizes),
    Case("rope", _rope, lambda arch: Needs(load_width=16, store_width=16)),
    Case("route", _route, lambda arch: Needs(load_width=16)),
    Case(
        "dequantize_fp8_block",
        _dequantize_fp8_block,
        lambda arch: Needs(load_width=16, store_width=16),
    ),
)
