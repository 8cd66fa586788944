"""The catalogue of kernel faults: known ways to compute an operation wrongly.

Importing this loads no torch; asking for the catalogue does.
"""

import re
from functools import cache
from typing import TYPE_CHECKING

from nvfp4check.findings import CheckError

if TYPE_CHECKING:
    from nvfp4check.faults.base import ElsewhereFault, Form, KernelFault

__all__ = ["elsewhere", "fault", "faults_of", "kernel_faults"]


@cache
def kernel_faults() -> "tuple[KernelFault, ...]":
    """Return every fault that an operation can show, by its id: F1a, F1b, ... F17e."""
    from nvfp4check.faults import (
        attention,
        blocks,
        elements,
        global_scales,
        layouts,
        routing,
        scales,
        tails,
    )

    groups = (elements, scales, blocks, global_scales, layouts, tails, routing, attention)
    return tuple(sorted((one for group in groups for one in group.FAULTS), key=_order))


def elsewhere() -> "tuple[ElsewhereFault, ...]":
    """Return the faults of the catalogue that no single operation shows, and who shows them."""
    from nvfp4check.faults.other_levels import ELSEWHERE

    return ELSEWHERE


def fault(identifier: str) -> "KernelFault":
    """Return the fault of this id.

    Raises:
        CheckError: There is none, or no operation shows it.
    """
    for known in kernel_faults():
        if known.id == identifier:
            return known
    for other in elsewhere():
        if other.id == identifier:
            raise CheckError(f"{identifier} ({other.does}) is caught by {other.caught_by}")
    raise CheckError(f"unknown fault {identifier!r}: F1a to F17e, see `nvfp4check kernels power`")


def faults_of(operation: str) -> "list[tuple[KernelFault, Form]]":
    """Return every form of every fault in one operation."""
    return [(one, form) for one in kernel_faults() for form in one.forms_of(operation)]


def _order(one: "KernelFault") -> tuple[int, str]:
    found = re.fullmatch(r"F(\d+)([a-z])", one.id)
    return (int(found[1]), found[2]) if found else (0, one.id)
