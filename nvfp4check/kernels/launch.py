"""Launch a kernel where its tensors are, and the checks every launcher makes."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from nvfp4check.kernels import interpreter
from nvfp4check.kernels.arch import INTERPRETER, architecture_of
from nvfp4ref.formats import BLOCK_SIZE

Launcher = TypeVar("Launcher", bound=Callable[..., object])

#: What activations and weights come in before they are quantised.
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def declares(**facts: object) -> Callable[[Launcher], Launcher]:
    """Give a launcher the facts about its arithmetic that a check of it reads as attributes."""

    def mark(launcher: Launcher) -> Launcher:
        for name, value in facts.items():
            setattr(launcher, name, value)
        return launcher

    return mark


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, on: torch.Tensor, **kwargs: Any) -> None:
    """Run a kernel on the device of the tensor `on`: interpreted if that is a CPU.

    A grid with no programs runs nothing. Compiled without contraction to fused multiply-adds, so
    that each operation rounds where the kernel's contract says it does.
    """
    if any(extent == 0 for extent in grid):
        return
    if architecture_of(on) is INTERPRETER:
        interpreter.run(kernel, grid, *args, **kwargs)
        return
    with torch.cuda.device(on.device):
        kernel[grid](*args, enable_fp_fusion=False, **kwargs)


def check_dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """Raise ValueError unless a tensor has one of the dtypes."""
    if tensor.dtype not in allowed:
        choices = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name}: dtype {tensor.dtype}, expected {choices}")


def check_shape(name: str, tensor: torch.Tensor, *expected: int | None) -> None:
    """Raise ValueError unless a tensor has the shape; None stands for any extent."""
    fits = tensor.ndim == len(expected) and all(
        want in (None, have) for want, have in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if extent is None else str(extent) for extent in expected)
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected ({wanted})")


def check_blocks(name: str, columns: int) -> None:
    """Raise ValueError unless columns divide into whole blocks of 16."""
    if columns % BLOCK_SIZE:
        raise ValueError(f"{name}: {columns} columns, expected a multiple of {BLOCK_SIZE}")


def check_device(**tensors: torch.Tensor) -> None:
    """Raise ValueError unless all tensors lie on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"tensors must share one device, found {found}")


def check_scalar(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless a tensor is one float32."""
    check_dtype(name, tensor, torch.float32)
    if tensor.numel() != 1:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected one number")


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose last dimension is contiguous, copied only if it is not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def ceil_div(extent: int, tile: int) -> int:
    """Return how many tiles cover an extent."""
    return -(-extent // tile)


def power_of_two(extent: int, *, least: int = 1, most: int) -> int:
    """Return the smallest power of two that covers an extent, kept between two limits."""
    return max(least, min(most, 1 << max(extent - 1, 0).bit_length()))
