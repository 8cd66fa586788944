"""Hypothesis strategies for NVFP4: blocks that shrink to one 16-block with few live elements.

    from hypothesis import given
    from nvfp4check import strategies

    @given(strategies.examples())
    def test_my_quantizer(example):
        codes, scales = my_quantize(example.x, example.global_decode_scale)

Contract:
    codes, scales  every code, every positive finite block scale; NaN scales where asked for
    elements       code boundaries times a scale and their neighbours, plain numbers, zeros of
                   either sign, values from the ends of the range; all held by the dtype
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from nvfp4check.inputs import INPUT_DTYPES, SCALE_BYTES, neighbours, scales_from_bytes
from nvfp4check.ops import UnsupportedError
from nvfp4ref import e2m1, e4m3, packing
from nvfp4ref.formats import BLOCK_SIZE

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """What a quantiser is given."""

    x: torch.Tensor
    global_decode_scale: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """What a dequantiser or a product is given."""

    packed_codes: torch.Tensor
    block_scales: torch.Tensor


def scale_bytes(*, zero: bool = False, nan: bool = False) -> st.SearchStrategy[int]:
    """Return bytes of positive finite block scales, which shrink to 1.0, and others if asked."""
    ordered = sorted(SCALE_BYTES, key=lambda byte: abs(byte - 0x38))
    others = ([0] if zero else []) + ([0x7F] if nan else [])
    return st.sampled_from([*ordered, *others])


def global_scales() -> st.SearchStrategy[float]:
    """Return global decode scales: powers of two first, then any float32 of a sane size."""
    powers = st.integers(-14, 4).map(lambda power: 2.0**power)
    return powers | st.floats(2.0**-20, 2.0**10, width=32)


@st.composite
def blocks(draw: st.DrawFn, dtype: torch.dtype, global_decode_scale: float) -> torch.Tensor:
    """Return one block [16] whose elements crowd round the boundaries of one block scale."""
    byte = draw(scale_bytes())
    step = e4m3.VALUES[byte] * global_decode_scale
    sharp = torch.tensor([0.0, *e2m1.MIDPOINTS, *e2m1.MAGNITUDES[1:]], dtype=torch.float64) * step
    largest = torch.finfo(dtype).max / 4
    table = neighbours(sharp.clamp(max=largest).to(dtype)).flatten().abs()
    choice = st.tuples(st.integers(0, len(table) - 1), st.booleans())
    picks = draw(st.lists(choice, min_size=BLOCK_SIZE, max_size=BLOCK_SIZE))
    signs = torch.tensor([-1.0 if negative else 1.0 for _, negative in picks], dtype=dtype)
    return table[torch.tensor([place for place, _ in picks])] * signs


@st.composite
def examples(draw: st.DrawFn, max_blocks: int = 4) -> Example:
    """Return a matrix of one row and few blocks, with a global scale; shrinks to one block."""
    dtype = draw(st.sampled_from(INPUT_DTYPES[::-1]))
    scale = draw(global_scales())
    count = draw(st.integers(1, max_blocks))
    row = torch.cat([draw(blocks(dtype, scale)) for _ in range(count)])
    return Example(row.unsqueeze(0), torch.tensor(scale, dtype=torch.float32))


@st.composite
def operands(
    draw: st.DrawFn, *, max_rows: int = 3, max_blocks: int = 4, nan: bool = False
) -> Operand:
    """Return packed codes and block scales of a small matrix."""
    rows, count = draw(st.integers(1, max_rows)), draw(st.integers(1, max_blocks))
    raw = draw(st.lists(scale_bytes(nan=nan), min_size=rows * count, max_size=rows * count))
    codes = draw(
        st.lists(
            st.integers(0, 15),
            min_size=rows * count * BLOCK_SIZE,
            max_size=rows * count * BLOCK_SIZE,
        )
    )
    unpacked = torch.tensor(codes, dtype=torch.uint8).view(rows, count * BLOCK_SIZE)
    return Operand(packing.pack(unpacked), scales_from_bytes(torch.tensor(raw).view(rows, count)))


#: Examples tried on the way from the first that answers to a smaller one.
SHRINK_TRIALS = 80


class _FoundError(Exception):
    """Tells hypothesis that an example answers; it then looks for a smaller one."""


class _EnoughError(BaseException):
    """Ends hypothesis's search from within, which only what is no Exception can."""


def find(
    strategy: st.SearchStrategy[T],
    answer: Callable[[T], R | None],
    max_examples: int,
    start: int,
) -> R | None:
    """Return the answer for a small example that has one, or None after `max_examples`.

    The same seed `start` draws the same examples; nothing is stored between runs. Examples that a
    kernel does not take are left out.

    Raises:
        UnsupportedError: The kernel takes none of the examples.
    """
    found: list[R] = []
    refused: list[UnsupportedError] = []
    asked = trials = 0

    @seed(start)
    @settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(strategy)
    def ask(example: T) -> None:
        nonlocal asked, trials
        asked += 1
        trials += bool(found)
        if trials > SHRINK_TRIALS:
            raise _EnoughError
        try:
            result = answer(example)
        except UnsupportedError as error:
            refused.append(error)
            return
        if result is not None:
            found.append(result)
            raise _FoundError

    with contextlib.suppress(_FoundError, _EnoughError):
        ask()
    if refused and len(refused) == asked:
        raise refused[0]
    return found[-1] if found else None


def pairs(strategy: st.SearchStrategy[T]) -> st.SearchStrategy[tuple[T, T]]:
    """Return two of the same kind, drawn one after the other."""
    return st.tuples(strategy, strategy)
