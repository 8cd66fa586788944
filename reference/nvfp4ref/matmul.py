"""The product of two NVFP4 operands, exact and with a certificate.

M rows of A, N rows of B, K contracted, C = K/16, E experts.

Contract:
    operand      element = E2M1 value * E4M3 block scale: at most 6 significant bits, a multiple of
                 2**-10; never rounded
    product      P = A B^T in float64. Every partial sum, in any order, is a multiple of one
                 quantum (the lowest set bit in the row of A times that in the row of B); where
                 |A||B|^T / quantum < 2**53 no addition can round, so P is the real number. The
                 same product of magnitudes tells where. Elsewhere integers of any size give the
                 real number, rounded once to float64
    NaN          a NaN scale makes its whole row of the product NaN, zero codes included
    output       alpha * P rounded once to the dtype; with a stated order of accumulation, alpha
                 times the accumulator rounded to float32, then to the dtype
"""

import itertools
from dataclasses import dataclass
from enum import StrEnum

import torch

from nvfp4ref import e2m1, e4m3, packing
from nvfp4ref.formats import BLOCK_SIZE
from nvfp4ref.rounding import round_to, truncate_to

#: Every operand element is a multiple of this: 0.5 times E4M3's smallest subnormal.
ELEMENT_QUANTUM = 2.0**-10

#: Sums of multiples of one quantum below this many of it are exact in float64.
_FLOAT64_INTEGERS = 2.0**53


class AccumulatorRounding(StrEnum):
    """How an accumulator rounds after an addition."""

    NEAREST = "nearest"
    #: As tensor cores do.
    TOWARD_ZERO = "toward-zero"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulation:
    """A stated order: chunks of K are summed exactly, then added to an accumulator that rounds.

    With several splits, each sums its contiguous share of the chunks and the shares are added
    one after the other.
    """

    chunk: int = 1
    rounding: AccumulatorRounding = AccumulatorRounding.NEAREST
    splits: int = 1
    dtype: torch.dtype = torch.float32


#: One element after the other in float32.
SEQUENTIAL = Accumulation()

#: One K = 64 instruction after the other, truncated, as Blackwell's tensor cores accumulate.
TENSOR_CORE = Accumulation(chunk=64, rounding=AccumulatorRounding.TOWARD_ZERO)


@dataclass(frozen=True, slots=True)
class ExactProduct:
    """A B^T and what is needed to say how exact any computation of it must be."""

    #: The real product rounded once to float64, [M, N].
    value: torch.Tensor
    #: |A||B|^T in float64, [M, N].
    magnitude: torch.Tensor
    #: A power of two that divides every term of the sum, [M, N].
    quantum: torch.Tensor
    #: Where the float64 product was certified free of rounding, [M, N]; NaN counts as certified.
    certified: torch.Tensor

    @property
    def exact(self) -> bool:
        """Whether the certificate holds everywhere."""
        return bool(self.certified.all())


def operand(packed_codes: torch.Tensor, block_scales: torch.Tensor) -> torch.Tensor:
    """Return the elements [..., K] of an operand in float64, without its global scale.

    Raises:
        ValueError: The scales do not belong to the codes.
    """
    columns = packed_codes.shape[-1] * 2 // BLOCK_SIZE
    expected = (*packed_codes.shape[:-1], columns)
    if tuple(block_scales.shape) != expected:
        raise ValueError(
            f"packed codes {tuple(packed_codes.shape)} need block scales {expected}, "
            f"found {tuple(block_scales.shape)}"
        )
    codes = packing.unpack(packed_codes.contiguous())
    scales = e4m3.decode(block_scales.contiguous()).double()
    return e2m1.decode(codes).double() * scales.repeat_interleave(BLOCK_SIZE, dim=-1)


def exact(
    a_codes: torch.Tensor, a_scales: torch.Tensor, b_codes: torch.Tensor, b_scales: torch.Tensor
) -> ExactProduct:
    """Return the exact product of two packed operands.

    Raises:
        ValueError: The shapes do not fit together.
    """
    return exact_of_elements(operand(a_codes, a_scales), operand(b_codes, b_scales))


