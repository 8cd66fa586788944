"""F14 and F15: which experts a token goes to, and with what weights.

Contract:
    score   sigmoid of the logits; choice by score + bias, in float32, ties to the lower index
    each fault changes one step of the router written here, or the arguments and outputs of one
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from nvfp4check.faults.base import Form, KernelFault
from nvfp4check.ops import Kernel

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Router:
    """A router in steps, each of which a fault may change."""

    gate: Callable[[Tensor], Tensor] = torch.sigmoid
    choice: Callable[[Tensor, Tensor], Tensor] = torch.add
    best_of_group: int = 2
    masked: float = float("-inf")
    lower_first: bool = True
    #: (scores, choice scores, experts) to what the weights are made of.
    weigh: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    epsilon: float = 1e-20
    normalize: bool = True

    def __call__(
        self,
        logits: Tensor,
        bias: Tensor,
        n_group: int,
        topk_group: int,
        top_k: int,
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        """Return experts and weights."""
        scores = self.gate(logits)
        choice = self.choice(scores, bias)
        size = logits.shape[-1] // n_group
        if n_group > 1:
            groups = choice.view(-1, n_group, size)
            group_scores = groups.topk(self.best_of_group, dim=-1).values.sum(-1)
            open_groups = torch.zeros_like(group_scores, dtype=torch.bool)
            open_groups.scatter_(-1, self._top(group_scores, topk_group), True)
            closed = ~open_groups.repeat_interleave(size, dim=-1)
            masked = choice.masked_fill(closed, self.masked)
        else:
            masked = choice
        experts = self._top(masked, top_k)
        weigh = self.weigh or _of_scores
        weights = weigh(scores, choice, experts)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + self.epsilon)
        return experts.to(torch.int32), (weights * scaling).float()

    def _top(self, scores: Tensor, count: int) -> Tensor:
        if self.lower_first:
            return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        last = scores.shape[-1] - 1
        return (
            last - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
        )


def _of_scores(scores: Tensor, choice: Tensor, experts: Tensor) -> Tensor:
    return scores.gather(-1, experts)


def _of_choice(scores: Tensor, choice: Tensor, experts: Tensor) -> Tensor:
    return choice.gather(-1, experts)


def _of_all(scores: Tensor, choice: Tensor, experts: Tensor) -> Tensor:
    return (scores / scores.sum(-1, keepdim=True)).gather(-1, experts)


def _recovered(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Recover the scores as (score + bias) - bias."""
    bias = arguments[1]

    def weigh(scores: Tensor, choice: Tensor, experts: Tensor) -> Tensor:
        recovered: Tensor = (choice - bias).gather(-1, experts)
        return recovered

    return Router(weigh=weigh)(*arguments)


def _bfloat16_bias(scores: Tensor, bias: Tensor) -> Tensor:
    return scores + bias.to(torch.bfloat16).float()


def _from_zero(scores: Tensor, bias: Tensor) -> Tensor:
    """Let a running maximum that begins at zero hide every score below it."""
    return (scores + bias).clamp(min=0.0)


def _without_bias(scores: Tensor, bias: Tensor) -> Tensor:
    return scores


def _all_groups(kernel: Kernel, *arguments: Any) -> Any:
    logits, bias, n_group, _, top_k, scaling = arguments
    return kernel(logits, bias, n_group, n_group, top_k, scaling)


def _scaled(power: int, kernel: Kernel, *arguments: Any) -> Any:
    experts, weights = kernel(*arguments)
    return experts, weights * arguments[5] ** (power - 1)


def _next_weight(kernel: Kernel, *arguments: Any) -> Any:
    experts, weights = kernel(*arguments)
    return experts, weights.roll(1, -1)


_RIGHT = Router()


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _replaced(router: Callable[..., Any], label: str = "") -> Form:
    return Form(operation="route", wrong=router, label=label)


def _around(wrong: Callable[..., Any], label: str = "") -> Form:
    return Form(operation="route", wrong=wrong, label=label, around=True)


