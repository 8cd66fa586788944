"""Errors of the router, and whose choice of experts can legally change.

T tokens, E experts in groups, k chosen; l the router's logits, s = sigmoid(l).

Contract:
    scores    var = (s (1 - s))**2 var l, to first order, with l as any product (`linear`), and its
              roundings; the bias is exact.
              Logits may be rounded to the dtype of the activations, as by engines whose router is
              one linear among others, and so may s
    weights   w = scaling s / sum of the chosen s: all s come from one input, so their errors are
              added as roots, w (|ds| / s + sum of |ds| / sum of s)
    settled   no choice within the reach of the scores is another: every open group beats every
              closed one, by the sum of its two best, by more than both may lie off; and within
              the open groups every chosen expert every other one. Where this fails another choice
              of experts is legal; what follows it has a bound only for the reference's choice
    sum       the experts' outputs w_e y_e come from one input: their errors are added as roots.
              The dtype holds each y_e, each product, the sum of the routed and that with the
              shared. What several ranks round beside is in `parallel`
"""

import torch

from nvfp4check.forward.bounds.arithmetic import KINDS, Roundings
from nvfp4check.forward.bounds.linear import gain
from nvfp4check.forward.bounds.parallel import ExpertShares, split
from nvfp4check.forward.bounds.uncertain import (
    Uncertain,
    minkowski,
    split_last,
    through_matrix,
)
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.routing import choose


def router_scores(
    x: Uncertain, weight: torch.Tensor, scores: torch.Tensor, roundings: Roundings
) -> tuple[Uncertain, torch.Tensor]:
    """Return the error of the choice scores [T, E], and the scores without their bias."""
    w = weight.double()
    logits = x.value @ w.T
    w2 = w.square()
    squares = x.value.square() @ w2.T
    of_logits = through_matrix(x.variance @ w2.T, gain(logits, squares))
    of_logits = of_logits + x.common.unsqueeze(-1) * logits.square()
    of_logits = of_logits + roundings.of_output(logits)
    of_logits = of_logits + roundings.of_sum(w.shape[-1], logits, squares)
    sigmoid = logits.sigmoid()
    local = roundings.of_output(sigmoid) + roundings.of_functions(sigmoid)
    value = scores.double()
    variance = (sigmoid * (1 - sigmoid)).square() * of_logits + local
    variance = variance + roundings.of_internal(value, 1)  # with the bias
    return Uncertain(value, variance, torch.zeros_like(x.common)), sigmoid


def router_weights(
    scores: Uncertain,
    sigmoid: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    config: DeepseekV3Config,
    roundings: Roundings,
) -> Uncertain:
    """Return the error of the weights [T, k] of the reference's experts [T, k]."""
    chosen = experts.long()
    s = sigmoid.gather(-1, chosen)
    index = chosen.expand(*scores.variance.shape[:2], *chosen.shape)
    roots = scores.variance.gather(-1, index).sqrt()
    value = weights.double()
    if config.norm_topk_prob:
        relative = roots / s + (roots.sum(-1) / s.sum(-1)).unsqueeze(-1)
    else:
        relative = roots / s
    local = roundings.of_output(value) + roundings.of_internal(value, 4)
    return Uncertain(value, (relative * value).square() + local, torch.zeros_like(scores.common))


def settled(scores: Uncertain, experts: torch.Tensor, config: DeepseekV3Config) -> torch.Tensor:
    """Return whose experts [T, k] are the only legal ones, bool [A, T]."""
    value, reach = scores.value, scores.reach  # (T, E), (A, T, E)
    low, high = value - reach, value + reach
    chosen = torch.zeros_like(value, dtype=torch.bool).scatter_(-1, experts.long(), True)
    rivals = ~chosen
    groups_settled = torch.ones(reach.shape[:2], dtype=torch.bool, device=value.device)
    if config.n_group > config.topk_group:
        size = value.shape[-1] // config.n_group
        # A group's sum of its two best lies between the same sums of the lowest and the highest.
        least = split_last(low, -1, size).topk(2, dim=-1).values.sum(-1)
        most = split_last(high, -1, size).topk(2, dim=-1).values.sum(-1)
        sums = split_last(value, -1, size).topk(2, dim=-1).values.sum(-1)
        best = choose(sums, 1, 1, config.topk_group).long()
        opened = torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, best, True)
        weakest = least.masked_fill(~opened, torch.inf).amin(-1)
        strongest = most.masked_fill(opened, -torch.inf).amax(-1)
        groups_settled = weakest > strongest
        rivals = rivals & opened.repeat_interleave(size, dim=-1)
    last = low.masked_fill(~chosen, torch.inf).amin(-1)
    next_ = high.masked_fill(~rivals, -torch.inf).amax(-1)
    return groups_settled & (last > next_)


class ExpertSum:
    """Collects what experts give, root by root; [A, KINDS, T, D]."""

    def __init__(self, weights: Uncertain, width: int, roundings: Roundings) -> None:
        self._weights = weights
        self._roundings = roundings
        arithmetics, _, tokens = weights.common.shape
        self._roots = weights.value.new_zeros(arithmetics, KINDS, tokens, width)
        #: Sum of the squares of what is added, for the roundings of the sum.
        self._squares = weights.value.new_zeros(tokens, width)
        self._rounded = weights.value.new_zeros(arithmetics, KINDS, tokens, width)
        self._shares = ExpertShares(self._squares.clone()) if split(roundings) else None

    def add(
        self,
        output: Uncertain,
        squares: torch.Tensor,
        token: torch.Tensor,
        slot: torch.Tensor,
    ) -> None:
        """Add an expert's output for the tokens that chose it, each with its weight.

        `squares` are the sums of the squares of what its neurons add, as of the shared expert.
        """
        weight = self._weights.value[token, slot].unsqueeze(-1)
        its_variance = self._weights.variance[:, :, token, slot].unsqueeze(-1)
        product = weight * output.value
        added = minkowski(weight.square() * output.total, its_variance * output.value.square())
        self._roots[:, :, token] += added.sqrt()
        self._rounded[:, :, token] += self._roundings.of_output(product)
        self._squares[token] += product.square()
        if self._shares is not None:
            self._shares.add(product, weight.square() * squares, token)

    def add_shared(self, output: Uncertain, squares: torch.Tensor) -> None:
        """Add the shared expert's output."""
        self._roots += output.total.sqrt()
        self._squares += output.value.square()
        if self._shares is not None:
            self._shares.add_shared(output.value, squares)

    def total(self, value: torch.Tensor, terms: int) -> Uncertain:
        """Return the error of the sum [T, D] of so many terms a token."""
        value = value.double()
        local = (
            self._roundings.of_output(value, 2)
            + self._roundings.of_sum(terms, value, self._squares)
            + self._rounded
        )
        if self._shares is not None:
            local = local + self._shares.total(value, self._roundings)
        return Uncertain(
            value, self._roots.square() + local, torch.zeros_like(self._weights.common)
        )
