"""Single tokens whose error no noise explains, which a mean over all tokens hides.

A token that went to other experts, or attends to one that did, may be far off by noise alone, and
one such token proves nothing. The others noise moves through smooth functions only, and the
logarithms of their errors scatter like those of any product: normally.

Contract:
    kept      a token whose experts, and those of all tokens before it in its prompt, are the
              reference's in every layer before; behind the router its own experts in this one, too.
              None is, where experts were not recorded though the configuration names some
    spread    m and s, mean and standard deviation of the logarithm of the errors of n kept tokens
              of the noise runs, of those above the unit roundoff
    outlier   a kept token whose error e exceeds by t s sqrt(1 + 1/n), in logarithms, both m and its
              own floor: the farthest that one more error of the noise may lie, by Student's
              quantile t of n - 1 degrees of freedom at 1 - alpha / (number of kept tokens)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nvfp4check.activations import ROUTER_EXPERTS, Run
from nvfp4check.agreement.layers import Place
from nvfp4check.agreement.quantile import student_t
from nvfp4check.agreement.routing import LayerRouting

#: Points that are computed with the chosen experts.
_BEHIND_ROUTER = ("router_weights", "mlp_output", "hidden")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlier:
    """Tokens that are farther off than noise makes any."""

    #: The first of them, and how many there are.
    place: Place
    tokens: int
    #: The largest error among them, and that of a kept token of the noise runs.
    error: float
    noise: float


@dataclass(frozen=True, slots=True)
class Kept:
    """Which tokens of a run went to the reference's experts all the way."""

    #: Tokens at other experts, by layer and prompt.
    flips: Mapping[tuple[int, str], frozenset[int]]
    #: The first layer behind which nothing is known of experts.
    known_until: float = math.inf

    @classmethod
    def of(cls, reference: Run, routing: Sequence[LayerRouting]) -> "Kept":
        """Return the tokens that kept to the experts of the reference."""
        flips: dict[tuple[int, str], frozenset[int]] = {}
        for layer in routing:
            for flip in layer.flips:
                key = layer.layer, flip.place.prompt
                flips[key] = flips.get(key, frozenset()) | {flip.place.token}
        config = reference.info.config
        routed = [n for n in reference.own_layers if ROUTER_EXPERTS in reference.points(n)]
        if not routed and (not config or any("expert" in name for name in config)):
            return cls(flips, -math.inf)
        compared = {layer.layer for layer in routing}
        return cls(flips, min((n for n in routed if n not in compared), default=math.inf))

    def tokens(self, layer: int, point: str, prompt: str, count: int) -> torch.Tensor:
        """Return which of a prompt's tokens are kept at a point, bool [count]."""
        behind = point in _BEHIND_ROUTER
        if layer > self.known_until or (behind and layer == self.known_until):
            return torch.zeros(count, dtype=torch.bool)
        before = [
            min(tokens) for (at, of), tokens in self.flips.items() if of == prompt and at < layer
        ]
        kept = torch.arange(count) < min(before, default=count)
        if behind:
            kept[sorted(self.flips.get((layer, prompt), frozenset()))] = False
        return kept


def outlier(
    errors: Mapping[str, torch.Tensor],
    runs: Mapping[str, torch.Tensor],
    kept: Mapping[str, torch.Tensor],
    kept_by_noise: Mapping[str, torch.Tensor],
    unit: float,
    alpha: float,
) -> Outlier | None:
    """Return the kept tokens that lie beyond what noise explains; None where none does.

    By prompt: `errors` [T] and `kept` [T] of the candidate, `runs` [noise runs, T] and
    `kept_by_noise` likewise. NaN and infinite errors are left out.
    """
    scatter = [runs[prompt][kept_by_noise[prompt] & runs[prompt].isfinite()] for prompt in runs]
    every = torch.cat(scatter) if scatter else torch.empty(0, dtype=torch.float64)
    noise = every[every > unit].log()
    usable = {prompt: kept[prompt] & errors[prompt].isfinite() for prompt in errors}
    count = sum(int(tokens.sum()) for tokens in usable.values())
    if len(noise) < 2 or not count:
        return None
    quantile = student_t(1 - alpha / count, len(noise) - 1)
    reach = quantile * float(noise.std()) * math.sqrt(1 + 1 / len(noise))
    beyond = {
        prompt: usable[prompt]
        & (error.log() - runs[prompt].log().mean(0).clamp(min=float(noise.mean())) > reach)
        for prompt, error in errors.items()
    }
    found = [(prompt, tokens) for prompt, tokens in beyond.items() if tokens.any()]
    if not found:
        return None
    prompt, tokens = found[0]
    return Outlier(
        place=Place(prompt=prompt, token=int(tokens.nonzero()[0])),
        tokens=sum(int(tokens.sum()) for _, tokens in found),
        error=max(float(errors[prompt][tokens].max()) for prompt, tokens in found),
        noise=float(every.max()),
    )
