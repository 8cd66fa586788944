"""How far a run is, in bytes: what was read and what is left."""

from dataclasses import dataclass

from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.forward.inventory import HEAD, Inventory
from nvfp4ref.deepseek_v3.config import DeepseekV3Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How far a run is."""

    #: The layer being computed; `stop` once all are done.
    layer: int
    stop: int
    bytes_read: int
    #: In all, with as many experts as tokens spread evenly would reach.
    bytes_expected: int


class Reach:
    """Reckons how much is left to read."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DeepseekV3Config,
        begin: int,
        stop: int,
        tokens: int,
    ) -> None:
        self.layer = begin
        self._stop = stop
        untouched = (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens
        self._sizes: list[int] = []
        for layer in range(stop):
            inventory = Inventory(layer, config)
            names = inventory.all_names(config.n_routed_experts)
            fixed = sum(checkpoint.weights[name].nbytes for name in inventory.names)
            experts = sum(checkpoint.weights[name].nbytes for name in names) - fixed
            self._sizes.append(fixed + int(experts * (1 - untouched)))
        whole = stop == config.num_hidden_layers
        self._head = checkpoint.weights[HEAD].nbytes if whole else 0

    def step(self, bytes_read: int) -> Step:
        """Return how far the run is after so many bytes."""
        left = sum(self._sizes[self.layer + 1 :]) + (self._head if self.layer < self._stop else 0)
        return Step(
            layer=self.layer,
            stop=self._stop,
            bytes_read=bytes_read,
            bytes_expected=bytes_read + left,
        )
