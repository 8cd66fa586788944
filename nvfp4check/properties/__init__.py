"""The laws that every implementation of an operation keeps, one file an operation."""

import importlib
from typing import TYPE_CHECKING

from nvfp4check.ops import OPERATIONS, operation

if TYPE_CHECKING:
    from nvfp4check.properties.law import Property

__all__ = ["OPERATIONS", "properties_of"]


def properties_of(name: str) -> "tuple[Property, ...]":
    """Return the properties of an operation, in the order they are tried.

    Raises:
        CheckError: There is no such operation.
    """
    module = importlib.import_module(f"nvfp4check.properties.{operation(name).name}")
    found: tuple[Property, ...] = module.PROPERTIES
    return found
