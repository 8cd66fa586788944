"""What the prompts at hand cannot see, whatever the candidate does.

A comparison that agrees says nothing about what no token exercised. Each entry names a fault that
would leave these prompts' numbers as they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nvfp4check.activations import Run
from nvfp4check.agreement.routing import LayerRouting


@dataclass(frozen=True, slots=True, kw_only=True)
class Blind:
    """A kind of fault that stays unseen, and why."""

    what: str
    why: str


def blind_spots(
    reference: Run, prompts: tuple[str, ...], routing: Sequence[LayerRouting]
) -> Iterator[Blind]:
    """Say which faults the reference's prompts do not exercise."""
    lengths = [info.tokens for info in reference.info.prompts if info.id in prompts]
    yield from _positions(lengths, reference.info.config)
    yield from _scaling(reference.info.config)
    yield from _routing(reference, prompts)
    yield from _experts(routing)
    yield from _cache(reference)


def _positions(lengths: Sequence[int], config: dict[str, Any]) -> Iterator[Blind]:
    longest = max(lengths, default=0)
    if longest <= 1:
        yield Blind(
            what="rotary pairs, the softmax scale with its mscale, the causal mask",
            why="every prompt is one token: at position 0 no angle is turned and the only weight "
            "of the softmax is 1",
        )
    scaling = _rope_scaling(config)
    original = scaling.get("original_max_position_embeddings")
    if isinstance(original, int) and longest <= original:
        yield Blind(
            what="behaviour beyond the original length (YaRN's range, long caches)",
            why=f"the longest prompt has {longest} tokens, and YaRN starts from {original}",
        )


def _rope_scaling(config: dict[str, Any]) -> dict[str, Any]:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return scaling if isinstance(scaling, dict) else {}


def _scaling(config: dict[str, Any]) -> Iterator[Blind]:
    scaling = _rope_scaling(config)
    both = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if both[0] is not None and both[0] == both[1]:
        yield Blind(
            what="mscale taken for mscale_all_dim",
            why=f"the configuration has {both[0]} for both",
        )


def _routing(reference: Run, prompts: tuple[str, ...]) -> Iterator[Blind]:
    layers = [
        layer
        for layer in reference.own_layers
        if {"router_scores", "router_experts"} <= set(reference.points(layer))
    ]
    n_group = reference.info.config.get("n_group")
    if not layers or not isinstance(n_group, int) or n_group < 2:
        return
    # A masked group at 0.0 is only chosen over a score below 0.
    seeing = [layer for layer in layers if _least_chosen(reference, layer, prompts) < 0]
    if not seeing:
        yield Blind(
            what="masked expert groups filled with 0.0 in place of -inf",
            why="every chosen expert has a positive score: the bias is positive enough at all "
            f"{len(layers)} layers with experts",
        )
    elif len(seeing) < len(layers):
        missing = [layer for layer in layers if layer not in seeing]
        yield Blind(
            what="masked expert groups filled with 0.0 in place of -inf, at layers "
            f"{', '.join(map(str, missing))}",
            why="every chosen expert has a positive score there",
        )


def _least_chosen(reference: Run, layer: int, prompts: tuple[str, ...]) -> float:
    least = float("inf")
    for prompt in prompts:
        scores = reference.point(layer, prompt, "router_scores")
        experts = reference.point(layer, prompt, "router_experts").long()
        if experts.numel():
            least = min(least, float(scores.gather(1, experts).min()))
    return least


def _experts(routing: Sequence[LayerRouting]) -> Iterator[Blind]:
    idle = sum(len(layer.load_reference) - layer.exercised for layer in routing)
    if idle:
        total = sum(len(layer.load_reference) for layer in routing)
        yield Blind(
            what=f"the weights, scales and alphas of {idle} of {total} experts",
            why="no token of these prompts was routed to them",
        )


def _cache(reference: Run) -> Iterator[Blind]:
    if reference.info.kv_cache == "none":
        yield Blind(
            what="the format and scales of the KV cache",
            why="the reference was computed with --kv-cache none",
        )
