"""What each operation must move and multiply, and the least time a chip needs for it.

Contract:
    bytes       every input read once and every output written once, at the sizes they are stored
    operations  two for each multiplication and addition of a matrix product; the arithmetic of the
                element-wise kernels is not counted, memory bounds it
    limit       the larger of bytes / bandwidth and operations / dense matrix rate, from the data
                sheets. No kernel is faster while its data comes from memory; caches may beat it

The rates are those that NVIDIA prints, which are with sparsity but for the bandwidth, and halved:
    H100 SXM, H200 SXM   BF16 1,979 TFLOPS; 3.35 and 4.8 TB/s (their Tensor Core GPU data sheets)
    B200                 FP4 18 PFLOPS, BF16 4.5; 7.7 TB/s (Blackwell data sheet, the table
                         "Individual Blackwell GPU Specifications", column HGX B200)
    GB200                FP4 20 PFLOPS, BF16 5; 8 TB/s (the same, column GB200 NVL72)
    RTX PRO 6000         4000 AI TOPS in FP4; 1792 GB/s (RTX PRO 6000 Blackwell data sheet, which
                         prints no rate of BF16: a quarter of FP4, as on GB202, is derived)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class MatrixKind(StrEnum):
    """What the tensor cores multiply."""

    NONE = "none"
    NVFP4 = "nvfp4"
    SIXTEEN_BIT = "16 bit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """A GPU's published rates, of one GPU, without sparsity."""

    name: str
    #: Bytes a second.
    bandwidth: float
    #: Operations a second on bfloat16 or float16 with float32 accumulation.
    sixteen_bit: float
    #: Operations a second on NVFP4; zero where there are none: decoded to 16 bit then.
    nvfp4: float
    source: str

    def matrix_rate(self, kind: MatrixKind) -> float:
        """Return the rate of matrix products of a kind, decoded to 16 bit where not native."""
        if kind is MatrixKind.NVFP4 and self.nvfp4:
            return self.nvfp4
        return self.sixteen_bit


