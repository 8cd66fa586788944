"""What an engine rounds more that splits products over ranks: shares of them, and their sum.

N ranks, and a product y whose M terms are not split any further: heads of o_proj, neurons of
down_proj, experts. Q is the sum of the terms' squares.

Contract, each rounding adding u**2 / 3 times the square of what is rounded:
    shares    a rank's product is rounded to the dtype. Terms are dealt to ranks without regard to
              their values, so what f = j / N of them add up to has the mean square
              f**2 y**2 + f (1 - f) R, with R = (Q - y**2 / M) M / (M - 1) where all ranks have as
              many, and R = Q for experts, of which any number may lie on a rank. Over the N ranks
              that is y**2 / N + (1 - 1 / N) R
    sum       N - 1 additions, each rounded to the dtype, the last of which is the output's rounding
              and counted there. Of all orders the worst is taken, by each of both terms: a chain
              for f**2, and what a search over all binary trees finds for f (1 - f)
    experts   one expert may be split or lie whole on a rank, so its Q is the larger of its
              neurons' and its output's square. Each rank rounds every output, that times its
              weight, their sum, that scaled, and that with the shared expert's share; either these
              are added up over the ranks, or the routed and the shared sums each on its own
    fewer     engines that add up in float32 and round once, or scatter and gather the sum, do some
              of these roundings and no others

What ranks exchange in fewer bits computes something else, and so do scales of activations that each
rank finds in its own share of a token. A residual that one rank adds to its share, as SGLang's may
where attention is data-parallel, is rounded with every addition: not counted, for it would make all
bounds behind it wider for the few ranks that do so.

Sources: vLLM 0.32, vllm/model_executor/layers/linear.py (RowParallelLinear: each rank's product in
the dtype of the activations, then all-reduce), vllm/model_executor/layers/fused_moe/runner/
moe_runner.py (one all-reduce of both sums, or one of each) and csrc/custom_all_reduce.cuh
(packed_reduce: float32, one rounding); NCCL, src/device/reduce_kernel.h (ring and tree: FuncSum of
bfloat16 is __hadd2) and src/device/symmetric/all_reduce.cuh (a wider accumulator); TensorRT-LLM,
cpp/tensorrt_llm/kernels/communicationKernels/allReduceFusionKernels.cu (allreduce_sum: float32, or
rank by rank in the dtype); SGLang, python/sglang/srt/layers/communicator.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from nvfp4check.findings import CheckError
from nvfp4check.forward.bounds.arithmetic import FRESH_RANDOM, KINDS, Roundings
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.rounding import UNIT_ROUNDOFF


@dataclass(frozen=True, slots=True)
class Weights:
    """What a sum of squares consists of: so many y**2 and so many R."""

    of_value: float
    of_spread: float

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(self.of_value + other.of_value, self.of_spread + other.of_spread)


@cache
def shares(ranks: int) -> Weights:
    """Return the squares of the shares of all ranks, summed."""
    return Weights(1 / ranks, 1 - 1 / ranks)


@cache
def additions(ranks: int) -> Weights:
    """Return the squares of all partial sums but the last, summed over the worst order."""
    chain = sum((j / ranks) ** 2 for j in range(2, ranks))
    # worst[n]: over all trees that add up n shares, their own sum included.
    worst = [0.0, 0.0]
    for n in range(2, ranks + 1):
        below = max(worst[left] + worst[n - left] for left in range(1, n // 2 + 1))
        worst.append(below + n / ranks * (1 - n / ranks))
    return Weights(chain, worst[ranks])


def require_ranks(roundings: Roundings, config: DeepseekV3Config) -> None:
    """Refuse ranks that the heads of a model cannot be divided among.

    Raises:
        CheckError: So it is.
    """
    heads = config.num_attention_heads
    for side in roundings.declared:
        if heads % side.ranks:
            raise CheckError(
                f"--bounds: {heads} heads cannot be divided among {side.ranks} ranks; engines "
                f"take a divisor of {heads}"
            )


def split(roundings: Roundings) -> bool:
    """Say whether any declared engine has several ranks."""
    return any(side.ranks > 1 for side in roundings.declared)


def of_linear(
    roundings: Roundings, value: torch.Tensor, squares: torch.Tensor, terms: int
) -> torch.Tensor:
    """Return what splitting a product [T, D] of so many terms adds; squares are their Q."""
    square = value.square()
    rest = (squares - square / terms).clamp(min=0.0) * (terms / max(1, terms - 1))
    return _weighted(roundings, square, rest, lambda ranks: shares(ranks) + additions(ranks))


class ExpertShares:
    """Collects what experts and the shared expert give, for the roundings of their shares."""

    def __init__(self, none: torch.Tensor) -> None:
        """Begin with zeros [T, D]."""
        #: Sums over the experts of their Q, and of how much that is above their output's square.
        self._squares = none.clone()
        self._above = none.clone()
        self._shared = self._shared_squares = none

    def add(self, product: torch.Tensor, squares: torch.Tensor, token: torch.Tensor) -> None:
        """Add an expert's output times its weight, and the squares of its neurons' terms."""
        square = product.square()
        self._squares[token] += torch.maximum(square, squares)
        self._above[token] += (squares - square).clamp(min=0.0)

    def add_shared(self, output: torch.Tensor, squares: torch.Tensor) -> None:
        """Add the shared expert's output, and the squares of its neurons' terms."""
        square = output.square()
        self._shared = self._shared + output
        self._shared_squares = self._shared_squares + torch.maximum(square, squares)
        self._above += (squares - square).clamp(min=0.0)

    def total(self, value: torch.Tensor, roundings: Roundings) -> torch.Tensor:
        """Return what the ranks' roundings add to the sum [T, D] of all."""
        routed, shared = (value - self._shared).square(), self._shared.square()
        every = self._squares + self._shared_squares
        none = torch.zeros_like(value)
        # An output and that times its weight are counted whole where it is computed.
        of_outputs = _weighted(roundings, none, self._above, lambda n: shares(n) + shares(n))
        of_routed = _weighted(roundings, routed, self._squares, lambda n: shares(n) + shares(n))
        together = _weighted(roundings, value.square(), every, lambda n: shares(n) + additions(n))
        whole = Weights(1.0, 0.0)
        apart = _weighted(roundings, routed + shared, every, lambda n: additions(n) + whole)
        return of_outputs + of_routed + torch.maximum(together, apart)


def _weighted(
    roundings: Roundings,
    square: torch.Tensor,
    spread: torch.Tensor,
    weights: Callable[[int], Weights],
) -> torch.Tensor:
    """Return the variances [A, KINDS, T, D] of roundings of what has these mean squares."""
    out = square.new_zeros(len(roundings), KINDS, *square.shape)
    for i, side in enumerate(roundings.declared):
        if side.ranks > 1:
            weight = weights(side.ranks)
            mean_square = weight.of_value * square + weight.of_spread * spread
            out[i, FRESH_RANDOM] = UNIT_ROUNDOFF[side.dtype] ** 2 / 3 * mean_square
    return out
