"""The GPU architectures the kernels know, and the one place where one is chosen.

Shared memory is what one block may ask for, tensor memory what one SM has: CUDA C++ Programming
Guide, table "Technical Specifications per Compute Capability"; PTX ISA, section on tcgen05 (512
columns of 128 lanes of 32 bit). Conversions and block-scaled MMA: PTX ISA, `cvt` (.e2m1x2 from
sm_100a and sm_120a on) and `mma`/`tcgen05.mma` with `.kind::mxf4nvf4`.
"""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What the kernels ask of a GPU."""

    name: str
    #: Compute capability as Triton writes it: 100 for 10.0. Zero: interpreted on a CPU.
    capability: int
    #: `cvt.rn.satfinite.e2m1x2.f32` and back.
    converts_e2m1: bool
    #: Multiplies E2M1 with E4M3 scales of 16 in its tensor cores.
    multiplies_nvfp4: bool
    #: Has tensor memory and copies tiles by descriptor (TMA) into a Triton pipeline.
    tensor_memory_columns: int
    #: Most shared memory of one block, in bytes.
    shared_memory: int


SM90 = Architecture(
    name="sm90",
    capability=90,
    converts_e2m1=False,
    multiplies_nvfp4=False,
    tensor_memory_columns=0,
    shared_memory=232448,
)
SM100 = Architecture(
    name="sm100",
    capability=100,
    converts_e2m1=True,
    multiplies_nvfp4=True,
    tensor_memory_columns=512,
    shared_memory=232448,
)
SM103 = Architecture(
    name="sm103",
    capability=103,
    converts_e2m1=True,
    multiplies_nvfp4=True,
    tensor_memory_columns=512,
    shared_memory=232448,
)
SM120 = Architecture(
    name="sm120",
    capability=120,
    converts_e2m1=True,
    multiplies_nvfp4=True,
    tensor_memory_columns=0,
    shared_memory=101376,
)
#: Triton's interpreter, repaired: it has `dot_scaled` and no PTX.
INTERPRETER = Architecture(
    name="interpreter",
    capability=0,
    converts_e2m1=False,
    multiplies_nvfp4=True,
    tensor_memory_columns=0,
    shared_memory=0,
)

ARCHITECTURES = {arch.name: arch for arch in (SM90, SM100, SM103, SM120)}


def architecture_of(tensor: torch.Tensor) -> Architecture:
    """Return the architecture of the device a tensor lies on.

    Raises:
        ValueError: The device is neither a CPU nor a CUDA GPU of compute capability 9.0 or more.
    """
    if tensor.device.type == "cpu":
        return INTERPRETER
    if tensor.device.type != "cuda":
        raise ValueError(f"the kernels run on a CUDA GPU or a CPU, found {tensor.device}")
    return _architecture_of_gpu(tensor.device.index or 0)


def missing(device: str) -> str | None:
    """Return why the kernels do not run on a device, or None where they do."""
    try:
        place = torch.device(device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    if place.type == "cpu":
        return None
    if place.type != "cuda":
        return f"the kernels run on a CUDA GPU or a CPU, not on {place.type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    try:
        _architecture_of_gpu(place.index or 0)
    except (ValueError, RuntimeError) as error:  # an unknown chip, or no GPU of that index
        return str(error).splitlines()[0]
    return None


@cache
def _architecture_of_gpu(index: int) -> Architecture:
    major, minor = torch.cuda.get_device_capability(index)
    return architecture_of_capability(major * 10 + minor)


def architecture_of_capability(capability: int) -> Architecture:
    """Return the newest known architecture of the same family that is not above a capability.

    Raises:
        ValueError: There is none.
    """
    family = capability // 10
    known = [
        arch
        for arch in ARCHITECTURES.values()
        if arch.capability // 10 == family and arch.capability <= capability
    ]
    if not known:
        raise ValueError(
            f"compute capability {capability / 10}: the kernels know {', '.join(ARCHITECTURES)}"
        )
    return max(known, key=lambda arch: arch.capability)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of SMs of a device; 4 for the interpreter, to walk a grid of several."""
    if device.type == "cpu":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