def exact_of_elements(a: torch.Tensor, b: torch.Tensor) -> ExactProduct:
    """Return the exact product of decoded operands A [M, K] and B [N, K], float64.

    Raises:
        ValueError: The operands are not matrices of one K.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"A {tuple(a.shape)} and B {tuple(b.shape)} are not [M, K] and [N, K]")
    value = a @ b.T
    magnitude = a.abs() @ b.abs().T
    quantum = row_quantum(a).unsqueeze(1) * row_quantum(b).unsqueeze(0)
    certified = (magnitude < _FLOAT64_INTEGERS * quantum) | value.isnan()
    for m, n in (~certified).nonzero().tolist():
        value[m, n] = _integer_dot(a[m], b[n])
    return ExactProduct(value, magnitude, quantum, certified)


def row_quantum(elements: torch.Tensor) -> torch.Tensor:
    """Return the lowest set bit of each row, as a float64 power of two; 1 for a row of zeros."""
    steps = (elements / ELEMENT_QUANTUM).nan_to_num(0.0).long()
    lowest = torch.where(steps == 0, torch.iinfo(torch.int64).max, steps & -steps)
    if lowest.shape[-1] == 0:
        return torch.ones(elements.shape[:-1], dtype=torch.float64, device=elements.device)
    found = lowest.min(dim=-1).values
    empty = found == torch.iinfo(torch.int64).max
    return torch.where(empty, 1.0, found.double() * ELEMENT_QUANTUM)


def _integer_dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the real dot product of two rows, rounded once to float64."""
    left = (a / ELEMENT_QUANTUM).long().tolist()
    right = (b / ELEMENT_QUANTUM).long().tolist()
    total: int = sum(x * y for x, y in zip(left, right, strict=True))
    return float(total) * ELEMENT_QUANTUM**2  # int to float rounds once; the power is exact


def accumulate(a: torch.Tensor, b: torch.Tensor, order: Accumulation) -> torch.Tensor:
    """Return the accumulator after A B^T in a stated order, in its dtype.

    Raises:
        ValueError: A chunk or the number of splits is not positive.
    """
    if order.chunk < 1 or order.splits < 1:
        raise ValueError(f"chunk {order.chunk} and splits {order.splits} must be positive")
    rounded = round_to if order.rounding is AccumulatorRounding.NEAREST else truncate_to
    total_k = a.shape[1]
    chunks = -(-total_k // order.chunk)
    share = -(-chunks // order.splits) * order.chunk
    result = torch.zeros(a.shape[0], b.shape[0], dtype=order.dtype, device=a.device)
    for first in range(0, total_k, max(share, 1)):
        partial = torch.zeros_like(result)
        for k in range(first, min(first + share, total_k), order.chunk):
            last = min(k + order.chunk, first + share, total_k)
            partial = rounded(partial.double() + a[:, k:last] @ b[:, k:last].T, order.dtype)
        result = rounded(result.double() + partial.double(), order.dtype) if first else partial
    return result


def matmul(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    dtype: torch.dtype,
    *,
    order: Accumulation | None = None,
) -> torch.Tensor:
    """Return alpha * A B^T [M, N]: rounded once, or as a stated order of accumulation gives it.

    Raises:
        ValueError: The shapes do not fit together.
    """
    a, b = operand(a_codes, a_scales), operand(b_codes, b_scales)
    if order is None:
        return round_to(exact_of_elements(a, b).value * alpha.double(), dtype)
    accumulator = accumulate(a, b, order).double()
    return round_to(round_to(accumulator * alpha.double(), torch.float32).double(), dtype)


def grouped_matmul(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    expert_offsets: torch.Tensor,
    dtype: torch.dtype,
    *,
    order: Accumulation | None = None,
) -> torch.Tensor:
    """Return the rows of each group times their expert, [M, N].

    Raises:
        ValueError: The offsets do not rise from 0 to M, or the shapes do not fit together.
    """
    groups = group_rows(expert_offsets, b_codes.shape[0], a_codes.shape[0])
    shape = (a_codes.shape[0], b_codes.shape[1])
    out = torch.zeros(shape, dtype=dtype, device=a_codes.device)
    for expert, rows in enumerate(groups):
        out[rows] = matmul(
            a_codes[rows],
            a_scales[rows],
            b_codes[expert],
            b_scales[expert],
            alpha[expert],
            dtype,
            order=order,
        )
    return out


def group_rows(expert_offsets: torch.Tensor, experts: int, rows: int) -> list[slice]:
    """Return the rows of each expert.

    Raises:
        ValueError: The offsets do not rise from 0 to the number of rows, one more than experts.
    """
    offsets = expert_offsets.tolist()
    if len(offsets) != experts + 1 or offsets[:1] != [0] or offsets[-1:] != [rows]:
        raise ValueError(f"{experts} experts over {rows} rows: offsets {offsets} do not span them")
    if offsets != sorted(offsets):
        raise ValueError(f"expert offsets must not fall, found {offsets}")
    return [slice(first, last) for first, last in itertools.pairwise(offsets)]
