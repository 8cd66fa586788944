"""The project's own kernels as the launchers specialise them, and what each must be made of.

Sizes are those of DeepSeek-V3: rows of 7168 elements, pointers and strides that are multiples of
16, bfloat16 in and out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nvfp4check.kernels import (
    dequantize,
    dequantize_fp8_block,
    grouped_matmul,
    matmul,
    mla_decode,
    quantize,
    rms_norm_quantize,
    rope,
    route,
    silu_mul_quantize,
    swizzle,
)
from nvfp4check.kernels.arch import SM90, Architecture
from nvfp4check.kernels.codegen import KernelSource
from nvfp4check.kernels.codegen_checks import Needs

_ROWS, _COLUMNS, _EXPERTS = 4096, 7168, 256


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel's specialisation and needs, by architecture; None where it is not launched."""

    name: str
    source: Callable[[Architecture], KernelSource]
    needs: Callable[[Architecture], Needs]
    runs_on: Callable[[Architecture], bool] = lambda arch: True


def _source(
    name: str,
    function: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    *,
    unaligned: tuple[str, ...] = (),
    warps: int = 4,
    stages: int = 3,
) -> KernelSource:
    """Return a source whose pointers and integers are multiples of 16, but for those named."""
    aligned = {
        argument
        for argument, kind in arguments.items()
        if (kind.startswith("*") or kind == "i32") and argument not in unaligned
    }
    return KernelSource(
        name=name,
        function=function,
        signature={**arguments, **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        aligned=frozenset(aligned),
        warps=warps,
        stages=stages,
    )


def _quantize(layout: quantize.ScaleLayout) -> Case:
    name = f"quantize ({layout})"

    def source(arch: Architecture) -> KernelSource:
        block_m, block_k = quantize.tile_shape(arch, _ROWS, _COLUMNS)
        return _source(
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
    block_m, block_k = quantize.tile_shape(arch, _ROWS, _COLUMNS)
    return _source(
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
    return _source(
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
        {"TILES": swizzle.swizzle_tiles(arch, _COLUMNS // 64)},
    )


def _unswizzle(arch: Architecture) -> KernelSource:
    return _source(
        "unswizzle",
        swizzle._unswizzle_kernel,
        {"flat_ptr": "*u8", "linear_ptr": "*u8", "M": "i32", "C": "i32", "tiles_across": "i32"},
        {"TILES": swizzle.swizzle_tiles(arch, _COLUMNS // 64)},
    )


def descriptor(block: tuple[int, ...], kind: str) -> str:
    """Return the Triton type of a TMA descriptor."""
    return f"tensordesc<{kind}[{', '.join(map(str, block))}]>"


def scale_type(rows: int, k: int) -> str:
    """Return the Triton type of the descriptor of swizzled scales."""
    return descriptor((1, rows // 128, k // 64, 2, 256), "fp8e4nv")


def matmul_tma_source(name: str, config: matmul.MatmulConfig) -> KernelSource:
    """Return the many-rows matmul kernel under a configuration."""
    half_k = config.block_k // 2
    return _source(
        name,
        matmul._matmul_tma_kernel,
        {
            "a_desc": descriptor((config.block_m, half_k), "u8"),
            "a_scale_desc": scale_type(config.block_m, config.block_k),
            "b_desc": descriptor((config.block_n, half_k), "u8"),
            "b_scale_desc": scale_type(config.block_n, config.block_k),
            "alpha_ptr": "*fp32",
            "out_ptr": "*bf16",
            "M": "i32",
            "N": "i32",
            "K": "i32",
            "stride_om": "i32",
        },
        {
            "stride_on": 1,
            "PROGRAMS": 148,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP": config.group,
            "STAGES": config.stages,
            "SPECIALIZE": config.specialize,
        },
        warps=config.warps,
        stages=config.stages,
    )


def _matmul_tma(arch: Architecture) -> KernelSource:
    return matmul_tma_source("matmul (many rows)", matmul.default_tma_config(arch))


def _matmul_specialized(arch: Architecture) -> KernelSource:
    return matmul_tma_source("matmul (warp-specialised)", matmul.SPECIALIZED_CONFIG)


def _matmul_few(arch: Architecture) -> KernelSource:
    config = matmul.few_config(arch)
    return _source(
        "matmul (few rows)",
        matmul._matmul_few_kernel,
        {
            "a_desc": descriptor((config.block_m, config.block_k // 2), "u8"),
            "a_scale_desc": scale_type(config.block_m, config.block_k),
            "b_ptr": "*u8",
            "b_scale_ptr": "*u8",
            "alpha_ptr": "*fp32",
            "out_ptr": "*bf16",
            "M": "i32",
            "N": "i32",
            "K": "i32",
            "stride_bn": "i32",
            "stride_bsn": "i32",
            "stride_on": "i32",
        },
        {
            "stride_om": 1,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "STAGES": config.stages,
        },
        unaligned=("N",),
        warps=config.warps,
        stages=config.stages,
    )


def _matmul_pointer(arch: Architecture) -> KernelSource:
    config = matmul.POINTER_CONFIG
    return _source(
        "matmul (float16)",
        matmul._matmul_pointer_kernel,
        {
            "a_ptr": "*u8",
            "a_scale_ptr": "*u8",
            "b_ptr": "*u8",
            "b_scale_ptr": "*u8",
            "alpha_ptr": "*fp32",
            "out_ptr": "*bf16",
            "M": "i32",
            "N": "i32",
            "K": "i32",
            "stride_am": "i32",
            "stride_asm": "i32",
            "stride_bn": "i32",
            "stride_bsn": "i32",
            "stride_om": "i32",
        },
        {
            "stride_on": 1,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP": config.group,
            "STAGES": config.stages,
        },
        warps=config.warps,
        stages=config.stages,
    )


_GROUPED_ARGUMENTS = {
    "alpha_ptr": "*fp32",
    "offsets_ptr": "*i32",
    "out_ptr": "*bf16",
    "N": "i32",
    "K": "i32",
    "experts": "i32",
}


def _grouped_matmul(arch: Architecture) -> KernelSource:
    config = matmul.few_config(arch)
    return _source(
        "grouped_matmul",
        grouped_matmul._grouped_matmul_kernel,
        {
            "b_desc": descriptor((config.block_m, config.block_k // 2), "u8"),
            "b_scale_desc": scale_type(config.block_m, config.block_k),
            "a_ptr": "*u8",
            "a_scale_ptr": "*u8",
            **_GROUPED_ARGUMENTS,
            "max_tiles": "i32",
            "padded_n": "i32",
            "stride_am": "i32",
            "stride_asm": "i32",
            "stride_om": "i32",
        },
        {
            "PROGRAMS": 148,
            "EXPERTS": _EXPERTS,
            "BLOCK_N": config.block_m,
            "BLOCK_T": config.block_n,
            "BLOCK_K": config.block_k,
            "STAGES": config.stages,
        },
        unaligned=("max_tiles",),
        warps=config.warps,
        stages=config.stages,
    )


def _grouped_pointer(arch: Architecture) -> KernelSource:
    config = matmul.POINTER_CONFIG
    strides = ("am", "asm", "be", "bn", "bse", "bsn", "om")
    return _source(
        "grouped_matmul (float16)",
        grouped_matmul._grouped_matmul_pointer_kernel,
        {
            "a_ptr": "*u8",
            "a_scale_ptr": "*u8",
            "b_ptr": "*u8",
            "b_scale_ptr": "*u8",
            **_GROUPED_ARGUMENTS,
            **{f"stride_{name}": "i32" for name in strides},
        },
        {
            "EXPERTS": _EXPERTS,
            "BLOCK_N": config.block_n,
            "BLOCK_T": 64,
            "BLOCK_K": config.block_k,
            "STAGES": config.stages,
        },
        warps=config.warps,
        stages=config.stages,
    )


def _silu_mul_quantize(arch: Architecture) -> KernelSource:
    block_m, block_k = quantize.tile_shape(arch, _ROWS, _COLUMNS)
    return _source(
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
    tile = rms_norm_quantize.row_tile(arch, _ROWS, _COLUMNS)
    return _source(
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
    block, block_r = rope.rope_tile(arch, _ROWS * 128, 64)
    return _source(
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
    return _source(
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


def _mla_decode(arch: Architecture) -> KernelSource:
    tile = mla_decode.decode_tile(arch, 128, 2)
    strides = ("qb", "qh", "rb", "rh", "lp", "ls", "kp", "ks", "tb")
    return _source(
        "mla_decode",
        mla_decode._mla_decode_kernel,
        {
            "q_latent_ptr": "*bf16",
            "q_rope_ptr": "*bf16",
            "latent_ptr": "*bf16",
            "rope_ptr": "*bf16",
            "page_table_ptr": "*i32",
            "lengths_ptr": "*i32",
            "partial_ptr": "*fp32",
            "maximum_ptr": "*fp32",
            "sum_ptr": "*fp32",
            "scale_log2": "fp32",
            "H": "i32",
            "L": "i32",
            "R": "i32",
            **{f"stride_{name}": "i32" for name in strides},
            "splits": "i32",
        },
        {
            "PAGE": 64,
            "SPLIT": mla_decode.SPLIT,
            "BLOCK_H": tile.block_h,
            "BLOCK_N": tile.block_n,
            "BLOCK_L": 512,
            "BLOCK_R": 64,
            "PRECISION": "ieee",
        },
        unaligned=("splits", "stride_tb"),
        warps=tile.warps,
        stages=tile.stages,
    )


def _mla_join(arch: Architecture) -> KernelSource:
    return _source(
        "mla_decode (join)",
        mla_decode._mla_join_kernel,
        {
            "partial_ptr": "*fp32",
            "maximum_ptr": "*fp32",
            "sum_ptr": "*fp32",
            "lengths_ptr": "*i32",
            "out_ptr": "*bf16",
            "H": "i32",
            "L": "i32",
            "splits": "i32",
            "SPLIT": "i32",
        },
        {"BLOCK_L": 512},
        unaligned=("splits",),
    )


def _dequantize_fp8_block(arch: Architecture) -> KernelSource:
    block_n, block_k = dequantize_fp8_block.fp8_tile(arch)
    return _source(
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


_NATIVE = Needs(nvfp4_matrix=True, tma_loads=True, store_width=16)


def _quantizes(arch: Architecture) -> Needs:
    return Needs(load_width=16, store_width=8, e2m1_encodes=arch.converts_e2m1)


def _multiplies(arch: Architecture) -> bool:
    return arch.multiplies_nvfp4


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _quantize(quantize.ScaleLayout.LINEAR),
        _quantize(quantize.ScaleLayout.SWIZZLED),
        Case(
            "dequantize",
            _dequantize,
            lambda arch: Needs(load_width=8, store_width=16, e2m1_decodes=arch.converts_e2m1),
        ),
        Case("swizzle", _swizzle, lambda arch: Needs(load_width=16, store_width=16)),
        Case("unswizzle", _unswizzle, lambda arch: Needs(load_width=16, store_width=16)),
        Case("matmul (many rows)", _matmul_tma, lambda arch: _NATIVE, _multiplies),
        Case(
            "matmul (warp-specialised)",
            _matmul_specialized,
            lambda arch: _NATIVE,
            lambda arch: arch.tensor_memory_columns > 0,
        ),
        Case("matmul (few rows)", _matmul_few, lambda arch: _NATIVE, _multiplies),
        Case(
            "matmul (float16)",
            _matmul_pointer,
            lambda arch: Needs(matrix=True, load_width=8, store_width=16),
            lambda arch: arch is SM90,
        ),
        Case("grouped_matmul", _grouped_matmul, lambda arch: _NATIVE, _multiplies),
        Case(
            "grouped_matmul (float16)",
            _grouped_pointer,
            lambda arch: Needs(matrix=True, load_width=8, store_width=16),
            lambda arch: arch is SM90,
        ),
        Case("silu_mul_quantize", _silu_mul_quantize, _quantizes),
        Case("rms_norm_quantize", _rms_norm_quantize, _quantizes),
        Case("rope", _rope, lambda arch: Needs(load_width=16, store_width=16)),
        Case("route", _route, lambda arch: Needs(load_width=16)),
        Case(
            "mla_decode",
            _mla_decode,
            lambda arch: Needs(matrix=True, load_width=16, store_width=16),
        ),
        Case("mla_decode (join)", _mla_join, lambda arch: Needs(load_width=16, store_width=8)),
        Case(
            "dequantize_fp8_block",
            _dequantize_fp8_block,
            lambda arch: Needs(load_width=16, store_width=16),
        ),
    )
}
