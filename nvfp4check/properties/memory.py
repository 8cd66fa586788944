"""Output memory that tells: guard bytes round every tensor that a kernel's launcher allocates.

Contract:
    within the mode torch.empty, zeros, ones, full, their `_like` and `new_` forms and rand return
    views of a larger buffer, filled with a canary before and after
    torch.empty and its forms are filled with poison, so that what a kernel leaves unwritten shows
    `violations` says which guard was written to, and where

Only allocations through torch's Python functions are seen; a kernel that allocates in C++ escapes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

#: Elements of guard on either side; more than a tile of any kernel is wide.
GUARD_BYTES = 4096

CANARY = 0xC7
POISON = 0xA5

_UNWRITTEN = (
    torch.empty,
    torch.empty_like,
    torch.Tensor.new_empty,
)
_WRITTEN = (
    torch.zeros,
    torch.zeros_like,
    torch.ones,
    torch.ones_like,
    torch.full,
    torch.full_like,
    torch.Tensor.new_zeros,
    torch.Tensor.new_ones,
    torch.Tensor.new_full,
)


class GuardedAllocations(TorchFunctionMode):
    """Surround every tensor that is allocated within with canaries."""

    def __init__(self) -> None:
        super().__init__()
        self._guarded: list[tuple[str, torch.Tensor, int]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, and move what it allocated between guards."""
        made = func(*args, **(kwargs or {}))
        if func not in _UNWRITTEN and func not in _WRITTEN:
            return made
        with torch._C.DisableTorchFunction():
            return self._guard(made, poison=func in _UNWRITTEN)

    def _guard(self, made: torch.Tensor, poison: bool) -> torch.Tensor:
        if not made.is_contiguous() or made.is_meta or made.requires_grad:
            return made
        size = made.numel() * made.element_size()
        whole = torch.full((size + 2 * GUARD_BYTES,), CANARY, dtype=torch.uint8, device=made.device)
        inner = whole[GUARD_BYTES : GUARD_BYTES + size]
        if poison:
            inner.fill_(POISON)
        elif size:
            inner.copy_(made.view(-1).view(torch.uint8))
        self._guarded.append((f"{made.dtype} {tuple(made.shape)}", whole, size))
        return inner.view(made.dtype).view(made.shape)

    def violations(self) -> list[str]:
        """Return what was written outside the tensors allocated within."""
        found = []
        for name, whole, size in self._guarded:
            before = (whole[:GUARD_BYTES] != CANARY).nonzero()
            after = (whole[GUARD_BYTES + size :] != CANARY).nonzero()
            if len(before):
                place = GUARD_BYTES - int(before[-1])
                found.append(f"{name}: {len(before)} bytes written, up to {place} before its start")
            if len(after):
                found.append(
                    f"{name}: {len(after)} bytes written, the first {int(after[0])} after its end"
                )
        return found
