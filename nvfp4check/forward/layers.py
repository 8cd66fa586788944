"""One layer of a run: computed, moved or steered as the options say, recorded and looked at."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from nvfp4check.activations import HIDDEN, ROUTER_POINTS, Run
from nvfp4check.findings import CheckError
from nvfp4check.forward.bounds.arithmetic import Roundings
from nvfp4check.forward.bounds.layer import LayerBounds, given
from nvfp4check.forward.bounds.pointwise import norm
from nvfp4check.forward.bounds.predictor import PredictorBounds
from nvfp4check.forward.noise import perturbed
from nvfp4check.forward.options import Activations, ForwardOptions
from nvfp4check.forward.source import StreamedSource
from nvfp4check.layer_inputs import LayerInputs
from nvfp4ref.deepseek_v3.cache import CacheFormat, LatentCache
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.model import decoder_layer, empty_caches
from nvfp4ref.deepseek_v3.moe import Record
from nvfp4ref.deepseek_v3.mtp import mtp_layer
from nvfp4ref.deepseek_v3.norm import rms_norm

#: Computes a layer: from empty caches, forced experts and who hears of its points, the new state.
_Compute = Callable[[Sequence[LatentCache], torch.Tensor | None, Record], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A layer that was computed."""

    #: The state after it, [T, D].
    hidden: torch.Tensor
    #: What was recorded, by `<prompt>/<point>`.
    points: dict[str, torch.Tensor]
    bounds: LayerBounds | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """A layer of multi-token prediction that was computed."""

    computed: Computed
    bounds: PredictorBounds | None


