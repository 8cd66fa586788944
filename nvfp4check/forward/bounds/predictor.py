"""Bounds of a layer of multi-token prediction, from the state before it to the logits after it.

T rows, D width, V vocabulary; W = eh_proj [D, 2 D], its input the two norms side by side.

Contract:
    input       the golden's state before the layer, as it was recorded before its norm, and the
                embedding of the tokens: both as a candidate is given them (`layer`)
    eh_proj     a product like any other, but for what a norm gives to its whole half: that goes
                through as the product of the half, e (W_half x_half), and adds up as a variance.
                Ranks may split its columns, so that the halves lie apart: R is the larger of the
                features' and of the halves' (`parallel`)
    layer       as any decoder layer with experts, which begins with what eh_proj gave
    head        the norm, then a product whose columns are taken a few at a time, as they are
                computed; the norm of a row's error over all of them
    points      eh_proj, those of the layer, final_hidden and, where logits are computed, logits
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from nvfp4check.forward.bounds.arithmetic import KINDS, Roundings
from nvfp4check.forward.bounds.layer import LayerBounds, given
from nvfp4check.forward.bounds.linear import (
    InputForm,
    Operands,
    Passed,
    SquaringLinear,
    through,
)
from nvfp4check.forward.bounds.parallel import of_linear, split
from nvfp4check.forward.bounds.pointwise import norm
from nvfp4check.forward.bounds.uncertain import Uncertain, deviation, through_matrix
from nvfp4check.forward.bounds.watched import Watched
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.mtp import MtpLayerWeights


class PredictorBounds:
    """Follows one layer of multi-token prediction, and its head."""

    def __init__(
        self,
        before: Uncertain,
        embedded: torch.Tensor,
        lengths: Sequence[int],
        weights: MtpLayerWeights,
        config: DeepseekV3Config,
        roundings: Roundings,
        cache_scale: float | None,
    ) -> None:
        """Begin with the normed state before the layer and the tokens' embedding, both [T, D]."""
        self._before = before
        self._embedded = embedded
        self._plain = weights
        self._eps = config.rms_norm_eps
        self._roundings = roundings
        self._layer = LayerBounds(lengths, weights.block, config, roundings, cache_scale)
        self._joined: Uncertain | None = None
        self._final: Uncertain | None = None
        self._logits = torch.zeros(len(roundings), KINDS, len(embedded), dtype=torch.float64)
        self.bounds: dict[str, torch.Tensor] = {}
        self.settled: torch.Tensor | None = None
        self.straddles = self._layer.straddles

    @property
    def uncached(self) -> torch.Tensor | None:
        """Where an FP8 cache that keeps values errs, [A, T, D]; None without one."""
        return self._layer.uncached

    @property
    def weights(self) -> MtpLayerWeights:
        """The layer's weights, watched."""
        eh_proj = Watched(self._plain.eh_proj, self._joining, "eh_proj")
        return replace(self._plain, eh_proj=eh_proj, block=self._layer.weights)

    def record(self, point: str, value: torch.Tensor) -> None:
        """Hear of a point of the layer."""
        if point == "eh_proj":
            if self._joined is None:
                raise RuntimeError("eh_proj was recorded before it was computed")
            self._layer.begin(value, self._joined)
            self.bounds[point] = self._joined.bound
        else:
            self._layer.record(point, value)
            self.bounds.update(self._layer.bounds)
            self.settled = self._layer.settled

    def normed(self, weight: torch.Tensor, value: torch.Tensor) -> None:
        """Hear of the state after the layer's last norm."""
        self._final = norm(self._layer.after, weight, self._eps, value, self._roundings)
        self.bounds["final_hidden"] = self._final.bound

    def logits(self, role: str, linear: SquaringLinear, x: torch.Tensor, y: torch.Tensor) -> None:
        """Hear of the logits of a part of the vocabulary."""
        if self._final is None:
            raise RuntimeError("logits were computed before the norm")
        passed = through(linear, self._final, y, self._roundings, Operands())
        self._logits += passed.output.total.sum(-1).to(self._logits.device)
        self.bounds["logits"] = deviation(self._logits)

    def _joining(self, role: str, linear: SquaringLinear, x: torch.Tensor, y: torch.Tensor) -> None:
        """Hear of the product of both norms."""
        roundings, eps, width = self._roundings, self._eps, self._embedded.shape[-1]
        parts = (slice(0, width), slice(width, None))
        token = given(self._embedded, roundings)
        halves = [
            norm(state, weight, eps, x[:, part], roundings)
            for state, weight, part in zip(
                (token, self._before), (self._plain.enorm, self._plain.hnorm), parts, strict=True
            )
        ]
        plain = linear.input().form is InputForm.PLAIN
        none = torch.zeros_like(halves[0].common)
        variances = [half.variance if plain else half.total for half in halves]
        both = Uncertain(x.double(), torch.cat(variances, dim=-1), none)
        passed = through(linear, both, y, roundings, Operands())
        self._layer.straddles += passed.straddles
        found = passed.output
        if plain:
            for half, part in zip(halves, parts, strict=True):
                alone = torch.zeros_like(x)
                alone[:, part] = x[:, part]
                of_half = half.common.unsqueeze(-1) * linear(alone).double().square()
                found = found.plus(through_matrix(of_half, torch.ones_like(found.value)))
        if split(roundings):
            found = found.plus(self._over_ranks(linear, x, passed))
        self._joined = found

    def _over_ranks(self, linear: SquaringLinear, x: torch.Tensor, passed: Passed) -> torch.Tensor:
        value = passed.output.value
        of_halves = linear.squares_by_part(x.float(), 2).double()
        return torch.maximum(
            of_linear(self._roundings, value, passed.squares, x.shape[-1]),
            of_linear(self._roundings, value, of_halves, 2),
        )
