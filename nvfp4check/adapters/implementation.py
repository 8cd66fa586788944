"""An implementation of an operation that was found, or why it is not available."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nvfp4check.ops import Kernel, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """A kernel by name, imported when it is asked for and not before."""

    name: str
    operation: str
    #: `module:function` of the kernel.
    path: str
    convention: str | None = None
    #: Kind of device the kernel runs on: cpu or cuda.
    device: str = "cpu"
    #: Facts that it declares about its arithmetic.
    facts: dict[str, Any] = field(default_factory=dict)
    #: Why it cannot be used here; None where it can.
    unavailable: str | None = None

    def kernel(self) -> Kernel:
        """Return the kernel.

        Raises:
            CheckError: Its module or function cannot be imported.
        """
        found: Kernel = resolve(self.path)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Somebody else's package and the operations that an adapter of ours takes from it."""

    name: str
    #: The module whose presence says that it is installed.
    module: str
    #: How to install it.
    install: str
    operations: dict[str, str]
    convention: str | None
    device: str
    #: Least compute capability of the GPU that its kernels need.
    capability: tuple[int, int] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def implementations(self) -> list[Implementation]:
        """Return one implementation for each operation."""
        reason = self.unavailable()
        return [
            Implementation(
                name=self.name,
                operation=operation,
                path=path,
                convention=self.convention,
                device=self.device,
                facts=self.facts,
                unavailable=reason,
            )
            for operation, path in self.operations.items()
        ]

    def unavailable(self) -> str | None:
        """Return why the library cannot be used here, or None."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed: {self.install}"
        return _missing_gpu(self.capability) if self.capability else None


def _missing_gpu(least: tuple[int, int]) -> str | None:
    import torch

    if not torch.cuda.is_available():
        return f"needs a GPU of compute capability {least[0]}.{least[1]}, torch finds none"
    found = torch.cuda.get_device_capability()
    if found < least:
        return (
            f"needs a GPU of compute capability {least[0]}.{least[1]}, "
            f"this one has {found[0]}.{found[1]}"
        )
    return None


#: Something that answers with implementations, for whoever gathers them.
Source = Callable[[], list[Implementation]]
