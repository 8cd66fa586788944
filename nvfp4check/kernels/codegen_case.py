"""A kernel of the project as its launcher specialises it, and what it must be made of.

Sizes are those of DeepSeek-V3: rows of 7168 elements, pointers and strides that are multiples of
16, bfloat16 in and out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nvfp4check.kernels.arch import Architecture
from nvfp4check.kernels.codegen import KernelSource
from nvfp4check.kernels.codegen_checks import Needs

ROWS, COLUMNS, EXPERTS = 4096, 7168, 256


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel's specialisation and needs, by architecture; None where it is not launched."""

    name: str
    source: Callable[[Architecture], KernelSource]
    needs: Callable[[Architecture], Needs]
    runs_on: Callable[[Architecture], bool] = lambda arch: True


def specialised(
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
