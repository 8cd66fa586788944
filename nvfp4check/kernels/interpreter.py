"""Run a Triton kernel on CPU tensors, with the interpreter's arithmetic repaired.

Contract:
    dot_scaled       every operand and every scale decoded by its own format (an integer scale is
                     E8M0, a float8e4nv scale is E4M3); products summed in float64, rounded to
                     float32 once, then added to the accumulator
    float -> E4M3    to nearest even, saturating to 448 (infinities too), NaN to 0x7F with the sign
    E4M3 -> float    exact; 0x7F and 0xFF are NaN
    float32 -> BF16  to nearest even; NaN stays NaN. BF16 -> float32 is exact
    dot              of BF16 operands by value, in float32
    all else         as Triton's interpreter does it

An interpreted kernel is never an oracle. It shows that a kernel's indexing, masks and order of
operations are right; what the hardware's own conversions and tensor cores do, it cannot show.
`run` decides at the launch, by the device of the tensors, so that one process can interpret a
kernel and compile it too: TRITON_INTERPRET need not be set, and may be.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as upstream
from triton.runtime.jit import JITFunction

from nvfp4check.kernels.interpreter_arithmetic import (
    create_dot_scaled,
    with_bf16_casts,
    with_bf16_dot,
    with_e4m3_casts,
    with_loop_bounds,
    with_plain_format_names,
)
from nvfp4ref.formats import BLOCK_SIZE

Grid = tuple[int, ...]

#: Of Triton: (3, 9) for 3.9.0.
RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])

_repaired: ContextVar[bool] = ContextVar("repaired", default=True)


@triton.jit
def _loop_kernel(out_ptr, count):
    total = 0
    for step in range(count):
        total += step
    tl.store(out_ptr, total)


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + offs)
    tl.store(out_ptr + offs, tl.dot(a, a))


@triton.jit
def _dot_scaled_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, out_ptr, SIZE: tl.constexpr, K: tl.constexpr
):
    offs = tl.arange(0, SIZE)
    offs_k = tl.arange(0, K // 2)
    offs_s = tl.arange(0, K // 16)
    a = tl.load(a_ptr + offs[:, None] * (K // 2) + offs_k[None, :])
    b = tl.load(b_ptr + offs[None, :] * (K // 2) + offs_k[:, None])
    a_scale = tl.load(a_scale_ptr + offs[:, None] * (K // 16) + offs_s[None, :])
    b_scale = tl.load(b_scale_ptr + offs[:, None] * (K // 16) + offs_s[None, :])
    product = tl.dot_scaled(a, a_scale, "e2m1", b, b_scale, "e2m1")
    tl.store(out_ptr + offs[:, None] * SIZE + offs[None, :], product)


def _cast(values: list[float], name: str) -> list[float]:
    """Return values cast by an interpreted kernel to a torch dtype, as floats."""
    import torch

    x = torch.tensor(values, dtype=torch.float32)
    y = torch.empty(x.shape, dtype=getattr(torch, name))
    run(_cast_kernel, (1,), x, y, N=len(values))
    return [float(value) for value in y.float()]


def _e4m3_cast_is_right() -> bool:
    # A carry into the next binade, a float32 subnormal, a tie, saturation.
    given = [0.030395508, 1e-40, 1.0625, 1000.0]
    return _cast(given, "float8_e4m3fn") == [0.03125, 0.0, 1.0, 448.0]


def _bf16_cast_is_right() -> bool:
    # Above the midpoint, on it (to even, up and down), a carry into the next binade.
    given = [1.0 + 2.0**-8 + 2.0**-12, 1.0 + 3 * 2.0**-8, 1.0 + 2.0**-8, 2.0 - 2.0**-12]
    return _cast(given, "bfloat16") == [1.0078125, 1.015625, 1.0, 2.0]


def _bf16_dot_is_right() -> bool:
    import torch

    out = torch.empty(16, 16)
    run(_dot_kernel, (1,), torch.full((16, 16), 1.5, dtype=torch.bfloat16), out, SIZE=16)
    return bool((out == 16 * 1.5 * 1.5).all())


def _loop_bound_is_right() -> bool:
    import torch

    out = torch.zeros((), dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            run(_loop_kernel, (1,), out, 5)
        except upstream.InterpreterError:
            return False
    return int(out) == 10


def _dot_scaled_is_right() -> bool:
    import torch

    size, length = 16, 64
    ones = torch.full((size, length // 2), 0x22, dtype=torch.uint8)
    scales = torch.full((size, length // BLOCK_SIZE), 1.5).to(torch.float8_e4m3fn)
    out = torch.empty(size, size)
    try:
        run(_dot_scaled_kernel, (1,), ones, scales, ones, scales, out, SIZE=size, K=length)
    except upstream.InterpreterError:
        return False  # up to 3.7 the interpreter has no dot_scaled at all
    return bool((out == length * 1.5 * 1.5).all())


@dataclass(frozen=True, slots=True)
class Patch:
    """An attribute of Triton, and what it becomes, given what it was (None: not there)."""

    owner: object
    attribute: str
    wrap: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Repair:
    """One wrong piece of arithmetic in Triton's interpreter, and what replaces it."""

    name: str
    why: str
    #: The last release of Triton that was seen to need it.
    until: tuple[int, int]
    patches: tuple[Patch, ...]
    #: Runs a small kernel: is what is installed right?
    is_right: Callable[[], bool]

    @property
    def applies(self) -> bool:
        """Whether the Triton at hand is one that needs it."""
        return self.until >= RELEASE


