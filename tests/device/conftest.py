"""A device that is only pretended: tensors on it are elsewhere, and hold what a CPU computes.

Its tensors say that they lie on `meta`. As on a GPU, an operation that mixes them with tensors of
the CPU is refused, numpy cannot have them, and only what moves between devices takes both. So a
tensor that code made on the wrong device shows without a GPU, and results can be compared.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

PRETENDED = torch.device("meta")
CPU = torch.device("cpu")

_aten = torch.ops.aten

#: What takes tensors of two devices: a move, and an index, which CUDA fetches.
_MIXES = {
    _aten._to_copy.default,
    _aten.copy_.default,
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Elsewhere":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=PRETENDED,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *rest: Any) -> Any:
        raise RuntimeError(f"{func} outside the pretended device's context")

    def tolist(self) -> Any:
        return self.held.tolist()


class _Computes(TorchDispatchMode):
    """Computes what lies elsewhere on the CPU, and refuses to mix the two."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        elsewhere = any(isinstance(value, Elsewhere) for value in given)
        if elsewhere and func not in _MIXES:
            _refuse_mix(func, given)
        target = kwargs.get("device")
        if target is not None:
            elsewhere = torch.device(target) == PRETENDED
            kwargs["device"] = CPU
        owners = {id(value.held): value for value in given if isinstance(value, Elsewhere)}
        made = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if func is _aten.copy_.default:
            return args[0]
        return tree_map(lambda value: _placed(value, elsewhere, owners), made)


def _refuse_mix(func: Any, given: list[torch.Tensor]) -> None:
    numbers = torch.Tag.pointwise in func.tags or func is _aten.where.self
    for value in given:
        if not isinstance(value, Elsewhere) and not (numbers and value.ndim == 0):
            raise RuntimeError(f"{func}: not all tensors lie on one device: {tuple(value.shape)}")


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def _placed(value: Any, elsewhere: bool, owners: Mapping[int, Elsewhere]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) in owners:  # computed in place
        return owners[id(value)]
    return Elsewhere(value) if elsewhere else value


class _Makes(TorchFunctionMode):
    """Makes tensors of Python numbers, of which torch has none on `meta`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device) == PRETENDED:
            return Elsewhere(torch.tensor(*args, **{**kwargs, "device": CPU}))
        return func(*args, **kwargs)


@contextmanager
def pretended_device() -> Iterator[str]:
    with ExitStack() as stack:
        stack.enter_context(_Makes())
        stack.enter_context(_Computes())
        yield str(PRETENDED)


@pytest.fixture
def pretended() -> Callable[[], Any]:
    """Return what opens a context in which there is one device more, and gives its name."""
    return pretended_device