@dataclass
class _Points:
    """Collects the recorded points of one layer, split by prompt."""

    lengths: Mapping[str, int]
    kept: Activations
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    #: What the router chose by, kept or not.
    router_scores: torch.Tensor | None = None

    def record(self, point: str, value: torch.Tensor) -> None:
        if point == "router_scores":
            self.router_scores = value
        wanted = self.kept is Activations.ALL or (
            self.kept is Activations.HIDDEN and point in (HIDDEN, *ROUTER_POINTS)
        )
        if wanted:
            parts = torch.split(value, list(self.lengths.values()))
            for prompt, part in zip(self.lengths, parts, strict=True):
                self.tensors[f"{prompt}/{point}"] = part


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What all layers of a run have in common."""

    config: DeepseekV3Config
    options: ForwardOptions
    cache_format: CacheFormat
    device: torch.device
    source: StreamedSource
    #: The run whose experts are forced.
    forced: Run | None
    #: The run whose states each layer begins with.
    inputs: LayerInputs | None
    #: What candidates may round, where bounds are asked for.
    roundings: Roundings | None

    def decoder(
        self, hidden: torch.Tensor, layer: int, following: int | None, lengths: Mapping[str, int]
    ) -> Computed:
        """Compute a decoder layer over packed prompts; `following` is read ahead meanwhile."""
        if layer:
            hidden = self._begun(hidden, layer, lengths)
        rows = list(lengths.values())
        bounds: LayerBounds | None = None

        def compute(
            caches: Sequence[LatentCache], forced: torch.Tensor | None, record: Record
        ) -> torch.Tensor:
            nonlocal bounds
            weights = self.source.layer(layer, following)
            if self.roundings is not None:
                scale = self._cache_scale(caches)
                bounds = LayerBounds(rows, weights, self.config, self.roundings, scale)
                bounds.begin(hidden)
                weights, record = bounds.weights, _both(record, bounds.record)
            return decoder_layer(
                hidden, caches, rows, weights, self.config, forced_experts=forced, record=record
            )[0]

        return replace(self._computed(layer, lengths, compute), bounds=bounds)

    def predictor(
        self,
        state: torch.Tensor,
        before: torch.Tensor,
        embedded: torch.Tensor,
        layer: int,
        following: int | None,
        lengths: Mapping[str, int],
    ) -> Predicted:
        """Compute a layer of multi-token prediction.

        `state` is that before it and `before` the weight of the norm that belongs to it: the
        trunk's last, or that of the layer before.
        """
        state = self._begun(state, layer, lengths)
        hidden = rms_norm(state, before, self.config.rms_norm_eps)
        bounds: PredictorBounds | None = None

        def compute(
            caches: Sequence[LatentCache], forced: torch.Tensor | None, record: Record
        ) -> torch.Tensor:
            nonlocal bounds
            weights = self.source.mtp_layer(layer, following)
            rows = list(lengths.values())
            roundings, eps = self.roundings, self.config.rms_norm_eps
            if roundings is not None:
                known = norm(given(state, roundings), before, eps, hidden, roundings)
                scale = self._cache_scale(caches)
                bounds = PredictorBounds(
                    known, embedded, rows, weights, self.config, roundings, scale
                )
                weights, record = bounds.weights, _both(record, bounds.record)
            return mtp_layer(
                *(hidden, embedded, caches, rows, weights, self.config),
                forced_experts=forced,
                record=record,
            )[0]

        computed = self._computed(layer, lengths, compute)
        return Predicted(computed=computed, bounds=bounds)

    def _begun(self, hidden: torch.Tensor, layer: int, lengths: Mapping[str, int]) -> torch.Tensor:
        """Return what a layer begins with: its state, or another run's where that is given."""
        if self.inputs is None:
            return hidden
        rows = [self.inputs.rows(layer, prompt)[:n] for prompt, n in lengths.items()]
        return torch.cat(rows).to(self.device, hidden.dtype)

    def _cache_scale(self, caches: Sequence[LatentCache]) -> float | None:
        return caches[0].scale if self.cache_format is CacheFormat.FP8 else None

    def _computed(self, layer: int, lengths: Mapping[str, int], compute: _Compute) -> Computed:
        points = _Points(lengths, self.options.activations)
        scaled = self.cache_format is CacheFormat.FP8
        caches = empty_caches(
            len(lengths),
            self.config,
            self.options.arithmetic.dtype,
            self.cache_format,
            self.source.cache_scale(layer) if scaled else 1.0,
            self.device,
        )
        hidden = compute(caches, self._forced_experts(layer, lengths), points.record)
        if self.options.perturbation is not None:
            hidden = self._perturbed(hidden, layer, lengths)
            points.record(HIDDEN, hidden)
        _check_finite(hidden, f"layer {layer}: the state after it", lengths)
        if points.router_scores is not None:  # a choice by NaN looks like any other
            _check_finite(points.router_scores, f"layer {layer}: the router's scores", lengths)
        return Computed(hidden=hidden, points=points.tensors)

    def _perturbed(
        self, hidden: torch.Tensor, layer: int, lengths: Mapping[str, int]
    ) -> torch.Tensor:
        perturbation, seed = self.options.perturbation, self.options.seed
        if perturbation is None:
            return hidden
        parts = torch.split(hidden, list(lengths.values()))
        return torch.cat(
            [
                perturbed(part, perturbation, seed, layer, prompt)
                for prompt, part in zip(lengths, parts, strict=True)
            ]
        )

    def _forced_experts(self, layer: int, lengths: Mapping[str, int]) -> torch.Tensor | None:
        if self.forced is None or not self.config.is_moe(layer):
            return None
        experts = torch.cat(
            [self.forced.point(layer, prompt, "router_experts") for prompt in lengths]
        )
        expected = (sum(lengths.values()), self.config.num_experts_per_tok)
        if tuple(experts.shape) != expected or not (
            int(experts.min()) >= 0 and int(experts.max()) < self.config.n_routed_experts
        ):
            raise CheckError(
                f"{self.forced.layer_file(layer)}: router_experts {list(experts.shape)} up to "
                f"{int(experts.max())}, expected {list(expected)} below "
                f"{self.config.n_routed_experts}"
            )
        return experts.to(self.device)


def _both(first: Record, second: Record) -> Record:
    """Return what lets both hear of a point."""

    def record(point: str, value: torch.Tensor) -> None:
        first(point, value)
        second(point, value)

    return record


def _check_finite(values: torch.Tensor, what: str, lengths: Mapping[str, int]) -> None:
    bad = ~values.isfinite().all(dim=-1)
    if not bad.any():
        return
    parts = torch.split(bad, list(lengths.values()))
    prompt, token = next(
        (prompt, int(part.nonzero()[0]))
        for prompt, part in zip(lengths, parts, strict=True)
        if part.any()
    )
    raise CheckError(
        f"{what}: not finite for {int(bad.sum())} of {len(bad)} tokens, first prompt {prompt!r}, "
        f"token {token}; `nvfp4check validate` looks for the weight"
    )
