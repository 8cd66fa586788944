"""The feed-forward half of a layer: the dense MLP, and the mixture of experts.

T tokens, D = hidden_size, E experts, k experts a token.

Contract:
    mlp      down_proj(silu(gate_proj(x)) * up_proj(x)); silu and product in float32 (float64 for
             float64), rounded once to the dtype of x, as fused kernels do
    router   logits = x W^T in float32 (float64 for float64), never rounded below; `routing` has
             the rest
    experts  sum over the chosen experts, by rising index, of weight * mlp(x), and the shared
             expert's mlp(x) last; summed in float32 (float64), rounded once to the dtype of x
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from nvfp4ref.deepseek_v3 import routing
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import Linear
from nvfp4ref.deepseek_v3.norm import arithmetic

#: Hears of intermediate results: the name of a point, and its value with one row a token.
Record = Callable[[str, torch.Tensor], None]


def ignore(point: str, value: torch.Tensor) -> None:
    """Record nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """A dense MLP, one expert, or the shared expert."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear


#: Gives the weights of the experts asked for, in the order asked; may read them as it goes.
Experts = Callable[[Sequence[int]], Iterable[MlpWeights]]

#: Gives the output of each chosen expert for its tokens, in the order of the mapping: of experts,
#: x [T, D] and the tokens that go to each.
ExpertOutputs = Callable[
    [Experts, torch.Tensor, Mapping[int, torch.Tensor]], Iterable[torch.Tensor]
]


def in_turn(
    experts: Experts, x: torch.Tensor, tokens: Mapping[int, torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Yield the outputs of the chosen experts, one after the other."""
    for token, weights in zip(tokens.values(), experts(list(tokens)), strict=True):
        yield mlp(x[token], weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateWeights:
    """The router."""

    #: [E, D]
    weight: torch.Tensor
    #: float32 [E]
    e_score_correction_bias: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeWeights:
    """`mlp` of a layer with experts."""

    gate: GateWeights
    experts: Experts
    shared_experts: MlpWeights | None
    #: How the experts are gone through; whoever has more than one computer does it otherwise.
    outputs: ExpertOutputs = in_turn


def mlp(x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
    """Return the output [T, D] of a gated MLP."""
    wide = arithmetic(x.dtype)
    gate, up = weights.gate_proj(x), weights.up_proj(x)
    hidden = torch.nn.functional.silu(gate.to(wide)) * up.to(wide)
    return weights.down_proj(hidden.to(x.dtype))


def moe(
    x: torch.Tensor,
    weights: MoeWeights,
    config: DeepseekV3Config,
    forced_experts: torch.Tensor | None = None,
    record: Record = ignore,
) -> torch.Tensor:
    """Return the output [T, D] of a mixture of experts.

    `forced_experts` [T, k] takes the place of the router's choice; the weights are still its own.
    """
    wide = arithmetic(x.dtype)
    logits = x.to(wide) @ weights.gate.weight.to(wide).T  # (T, E)
    scores = routing.choice_scores(logits, weights.gate.e_score_correction_bias)
    if forced_experts is None:
        experts = routing.choose(
            scores, config.n_group, config.topk_group, config.num_experts_per_tok
        )
    else:
        experts = forced_experts.to(torch.int32)
    expert_weights = routing.weigh(
        logits, experts, config.routed_scaling_factor, normalize=config.norm_topk_prob
    )
    record("router_scores", scores)
    record("router_experts", experts)
    record("router_weights", expert_weights)

    total = torch.zeros(x.shape, dtype=wide, device=x.device)
    chosen = sorted(set(experts.flatten().tolist()))
    places = {expert: (experts == expert).nonzero(as_tuple=True) for expert in chosen}
    tokens = {expert: token for expert, (token, _) in places.items()}
    outputs = weights.outputs(weights.experts, x, tokens)
    for (token, slot), output in zip(places.values(), outputs, strict=True):
        total[token] += expert_weights[token, slot].unsqueeze(1) * output.to(wide)
    if weights.shared_experts is not None:
        total += mlp(x, weights.shared_experts).to(wide)
    return total.to(x.dtype)
