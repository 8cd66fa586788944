"""Which implementations of the operations are there: our own, other people's, a user's."""

import os
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from typing import Any

from nvfp4check.adapters import implementations as adapted
from nvfp4check.adapters.implementation import Implementation
from nvfp4check.findings import CheckError
from nvfp4check.kernels.registry import LAUNCHERS
from nvfp4check.ops import OPERATIONS, operation, resolve

#: The group of entry points by which a package makes its kernels known.
ENTRY_POINT_GROUP = "nvfp4check.kernels"


def found(device: str = "cpu") -> list[Implementation]:
    """Return every implementation that is known, available or not, for kernels on a device."""
    return [*_reference(), *_own(device), *adapted(), *_published()]


def _reference() -> list[Implementation]:
    return [
        Implementation(name="reference", operation=name, path=known.reference_path)
        for name, known in OPERATIONS.items()
    ]


def _own(device: str) -> list[Implementation]:
    missing = None if sys.platform == "linux" else "triton runs on Linux"
    if missing is None and device != "cpu":
        from nvfp4check.kernels.arch import missing as missing_on

        missing = missing_on(device)
    return [
        Implementation(
            name="triton",
            operation=name,
            path=path,
            convention="engine" if OPERATIONS[name].has_convention else None,
            device=device,
            unavailable=missing,
        )
        for name, path in LAUNCHERS.items()
    ]


def _published() -> list[Implementation]:
    published = []
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        name, _, named_operation = entry.name.rpartition(".")
        if named_operation not in OPERATIONS or not name:
            reason = f"entry point {entry.name!r} is not NAME.OPERATION, as mylib.quantize"
            published.append(
                Implementation(name=entry.name, operation="?", path=entry.value, unavailable=reason)
            )
            continue
        published.append(Implementation(name=name, operation=named_operation, path=entry.value))
    return published


def chosen(
    impl: str | None, op: str | None, convention: str | None, device: str
) -> list[Implementation]:
    """Return the implementations that a user asked for, by name, by path, or all available.

    Raises:
        CheckError: None is called so, the one named is not available, or the device is not there.
    """
    from nvfp4check.forward.setup import device_of

    device_of(device)
    if op is not None:
        operation(op)
    if impl is not None and ":" in impl:
        return [_given(impl, op, convention)]
    known = [one for one in found(device) if op in (None, one.operation)]
    named = [one for one in known if impl in (None, one.name)]
    if not named:
        names = sorted({one.name for one in known})
        raise CheckError(
            f"no implementation {impl!r}{f' of {op}' if op else ''}: choose one of "
            f"{', '.join(names)}, or give MODULE:FUNCTION"
        )
    missing = [one for one in named if one.unavailable]
    if impl is not None and missing:
        raise CheckError(f"{impl} is not available: {missing[0].unavailable}")
    usable = [one for one in named if not one.unavailable]
    if impl is None:
        usable = [one for one in usable if one.name != "reference" and _fits(one, device)]
    return [with_convention(one, convention) for one in usable]


def _fits(one: Implementation, device: str) -> bool:
    return one.device.partition(":")[0] == device.partition(":")[0]


def _given(path: str, op: str | None, convention: str | None) -> Implementation:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    kernel = resolve(path)
    if not callable(kernel):
        raise CheckError(f"{path} is {type(kernel).__name__}, expected a function")
    named = op or getattr(kernel, "operation", None) or path.rpartition(":")[2].rpartition(".")[2]
    if named not in OPERATIONS:
        raise CheckError(
            f"which operation is {path}? Give --op, one of {', '.join(OPERATIONS)}, "
            f"or name the function so"
        )
    one = Implementation(name=path, operation=named, path=path)
    return with_convention(one, convention or getattr(kernel, "convention", None))


def with_convention(one: Implementation, convention: str | None) -> Implementation:
    """Return the implementation under a convention that was asked for; check that there is one.

    Raises:
        CheckError: The operation depends on a convention, and neither the user nor the kernel
            names one.
    """
    if not OPERATIONS[one.operation].has_convention:
        return replace(one, convention=None)
    named: Any = convention or one.convention
    if named is None and one.path and one.name not in ("reference", "triton"):
        named = getattr(one.kernel(), "convention", None)
    if named is None:
        choices = ", ".join(sorted(str(choice) for choice in _conventions()))
        raise CheckError(f"{one.name} {one.operation}: name its --convention, one of {choices}")
    if named not in {str(choice) for choice in _conventions()}:
        choices = ", ".join(sorted(str(choice) for choice in _conventions()))
        raise CheckError(f"unknown convention {named!r}: choose one of {choices}")
    return replace(one, convention=str(named))


def bound(one: Implementation) -> tuple[Any, Any]:
    """Return a kernel, with its convention bound if it takes one, and the facts it declares."""
    from nvfp4check.tolerance import Facts

    kernel = one.kernel()
    facts = Facts(**one.facts) if one.facts else Facts.declared_by(kernel)
    if one.name in ("reference", "triton") and OPERATIONS[one.operation].has_convention:
        kernel = partial(kernel, convention=one.convention)
    return kernel, facts


def _conventions() -> Any:
    return resolve("nvfp4ref.conventions:Convention")
