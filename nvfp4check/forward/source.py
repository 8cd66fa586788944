"""The weights of a checkpoint as the reference asks for them, announced before they are used."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.values import scalar_of
from nvfp4check.findings import CheckError
from nvfp4check.forward.inventory import EXPERT_PARTS, Inventory
from nvfp4check.forward.linears import LinearSettings, StreamedLinear
from nvfp4check.forward.meter import Meter
from nvfp4check.forward.reading import ReadAhead, as_stored
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import Linear
from nvfp4ref.deepseek_v3.model import DecoderLayerWeights
from nvfp4ref.deepseek_v3.moe import ExpertOutputs, Experts, MlpWeights, MoeWeights
from nvfp4ref.deepseek_v3.mtp import MtpLayerWeights
from nvfp4ref.deepseek_v3.weights import layer_weights, mlp_weights, mtp_layer_weights

#: How the experts of a prefix are computed elsewhere, and what is called when that begins.
Spread = Callable[[str, Callable[[], None]], ExpertOutputs]


class StreamedSource:
    """Weights by their names, read when they are used and ahead of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DeepseekV3Config,
        reader: ReadAhead,
        settings: LinearSettings,
        meter: Meter,
        spread: Spread | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._reader = reader
        self._settings = settings
        self._meter = meter
        self._spread = spread
        self._announced: set[int] = set()
        self._k_scales = [
            (name, weight.parts[Part.K_SCALE])
            for name, weight in checkpoint.weights.items()
            if weight.format is WeightFormat.KV_SCALE and Part.K_SCALE in weight.parts
        ]
        #: Called when the experts of the layer at hand have been announced.
        self._then: Callable[[], None] = lambda: None

    def layer(self, layer: int, following: int | None) -> DecoderLayerWeights:
        """Return a layer's weights, and read on into the following one while it is computed."""
        self._begin(layer, following)
        return self._ready(layer, layer_weights(self, layer, self._config))

    def mtp_layer(self, layer: int, following: int | None) -> MtpLayerWeights:
        """Return the weights of a layer of multi-token prediction, in the same way."""
        self._begin(layer, following)
        weights = mtp_layer_weights(self, layer, self._config)
        return replace(weights, block=self._ready(layer, weights.block))

    def _begin(self, layer: int, following: int | None) -> None:
        self._announce(layer)
        self._then = (lambda: None) if following is None else (lambda: self._announce(following))

    def _ready(self, layer: int, weights: DecoderLayerWeights) -> DecoderLayerWeights:
        """Return the weights with their experts computed where they are to be."""
        prefix = Inventory(layer, self._config).expert_prefix
        if prefix is None:
            self._then()
        elif self._spread is not None and isinstance(weights.mlp, MoeWeights):
            outputs = self._spread(prefix, self._then)
            weights = replace(weights, mlp=replace(weights.mlp, outputs=outputs))
        return weights

    def cache_scale(self, layer: int) -> float:
        """Return the decode scale of an FP8 cache, 1.0 where the checkpoint has none."""
        prefix = f"model.layers.{layer}.self_attn."
        entry = next((entry for name, entry in self._k_scales if name.startswith(prefix)), None)
        if entry is None:
            return 1.0
        try:
            scale = scalar_of(self._checkpoint.tensor_bytes(entry), entry)
        except ValueError as error:
            raise CheckError(str(error)) from error
        if not 0 < scale < float("inf"):
            raise CheckError(f"{entry.name}: {scale}, expected a positive number; run validate")
        return scale

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as stored."""
        weight = self.weight(name)
        entry = weight.parts[Part.PLAIN]
        return as_stored(self._reader.take(weight)[Part.PLAIN], entry).to(self._settings.device)

    def linear(self, module: str) -> Linear:
        """Return the weight of a linear layer, in whatever format it is stored."""
        return StreamedLinear(
            self.weight(f"{module}.weight"),
            self._reader,
            self._settings,
            self._meter,
            kept=module.endswith("kv_b_proj"),  # once for each prompt
        )

    def experts(self, prefix: str) -> Experts:
        """Return the experts `<prefix>.<index>.gate_proj` and so on, read one after the other."""

        def weights_of(chosen: Sequence[int]) -> Iterator[MlpWeights]:
            self._reader.announce(
                self.weight(f"{prefix}.{expert}.{part}.weight")
                for expert in chosen
                for part in EXPERT_PARTS
            )
            self._then()
            for expert in chosen:
                yield mlp_weights(self, f"{prefix}.{expert}")

        return weights_of

    def weight(self, name: str) -> LogicalWeight:
        """Return a logical weight by its name."""
        return self._checkpoint.weights[name]

    def _announce(self, layer: int) -> None:
        if layer not in self._announced:
            self._announced.add(layer)
            names = Inventory(layer, self._config).names
            self._reader.announce(self.weight(name) for name in names)
