"""Which experts a token goes to, and with what weights.

T tokens, E experts in n_group groups, k experts a token.

Contract:
    scores       sigmoid of the logits
    choice       by score + bias: a group counts the sum of its two best; all groups but the best
                 topk_group are masked with -inf (not 0.0: a choice score may be negative); the
                 top k of the rest are chosen
    weights      the scores without the bias, divided by their sum + 1e-20, times the scaling
    ties         go to the lower index, of groups and of experts
    arithmetic   float32, or float64 where the logits are float64; the bias stays float32
    order        experts stand by falling choice score; the order carries no meaning

transformers 4.x casts the bias to bfloat16 on load, and masks with 0.0 up to 5.5.4.
Sources: DeepSeek-V3 technical report, equations 12 to 16; inference/model.py, class Gate.
"""

import torch


def choice_scores(logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return what experts are chosen by, sigmoid(logits) + bias, [T, E]."""
    return logits.sigmoid() + bias


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the largest scores along the last dimension, ties to the lower."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def choose(scores: torch.Tensor, n_group: int, topk_group: int, top_k: int) -> torch.Tensor:
    """Return the experts of each token, int32 [T, k], by choice scores [T, E].

    Raises:
        ValueError: The experts do not divide into groups, or too few stand open.
    """
    experts = scores.shape[-1]
    if experts % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(f"{experts} experts, {topk_group} of {n_group} groups: not a division")
    size = experts // n_group
    if not 1 <= top_k <= topk_group * size or (n_group > 1 and size < 2):
        raise ValueError(f"{top_k} experts a token from {topk_group} groups of {size}")
    if n_group > 1:
        grouped = scores.reshape(-1, n_group, size)  # (T, n_group, E / n_group)
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        open_groups = torch.zeros_like(group_scores, dtype=torch.bool)
        open_groups.scatter_(-1, _top(group_scores, topk_group), True)
        scores = grouped.masked_fill(~open_groups.unsqueeze(-1), float("-inf")).flatten(-2)
    return _top(scores, top_k).to(torch.int32)


def weigh(
    logits: torch.Tensor, experts: torch.Tensor, scaling: float, *, normalize: bool = True
) -> torch.Tensor:
    """Return the weight of each chosen expert, [T, k]."""
    weights = logits.sigmoid().gather(-1, experts.long())
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * scaling


def route(
    logits: torch.Tensor,
    bias: torch.Tensor,
    n_group: int,
    topk_group: int,
    top_k: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return experts int32 [T, k] and weights [T, k] of router logits [T, E].

    Raises:
        ValueError: The experts do not divide into groups, or too few stand open.
    """
    experts = choose(choice_scores(logits, bias), n_group, topk_group, top_k)
    return experts, weigh(logits, experts, scaling)
