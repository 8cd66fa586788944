"""Time kernels on the GPU at hand, against what that GPU was measured to do.

Contract:
    time      median of many runs between CUDA events, the L2 cache cleared before each
              (`triton.testing.do_bench`)
    copy      bytes read and written a second by a copy of 1 GiB with torch, timed alike
    matrix    operations a second of a bfloat16 product of 8192 x 8192 x 8192 with torch
    share     of an operation's limit under those two measured rates, in its measured time; NVFP4
              products may pass 100 %, for the measured rate is that of bfloat16
Inputs are made on the GPU: random codes and scales, gaussian activations, one seed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nvfp4check.findings import CheckError
from nvfp4check.kernels.cost import WORKLOADS, Workload, limit
from nvfp4check.ops import Kernel, operation
from nvfp4ref.formats import BLOCK_SIZE

_COPY_BYTES = 1 << 30
_MATRIX_SIZE = 8192


@dataclass(frozen=True, slots=True)
class MeasuredRates:
    """What the GPU was measured to do."""

    gpu: str
    copy_bandwidth: float
    matrix_rate: float


@dataclass(frozen=True, slots=True)
class Timing:
    """One kernel on one workload."""

    operation: str
    sizes: str
    implementation: str
    seconds: float
    #: Least time under the measured rates, over the measured time.
    share: float
    bound: str
    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """A kernel that did not take a workload, and what it said."""

    operation: str
    sizes: str
    implementation: str
    why: str


def require_gpu() -> torch.device:
    """Return the current CUDA device.

    Raises:
        CheckError: There is none.
    """
    if not torch.cuda.is_available():
        raise CheckError(
            "bench needs a CUDA GPU and torch finds none: `--predict` prints the limits of the "
            "known chips, `nvfp4check kernels codegen` checks what the compiler makes for them"
        )
    return torch.device("cuda", torch.cuda.current_device())


def measure_rates(device: torch.device) -> MeasuredRates:
    """Measure copy bandwidth and matrix rate."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = seconds(lambda: target.copy_(source))
    a = torch.randn(_MATRIX_SIZE, _MATRIX_SIZE, device=device).bfloat16()
    matrix_seconds = seconds(lambda: a @ a)
    return MeasuredRates(
        torch.cuda.get_device_name(device),
        2 * _COPY_BYTES / copy_seconds,
        2 * _MATRIX_SIZE**3 / matrix_seconds,
    )


def seconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call on the GPU."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median")) / 1e3


def workloads(op: str | None) -> list[Workload]:
    """Return the workloads of an operation, or all.

    Raises:
        CheckError: There is no such operation.
    """
    if op is None:
        return list(WORKLOADS)
    name = operation(op).name
    return [workload for workload in WORKLOADS if workload.operation == name]


def time_kernel(
    workload: Workload, name: str, kernel: Kernel, inputs: list[Any], rates: MeasuredRates
) -> Timing:
    """Time a kernel on inputs that `make_inputs` made for a workload."""
    taken = seconds(lambda: kernel(*inputs))
    least = limit(workload.cost, rates.copy_bandwidth, rates.matrix_rate)
    return Timing(
        operation=workload.operation,
        sizes=workload.label,
        implementation=name,
        seconds=taken,
        share=least.seconds / taken,
        bound=least.bound,
        bytes_per_second=workload.cost.bytes / taken,
        operations_per_second=workload.cost.operations / taken,
    )


def make_inputs(workload: Workload, device: torch.device) -> list[Any]:
    """Return the arguments of an operation at a workload's sizes, by position."""
    generator = torch.Generator(device).manual_seed(0)
    return _MAKERS[workload.operation](_Maker(device, generator), workload.sizes)


