"""F4b, F4g, F7 and F13: the global scale, alpha, and the scale of activations.

Contract:
    planted around a kernel: it is given another number for its global scale, alpha or scale_inv
    F7d alone replaces a product: its float32 accumulator is rounded to float16 before alpha
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nvfp4check.faults.base import Form, KernelFault
from nvfp4check.faults.lifting import Tensor, by_group
from nvfp4check.ops import Kernel
from nvfp4ref import matmul as reference
from nvfp4ref.formats import E2M1
from nvfp4ref.rounding import round_to

#: Position of the global scale, alpha or scale_inv among the arguments of each operation.
_PLACES = {
    "dequantize": 2,
    "matmul": 4,
    "grouped_matmul": 4,
    "quantize": 1,
    "silu_mul_quantize": 2,
    "rms_norm_quantize": 3,
    "dequantize_fp8_block": 1,
}

_QUANTISERS = ("quantize", "silu_mul_quantize", "rms_norm_quantize")
_READERS = ("dequantize", "matmul", "grouped_matmul")


def _with_number(
    change: Callable[[Tensor], Tensor], place: int, kernel: Kernel, *arguments: Any
) -> Any:
    taken = list(arguments)
    taken[place] = change(taken[place])
    return kernel(*taken)


def _in(
    operations: tuple[str, ...], change: Callable[[Tensor], Tensor], label: str = ""
) -> tuple[Form, ...]:
    return tuple(
        Form(
            operation=operation,
            wrong=partial(_with_number, change, _PLACES[operation]),
            label=label,
            around=True,
        )
        for operation in operations
    )


def _bfloat16_bits(number: Tensor) -> Tensor:
    """Return the float32 whose low half is the number as bfloat16, and whose high half is 0."""
    low = number.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    return low.view(torch.float32)


def _float16_sums(
    a_codes: Tensor,
    a_scales: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    alpha: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    a = reference.operand(a_codes, a_scales)
    b = reference.operand(b_codes, b_scales)
    half = round_to(a @ b.T, torch.float16).double()
    return round_to(half * alpha.double(), dtype)


def _another_expert(alpha: Tensor) -> Tensor:
    return alpha.roll(1)


_ANY = (*_READERS, *_QUANTISERS, "dequantize_fp8_block")

FAULTS = (
    KernelFault(
        id="F4b",
        name="global scale too small",
        does="blocks quantised under a global scale 1.2 times too small: the largest clip",
        needs="a block near the maximum of its tensor",
        threads=(),
        forms=_in(_QUANTISERS, lambda g: g / 1.2),
    ),
    KernelFault(
        id="F4g",
        name="global scale of amax / 448",
        does="blocks quantised under a global scale six times too large",
        needs="any values",
        threads=("pytorch/ao/pull/2604",),
        forms=_in(_QUANTISERS, lambda g: g * E2M1.max),
    ),
    KernelFault(
        id="F7a",
        name="global scale inverted",
        does="a multiplier taken for a divisor: 1 / g",
        needs="a global scale other than 1",
        threads=(
            "modular/modular/issues/6600",
            "vllm-project/vllm/pull/55643",
            "vllm-project/vllm/pull/35733",
        ),
        forms=_in(_ANY, torch.reciprocal),
    ),
    KernelFault(
        id="F7b",
        name="global scale dropped",
        does="g or alpha taken as 1",
        needs="a global scale other than 1",
        threads=(
            "ggml-org/llama.cpp/pull/23629",
            "flashinfer-ai/flashinfer/pull/5173",
            "pytorch/pytorch/issues/190449",
        ),
        forms=_in(_ANY, torch.ones_like),
    ),
    KernelFault(
        id="F7c",
        name="global scale applied twice",
        does="g**2 in place of g",
        needs="a global scale other than 1",
        threads=("charlie12345/ROCmFPX/issues/85", "charlie12345/ROCmFPX/pull/87"),
        forms=_in(_ANY, torch.square),
    ),
    KernelFault(
        id="F7d",
        name="sums in float16",
        does="the accumulator rounded to float16 before alpha",
        needs="sums beyond 65504, or more than 11 bits wide",
        threads=(
            "vllm-project/vllm/issues/33560",
            "vllm-project/vllm/issues/33461",
            "ggml-org/llama.cpp/pull/20845",
        ),
        forms=(
            Form(operation="matmul", wrong=_float16_sums),
            Form(operation="grouped_matmul", wrong=partial(by_group, _float16_sums)),
        ),
    ),
    KernelFault(
        id="F7e",
        name="bfloat16 scalar read as float32",
        does="the bits of a bfloat16 in the low half of a float32",
        needs="any global scale",
        threads=("flashinfer-ai/flashinfer/pull/3497", "flashinfer-ai/flashinfer/issues/3398"),
        forms=_in((*_READERS, *_QUANTISERS), _bfloat16_bits),
    ),
    KernelFault(
        id="F13d",
        name="alpha of another expert",
        does="rows of expert e times the alpha of expert e - 1",
        needs="experts whose alphas differ",
        threads=("flashinfer-ai/flashinfer/pull/5173", "NVIDIA-NeMo/RL/pull/2983"),
        forms=_in(("grouped_matmul",), _another_expert),
    ),
    KernelFault(
        id="F13e",
        name="activation scale far off",
        does="activations quantised under a global scale 4 times too small or 1000 times too large",
        needs="any values",
        threads=("kekzl/imp/issues/1544", "NVIDIA/Model-Optimizer/pull/2028"),
        forms=(
            *_in(_QUANTISERS, lambda g: g / 4, "4 times too small"),
            *_in(_QUANTISERS, lambda g: g * 1000, "1000 times too large"),
        ),
    ),
)