FAULTS = (
    KernelFault(
        id="F14a",
        name="closed groups masked with zero",
        does="experts of closed groups keep a choice score of 0.0",
        needs="choice scores below zero; with a positive bias it never shows",
        threads=(
            "deepseek-ai/DeepSeek-V3/issues/741",
            "huggingface/transformers/issues/45440",
            "kvcache-ai/ktransformers/issues/1148",
            "EricLBuehler/mistral.rs/pull/1278",
        ),
        forms=(_replaced(replace(_RIGHT, masked=0.0)),),
    ),
    KernelFault(
        id="F14b",
        name="a group counts its best expert",
        does="groups compared by their maximum instead of the sum of their two best",
        needs="several groups",
        threads=("vllm-project/vllm/pull/13474",),
        forms=(_replaced(replace(_RIGHT, best_of_group=1)),),
    ),
    KernelFault(
        id="F14c",
        name="bias or logits in BF16",
        does="the correction bias, or the logits, rounded to bfloat16",
        needs="biases in a narrow band far from zero, or scores close to one another",
        threads=(
            "sgl-project/sglang/pull/31213",
            "sgl-project/sglang/issues/34857",
            "sgl-project/sglang/pull/35055",
            "vllm-project/vllm/pull/36725",
            "flashinfer-ai/flashinfer/pull/1876",
        ),
        forms=(
            _replaced(replace(_RIGHT, choice=_bfloat16_bias), "bias"),
            _around(
                lambda kernel, logits, *rest: kernel(logits.to(torch.bfloat16).float(), *rest),
                "logits",
            ),
        ),
    ),
    KernelFault(
        id="F14d",
        name="router of another model",
        does="no bias, or softmax for sigmoid",
        needs="a bias; scores of any kind",
        threads=("NVIDIA/TensorRT-Model-Connect/pull/669",),
        forms=(
            _replaced(replace(_RIGHT, choice=_without_bias), "no bias"),
            _replaced(replace(_RIGHT, gate=_softmax), "softmax"),
        ),
    ),
    KernelFault(
        id="F14e",
        name="maximum begins at zero",
        does="choice scores below zero are never the maximum",
        needs="choice scores below zero",
        threads=(
            "vllm-project/vllm/pull/37605",
            "vllm-project/vllm/pull/38859",
            "flashinfer-ai/flashinfer/issues/2168",
            "flashinfer-ai/flashinfer/pull/2313",
        ),
        forms=(_replaced(replace(_RIGHT, choice=_from_zero)),),
    ),
    KernelFault(
        id="F14f",
        name="ties to the higher index",
        does="of equal scores the last is taken",
        needs="equal scores",
        threads=(),
        forms=(_replaced(replace(_RIGHT, lower_first=False)),),
    ),
    KernelFault(
        id="F14g",
        name="every group open",
        does="topk_group taken as n_group, or groups ignored",
        needs="several groups",
        threads=(),
        forms=(_around(_all_groups),),
    ),
    KernelFault(
        id="F15a",
        name="weights of biased scores",
        does="weights made of score + bias",
        needs="a bias",
        threads=("vllm-project/vllm/pull/12002", "vllm-project/vllm/issues/11971"),
        forms=(_replaced(replace(_RIGHT, weigh=_of_choice)),),
    ),
    KernelFault(
        id="F15b",
        name="scores recovered by subtraction",
        does="weights made of (score + bias) - bias",
        needs="a bias far above the scores",
        threads=("flashinfer-ai/flashinfer/pull/3875",),
        forms=(_replaced(_recovered),),
    ),
    KernelFault(
        id="F15c",
        name="sum of weights without its epsilon",
        does="weights divided by their sum alone: 0 / 0 where all scores vanish",
        needs="logits near -100",
        threads=("flashinfer-ai/flashinfer/pull/3803", "vllm-project/vllm/issues/47367"),
        forms=(_replaced(replace(_RIGHT, epsilon=0.0)),),
    ),
    KernelFault(
        id="F15d",
        name="routed scaling factor missing or twice",
        does="weights times 1, or times the factor squared",
        needs="a factor other than 1",
        threads=(
            "vllm-project/vllm/pull/24119",
            "vllm-project/vllm/issues/24118",
            "vllm-project/vllm/pull/45037",
            "sgl-project/sglang/pull/8333",
            "sgl-project/sglang/pull/8511",
        ),
        forms=(
            _around(partial(_scaled, 0), "missing"),
            _around(partial(_scaled, 2), "twice"),
        ),
    ),
    KernelFault(
        id="F15e",
        name="weights normalised otherwise",
        does="weights normalised over all experts before the choice, or not at all",
        needs="any logits",
        threads=("vllm-project/vllm/pull/43223", "flashinfer-ai/flashinfer/pull/2049"),
        forms=(
            _replaced(replace(_RIGHT, weigh=_of_all, normalize=False), "before the choice"),
            _replaced(replace(_RIGHT, normalize=False), "not at all"),
        ),
    ),
    KernelFault(
        id="F15g",
        name="weight of the next expert",
        does="the weight of one chosen expert goes to the next",
        needs="weights that differ",
        threads=(),
        forms=(_around(_next_weight),),
    ),
)