@dataclass(frozen=True, slots=True)
class _Maker:
    device: torch.device
    generator: torch.Generator

    def gaussian(self, *shape: int) -> torch.Tensor:
        made = torch.randn(*shape, generator=self.generator, device=self.device)
        return made.bfloat16()

    def codes(self, *shape: int) -> torch.Tensor:
        return torch.randint(
            0, 256, shape, generator=self.generator, device=self.device, dtype=torch.uint8
        )

    def scales(self, *shape: int) -> torch.Tensor:
        """Scales from 2**-2 to below 2**2."""
        raw = torch.randint(
            0x28, 0x48, shape, generator=self.generator, device=self.device, dtype=torch.uint8
        )
        return raw.view(torch.float8_e4m3fn)

    def operand(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        *rows, columns = shape
        return self.codes(*rows, columns // 2), self.scales(*rows, columns // BLOCK_SIZE)

    def scalar(self, value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self.device)


_Sizes = Mapping[str, int]


def _matmul(make: _Maker, s: _Sizes) -> list[Any]:
    a, b = make.operand(s["M"], s["K"]), make.operand(s["N"], s["K"])
    return [*a, *b, make.scalar(1e-3), torch.bfloat16]


def _grouped(make: _Maker, s: _Sizes) -> list[Any]:
    a, b = make.operand(s["M"], s["K"]), make.operand(s["E"], s["N"], s["K"])
    alpha = torch.full((s["E"],), 1e-3, device=make.device)
    offsets = torch.linspace(0, s["M"], s["E"] + 1, device=make.device).round().to(torch.int32)
    return [*a, *b, alpha, offsets, torch.bfloat16]


def _rms_norm(make: _Maker, s: _Sizes) -> list[Any]:
    x, residual = make.gaussian(s["M"], s["K"]), make.gaussian(s["M"], s["K"])
    return [x, make.gaussian(s["K"]), 1e-6, make.scalar(2e-3), residual]


def _rope(make: _Maker, s: _Sizes) -> list[Any]:
    config = {"qk_rope_head_dim": s["R"], "rope_theta": 10000.0, "rope_scaling": None}
    positions = torch.arange(s["T"], device=make.device)
    return [make.gaussian(s["T"], s["H"], s["R"]), positions, config]


def _route(make: _Maker, s: _Sizes) -> list[Any]:
    logits = make.gaussian(s["T"], s["E"]).float()
    return [logits, make.gaussian(s["E"]).float() / 10, 8, 4, s["k"], 2.5]


def _mla_decode(make: _Maker, s: _Sizes) -> list[Any]:
    page = 64
    pages = s["S"] // page
    table = torch.randperm(s["B"] * pages, generator=make.generator, device=make.device)
    return [
        make.gaussian(s["B"], s["H"], s["L"]),
        make.gaussian(s["B"], s["H"], s["R"]),
        make.gaussian(s["B"] * pages, page, s["L"]),
        make.gaussian(s["B"] * pages, page, s["R"]),
        table.view(s["B"], pages).to(torch.int32),
        torch.full((s["B"],), s["S"], dtype=torch.int32, device=make.device),
        0.1352337788608801,
    ]


def _fp8_block(make: _Maker, s: _Sizes) -> list[Any]:
    tiles = (-(-s["N"] // 128), -(-s["K"] // 128))
    scale_inv = torch.full(tiles, 1e-3, device=make.device)
    return [make.scales(s["N"], s["K"]), scale_inv, torch.bfloat16]


_MAKERS: dict[str, Callable[[_Maker, _Sizes], list[Any]]] = {
    "quantize": lambda make, s: [make.gaussian(s["M"], s["K"]), make.scalar(2e-3)],
    "dequantize": lambda make, s: [
        *make.operand(s["M"], s["K"]),
        make.scalar(2e-3),
        torch.bfloat16,
    ],
    "swizzle": lambda make, s: [make.scales(s["M"], s["C"])],
    "unswizzle": lambda make, s: [make.scales(s["M"] * s["C"]), s["M"], s["C"]],
    "matmul": _matmul,
    "grouped_matmul": _grouped,
    "silu_mul_quantize": lambda make, s: [
        make.gaussian(s["M"], s["K"]),
        make.gaussian(s["M"], s["K"]),
        make.scalar(2e-3),
    ],
    "rms_norm_quantize": _rms_norm,
    "rope": _rope,
    "route": _route,
    "mla_decode": _mla_decode,
    "dequantize_fp8_block": _fp8_block,
}


def bench(
    op: str | None, kernels: Callable[[str], Iterator[tuple[str, Kernel]]], rates: MeasuredRates
) -> Iterator[Timing | Refusal]:
    """Yield a timing for each workload and each kernel that is known of its operation.

    Raises:
        CheckError: A kernel left the GPU unusable.
    """
    device = require_gpu()
    for workload in workloads(op):
        inputs = make_inputs(workload, device)
        for name, kernel in kernels(workload.operation):
            try:
                yield time_kernel(workload, name, kernel, inputs, rates)
            except Exception as error:  # not our code: any error is its answer
                said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                yield Refusal(workload.operation, workload.label, name, said)
                _still_usable(device, f"{name} {workload.operation} {workload.label}: {said}")


def _still_usable(device: torch.device, blamed: str) -> None:
    """Raise CheckError if a GPU gives an error again, as after an access outside memory."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise CheckError(f"{blamed}; the GPU is unusable for this process since") from error