REPAIRS = (
    Repair(
        name="dot_scaled",
        why="3.6 and 3.7 have none; 3.9.0 decodes every block scale as E8M0, E4M3 ones too",
        until=(3, 9),
        patches=(
            Patch(upstream.InterpreterBuilder, "create_dot_scaled", lambda _: create_dot_scaled),
            Patch(upstream.TritonSemantic, "dot_scaled", with_plain_format_names),
        ),
        is_right=_dot_scaled_is_right,
    ),
    Repair(
        name="e4m3 cast",
        why="3.6 to 3.9 lose the rounding carry, turn float32 subnormals into 2**-9, do not tie "
        "to even and give NaN where the hardware saturates",
        until=(3, 9),
        patches=(Patch(upstream, "_convert_float", with_e4m3_casts),),
        is_right=_e4m3_cast_is_right,
    ),
    Repair(
        name="bf16 cast",
        why="3.6 to 3.9 truncate float32 to BF16, where a GPU rounds to nearest even",
        until=(3, 9),
        patches=(Patch(upstream, "_convert_float", with_bf16_casts),),
        is_right=_bf16_cast_is_right,
    ),
    Repair(
        name="bf16 dot",
        why="3.6 to 3.9 multiply the bit patterns of BF16 operands as integers",
        until=(3, 9),
        patches=(Patch(upstream.InterpreterBuilder, "create_dot", with_bf16_dot),),
        is_right=_bf16_dot_is_right,
    ),
    Repair(
        name="loop bound",
        why="3.6 takes a bound from an array of one element, which numpy refuses since 2.4",
        until=(3, 6),
        patches=(Patch(upstream, "_patch_lang_tensor", with_loop_bounds),),
        is_right=_loop_bound_is_right,
    ),
)


@contextmanager
def unrepaired() -> Iterator[None]:
    """Leave Triton's interpreter as it was released, to see what it does."""
    token = _repaired.set(False)
    try:
        yield
    finally:
        _repaired.reset(token)


@contextmanager
def interpretation() -> Iterator[None]:
    """Let kernels of this process be interpreted; leave no trace behind.

    A helper decorated with `triton.jit` is callable inside, whether or not TRITON_INTERPRET was
    set when it was decorated, `tl.sum` and its kind included.
    """
    scopes: list[Any] = []
    patched: set[int] = set()
    patch_lang = upstream._patch_lang

    def patch_once(fn: Callable[..., Any]) -> Any:
        module = id(fn.__globals__)
        if module not in patched:
            patched.add(module)
            scopes.append(patch_lang(fn))
        return upstream._LangPatchScope()  # empty: the interpreter's own restore has nothing to do

    def call(function: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
        upstream._patch_lang(function.fn)
        return upstream.InterpretedFunction(function.fn).rewrite()(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(upstream, "_patch_lang", patch_once))
        stack.enter_context(mock.patch.object(JITFunction, "__call__", call))
        if _repaired.get():
            needed = (repair.patches for repair in REPAIRS if repair.applies)
            for patch in chain.from_iterable(needed):
                installed = patch.wrap(getattr(patch.owner, patch.attribute, None))
                stack.enter_context(
                    mock.patch.object(patch.owner, patch.attribute, installed, create=True)
                )
        stack.enter_context(np.errstate(all="ignore"))  # infinities and NaN are data here
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="All-NaN", category=RuntimeWarning)
        try:
            yield
        finally:
            for scope in reversed(scopes):
                scope.restore()


def run(kernel: Any, grid: Grid, *args: Any, **kwargs: Any) -> None:
    """Launch a kernel under the interpreter on CPU tensors, whatever TRITON_INTERPRET says."""
    if any(extent == 0 for extent in grid):
        return
    with interpretation():
        upstream.InterpretedFunction(kernel.fn)[grid](*args, **kwargs)
