"""The kernels of the tensor cores, as they are specialised for the compiler."""

from nvfp4check.kernels import grouped_matmul, matmul, matmul_kernels, mla_decode
from nvfp4check.kernels.arch import SM90, Architecture
from nvfp4check.kernels.codegen import KernelSource
from nvfp4check.kernels.codegen_case import EXPERTS, Case, specialised
from nvfp4check.kernels.codegen_checks import Needs


def descriptor(block: tuple[int, ...], kind: str) -> str:
    """Return the Triton type of a TMA descriptor."""
    return f"tensordesc<{kind}[{', '.join(map(str, block))}]>"


def scale_type(rows: int, k: int) -> str:
    """Return the Triton type of the descriptor of swizzled scales."""
    return descriptor((1, rows // 128, k // 64, 2, 256), "fp8e4nv")


def matmul_tma_source(name: str, config: matmul.MatmulConfig) -> KernelSource:
    """Return the many-rows matmul kernel under a configuration."""
    half_k = config.block_k // 2
    return specialised(
        name,
        matmul_kernels._matmul_tma_kernel,
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
    return specialised(
        "matmul (few rows)",
        matmul_kernels._matmul_few_kernel,
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
    return specialised(
        "matmul (float16)",
        matmul_kernels._matmul_pointer_kernel,
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
    return specialised(
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
            "EXPERTS": EXPERTS,
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
    return specialised(
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
            "EXPERTS": EXPERTS,
            "BLOCK_N": config.block_n,
            "BLOCK_T": 64,
            "BLOCK_K": config.block_k,
            "STAGES": config.stages,
        },
        warps=config.warps,
        stages=config.stages,
    )


def _mla_decode(arch: Architecture) -> KernelSource:
    tile = mla_decode.decode_tile(arch, 128, 2)
    strides = ("qb", "qh", "rb", "rh", "lp", "ls", "kp", "ks", "tb")
    return specialised(
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
    return specialised(
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


_NATIVE = Needs(nvfp4_matrix=True, tma_loads=True, store_width=16)


def _multiplies(arch: Architecture) -> bool:
    return arch.multiplies_nvfp4


PRODUCTS = (
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
    Case(
        "mla_decode",
        _mla_decode,
        lambda arch: Needs(matrix=True, load_width=16, store_width=16),
    ),
    Case("mla_decode (join)", _mla_join, lambda arch: Needs(load_width=16, store_width=8)),
)