_HOPPER = "NVIDIA H100 Tensor Core GPU data sheet (SXM; half of the figure with sparsity)"
_BLACKWELL = "NVIDIA Blackwell data sheet, individual GPU (half of the figure with sparsity)"

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(name="H100", bandwidth=3.35e12, sixteen_bit=989.5e12, nvfp4=0.0, source=_HOPPER),
        Chip(
            name="H200",
            bandwidth=4.8e12,
            sixteen_bit=989.5e12,
            nvfp4=0.0,
            source="NVIDIA H200 Tensor Core GPU data sheet (SXM; half of the figure with sparsity)",
        ),
        Chip(
            name="B200",
            bandwidth=7.7e12,
            sixteen_bit=2.25e15,
            nvfp4=9e15,
            source=f"{_BLACKWELL}, HGX B200",
        ),
        Chip(
            name="GB200",
            bandwidth=8e12,
            sixteen_bit=2.5e15,
            nvfp4=10e15,
            source=f"{_BLACKWELL}, GB200 NVL72",
        ),
        Chip(
            name="RTX-PRO-6000",
            bandwidth=1.792e12,
            sixteen_bit=0.5e15,
            nvfp4=2e15,
            source="NVIDIA RTX PRO 6000 Blackwell data sheet: 1792 GB/s, 4000 AI TOPS (FP4 with "
            "sparsity; half of it dense, a quarter of that in 16 bit)",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes to move and operations to do."""

    bytes: int
    operations: int = 0
    matrix: MatrixKind = MatrixKind.NONE


@dataclass(frozen=True, slots=True)
class Limit:
    """The least time for a cost on a chip, and what sets it."""

    seconds: float
    bound: str


def limit(cost: Cost, bandwidth: float, matrix_rate: float) -> Limit:
    """Return the least time at a bandwidth and a matrix rate."""
    memory = cost.bytes / bandwidth
    matrix = cost.operations / matrix_rate if cost.operations else 0.0
    return Limit(memory, "memory") if memory >= matrix else Limit(matrix, "tensor cores")


def chip_limit(cost: Cost, chip: Chip) -> Limit:
    """Return the least time by a chip's data sheet."""
    return limit(cost, chip.bandwidth, chip.matrix_rate(cost.matrix))


#: Bytes of bfloat16, and of a float32.
_BF16, _F32 = 2, 4


def _packed(rows: int, columns: int) -> int:
    """Return the bytes of NVFP4 codes and block scales."""
    return rows * columns // 2 + rows * columns // 16


def _padded_scales(rows: int, columns: int) -> int:
    return -(-rows // 128) * 128 * -(-columns // 4) * 4


def quantize(M: int, K: int) -> Cost:
    """bfloat16 to codes and scales."""
    return Cost(M * K * _BF16 + _packed(M, K))


def dequantize(M: int, K: int) -> Cost:
    """Codes and scales to bfloat16."""
    return Cost(M * K * _BF16 + _packed(M, K))


def swizzle(M: int, C: int) -> Cost:
    """Row-major scales to padded tiles, or back."""
    return Cost(M * C + _padded_scales(M, C))


def matmul(M: int, N: int, K: int) -> Cost:
    """Two NVFP4 operands to bfloat16."""
    return Cost(_packed(M, K) + _packed(N, K) + M * N * _BF16, 2 * M * N * K, MatrixKind.NVFP4)


def grouped_matmul(M: int, N: int, K: int, E: int) -> Cost:
    """M rows over E experts that each have a row at least."""
    return Cost(_packed(M, K) + E * _packed(N, K) + M * N * _BF16, 2 * M * N * K, MatrixKind.NVFP4)


def silu_mul_quantize(M: int, K: int) -> Cost:
    """Two bfloat16 matrices to codes and scales."""
    return Cost(2 * M * K * _BF16 + _packed(M, K))


def rms_norm_quantize(M: int, K: int) -> Cost:
    """Input and residual in bfloat16 to codes, scales and the new residual."""
    return Cost(3 * M * K * _BF16 + K * _BF16 + _packed(M, K))


def rope(T: int, H: int, R: int) -> Cost:
    """bfloat16 in and out, and the table of cosines and sines."""
    return Cost(2 * T * H * R * _BF16 + T * R * _F32)


def route(T: int, E: int, k: int) -> Cost:
    """Logits to experts and weights."""
    return Cost(T * E * _F32 + E * _F32 + 2 * T * k * _F32)


def mla_decode(B: int, H: int, S: int, L: int, R: int) -> Cost:
    """One query a sequence of S tokens: the cache once, queries and outputs."""
    memory = B * S * (L + R) * _BF16 + B * H * (2 * L + R) * _BF16
    return Cost(memory, 2 * B * H * S * (2 * L + R), MatrixKind.SIXTEEN_BIT)


def dequantize_fp8_block(N: int, K: int) -> Cost:
    """E4M3 to bfloat16."""
    return Cost(N * K * (1 + _BF16) + -(-N // 128) * -(-K // 128) * _F32)


@dataclass(frozen=True, slots=True)
class Workload:
    """An operation at a size that DeepSeek-V3 has."""

    operation: str
    sizes: Mapping[str, int]
    cost: Cost

    @property
    def label(self) -> str:
        """The sizes in a few words."""
        return " ".join(f"{name}={size}" for name, size in self.sizes.items())


_COSTS: dict[str, Callable[..., Cost]] = {
    "quantize": quantize,
    "dequantize": dequantize,
    "swizzle": swizzle,
    "unswizzle": swizzle,
    "matmul": matmul,
    "grouped_matmul": grouped_matmul,
    "silu_mul_quantize": silu_mul_quantize,
    "rms_norm_quantize": rms_norm_quantize,
    "rope": rope,
    "route": route,
    "mla_decode": mla_decode,
    "dequantize_fp8_block": dequantize_fp8_block,
}


def _workload(operation: str, **sizes: int) -> Workload:
    return Workload(operation, sizes, _COSTS[operation](**sizes))


#: Prefill of 16384 tokens (128 MB and more in bfloat16) and decode of 32; hidden size 7168, dense
#: width 18432, expert width 2048, 128 heads.
WORKLOADS = (
    _workload("quantize", M=16384, K=7168),
    _workload("dequantize", M=18432, K=7168),
    _workload("swizzle", M=262144, C=448),
    _workload("unswizzle", M=262144, C=448),
    _workload("matmul", M=16384, N=18432, K=7168),
    _workload("matmul", M=32, N=18432, K=7168),
    _workload("grouped_matmul", M=32768, N=2048, K=7168, E=32),
    _workload("grouped_matmul", M=256, N=2048, K=7168, E=32),
    _workload("silu_mul_quantize", M=16384, K=18432),
    _workload("rms_norm_quantize", M=16384, K=7168),
    _workload("rope", T=16384, H=128, R=64),
    _workload("route", T=65536, E=256, k=8),
    _workload("mla_decode", B=64, H=128, S=4096, L=512, R=64),
    _workload("dequantize_fp8_block", N=18432, K=7168),
)
