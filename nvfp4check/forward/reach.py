"""How far a run is, in bytes: what was read and what is left."""

from collections.abc import Sequence
from dataclasses import dataclass

from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.forward.inventory import HEAD, Ends, Inventory
from nvfp4ref.deepseek_v3.config import DeepseekV3Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How far a run is."""

    #: What is being computed, and of how many layers.
    what: str
    bytes_read: int
    #: In all, with as many experts as tokens spread evenly would reach.
    bytes_expected: int


class Reach:
    """Reckons how much is left to read.

    `layers` are those still to be computed; `predictors`, those of multi-token prediction, come
    after the head.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DeepseekV3Config,
        layers: range,
        predictors: Sequence[int],
        tokens: int,
    ) -> None:
        self._stop = layers.stop
        #: Fraction of the experts that no token is expected to be routed to.
        self._untouched = (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens
        self._checkpoint = checkpoint
        self._config = config
        #: Bytes by what comes in turn.
        self._stages = {f"Layer {layer}/{layers.stop}": self._layer(layer) for layer in layers}
        if layers.stop == config.num_hidden_layers:
            self._stages["Head"] = checkpoint.weights[HEAD].nbytes
        for layer in predictors:
            head = checkpoint.weights[Ends.of_mtp(layer).head].nbytes
            self._stages[f"MTP layer {layer}"] = self._layer(layer) + head
        self._at = next(iter(self._stages), "")

    def _layer(self, layer: int) -> int:
        weights = self._checkpoint.weights
        inventory = Inventory(layer, self._config)
        fixed = sum(weights[name].nbytes for name in inventory.names)
        names = inventory.all_names(self._config.n_routed_experts)
        experts = sum(weights[name].nbytes for name in names) - fixed
        return fixed + int(experts * (1 - self._untouched))

    def at_layer(self, layer: int) -> None:
        """Hear that a layer is begun."""
        self._at = f"Layer {layer}/{self._stop}" if layer < self._stop else f"MTP layer {layer}"

    def at_head(self) -> None:
        """Hear that the head is begun."""
        self._at = "Head"

    def step(self, bytes_read: int) -> Step:
        """Return how far the run is after so many bytes."""
        names = list(self._stages)
        left = sum(self._stages[name] for name in names[names.index(self._at) + 1 :])
        return Step(what=self._at, bytes_read=bytes_read, bytes_expected=bytes_read + left)
