"""What a difference of weights does to the output of their linear.

Contract:
    y = W x. With inputs whose elements are uncorrelated and have second moments m_k, the relative
    error of the output is sqrt(sum_k m_k sum_n d_nk**2 / sum_k m_k sum_n w_nk**2), d = b - a and
    w = a. Without recorded activations all m_k are 1: the relative Frobenius norm.
    Moments are those of a run's attn_input (q_a_proj, q_proj, kv_a_proj_with_mqa), mlp_input (gate,
    up, the router) and final hidden state (lm_head). An expert's own tokens are not told apart from
    its layer's.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from nvfp4check.activations import Run
from nvfp4check.checkpoint.diff.measured import Array, Measured
from nvfp4check.checkpoint.diff.operands import Stored
from nvfp4check.checkpoint.diff.values_pair import compare_values

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)\.weight$")
_BY_POINT = {
    "attn_input": ("q_a_proj", "q_proj", "kv_a_proj_with_mqa", "k_proj", "v_proj"),
    "mlp_input": ("gate_proj", "up_proj", "gate", "gate_up_proj"),
}
_POINT_OF = {leaf: point for point, leaves in _BY_POINT.items() for leaf in leaves}
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of the inputs of linears, by layer and point; -1 is the head's."""

    by_place: Mapping[tuple[int, str], Array] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Name the state of all moments."""
        digest = hashlib.sha256()
        for place, moments in sorted(self.by_place.items()):
            digest.update(repr(place).encode())
            digest.update(moments.tobytes())
        return digest.hexdigest()

    def of(self, name: str, columns: int) -> Array | None:
        """Find the moments of the input of a weight."""
        place = place_of(name)
        found = self.by_place.get(place) if place is not None else None
        return found if found is not None and found.size == columns else None


def place_of(name: str) -> tuple[int, str] | None:
    """Say where the input of a weight is recorded, or None where it is not."""
    if name == _HEAD or name.endswith("." + _HEAD):
        return -1, "final_hidden"
    placed = _LAYER.search(name)
    point = _POINT_OF.get(placed[2].rpartition(".")[2]) if placed else None
    return (int(placed[1]), point) if placed and point else None


def read_moments(run: Run) -> Moments:
    """Average the squares of a run's inputs, over all tokens of all prompts.

    Raises:
        CheckError: The run cannot be read.
    """
    found: dict[tuple[int, str], Array] = {}
    for layer in run.layers:
        for point in _BY_POINT:
            if point in run.points(layer):
                tensors = [run.point(layer, prompt, point) for prompt in run.prompts]
                found[layer, point] = _mean_square([t.double().numpy() for t in tensors])
    if run.has_final_hidden:
        hidden = [run.final_hidden(prompt).double().numpy() for prompt in run.prompts]
        found[-1, "final_hidden"] = _mean_square(hidden)
    return Moments(found)


def _mean_square(inputs: list[Array]) -> Array:
    total = sum((np.square(one).sum(axis=0) for one in inputs), np.zeros(inputs[0].shape[-1]))
    return np.asarray(total / max(1, sum(one.shape[0] for one in inputs)))


def output_error(
    a: Stored, b: Stored, found: Measured, moments: Moments | None
) -> tuple[float | None, bool]:
    """Predict the relative error of the output; say whether activations weighted it."""
    weights = moments.of(a.operand.weight.name, a.operand.columns) if moments else None
    if weights is None or found.energy_difference == 0:
        return found.relative_error, False
    columns = compare_values(a, b, columns=True).columns
    if columns is None:
        return found.relative_error, False
    energy, noise = (float((weights * sums).sum()) for sums in columns)
    return (math.sqrt(noise / energy), True) if energy > 0 else (None, True)
