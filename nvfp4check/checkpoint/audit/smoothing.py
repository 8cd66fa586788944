"""Columns that a producer smoothed before quantising: by which factors, and how exactly known.

Contract:
    smoothed   AWQ and SmoothQuant divide the columns of a weight W [N, K] by factors p [K] and
               multiply its input by them: at run time, where `pre_quant_scale` stores them, or in
               the weight of the norm before, n' = n * p, where it does not. The product is kept:
               what is audited is W / (p * n'/n)
    roundings  of half a unit in the last place of the stored dtype each, in ModelOpt: p; W / p;
               W again when the experts' factors are averaged, and when those of fused linears are;
               and n' where p is read from it. The steps between are float32, three for each.
               `slack` is the sum of their unit roundoffs: relative to an element, no producer can
               have gone farther from W / p
    gemma      multiplies by 1 + n: there p = (1 + n') / (1 + n)
"""

import re
from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nvfp4check.checkpoint.audit.numbers import ROUNDOFF
from nvfp4check.checkpoint.audit.sources import PLAIN_DTYPES, Reader
from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import LogicalWeight, Part
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.values import torch_of

_STORED_ROUNDINGS = 4
_NORM_ROUNDINGS = 5

_MLP = r"(?:mlp|block_sparse_moe)\.(?:experts\.\d+\.|shared_experts?\.)?"
#: Linears, and the norms whose output they may multiply: the first one that is there.
_FED_BY = tuple(
    (re.compile(linears), norms)
    for linears, *norms in (
        (
            r"(.*)\.self_attn\.(?:q_a_proj|kv_a_proj_with_mqa|q_proj|k_proj|v_proj|qkv_proj)",
            r"\1.input_layernorm",
        ),
        (
            rf"(.*)\.{_MLP}(?:gate_proj|up_proj|gate_up_proj|w1|w3|gate|shared_expert_gate)",
            r"\1.pre_feedforward_layernorm",  # of Gemma 2, where the other ends the attention
            r"\1.post_attention_layernorm",
        ),
        (r"(.*\.self_attn)\.q_b_proj", r"\1.q_a_layernorm"),
        (r"(.*\.self_attn)\.kv_b_proj", r"\1.kv_a_layernorm"),
    )
)

Factors = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Smoothing:
    """Where the factors of one weight stand."""

    scale: TensorEntry | None = None
    #: The norm before it, here and in the base, where they differ.
    norm: tuple[TensorEntry, TensorEntry] | None = None
    #: What the norm adds to its weight.
    offset: float = 0.0

    @property
    def without_norm(self) -> "Smoothing | None":
        """The same, where the norm's change is not undone in this weight."""
        return None if self.scale is None else Smoothing(self.scale)

    def factors(self, reader: Reader, base_reader: Reader, columns: int) -> Factors:
        """Read the factors by which the columns were divided.

        Raises:
            ValueError: They are not one positive, finite number a column.
            StorageError: They cannot be read.
        """
        found = np.ones(columns)
        if self.scale is not None:
            found = found * _values(reader, self.scale, columns)
        if self.norm is not None:
            mine = _values(reader, self.norm[0], columns) + self.offset
            theirs = _values(base_reader, self.norm[1], columns) + self.offset
            # A column that the norm multiplies by 0 counts for nothing, and cannot be told.
            with np.errstate(divide="ignore", invalid="ignore"):
                found = found * np.where((mine == 0) & (theirs == 0), 1.0, mine / theirs)
        if not bool((np.isfinite(found) & (found > 0)).all()):
            raise ValueError("its columns' factors are not all positive and finite")
        return found

    def slack(self, dtype: torch.dtype) -> float:
        """Return how far, relative to an element, roundings may have moved it."""
        roundings = _NORM_ROUNDINGS if self.norm is not None else _STORED_ROUNDINGS
        return roundings * (ROUNDOFF[dtype] + 3 * ROUNDOFF[torch.float32])


def norm_before(module: str, weights: Container[str]) -> str | None:
    """Name the weight of the norm whose output a linear multiplies, None where none is known."""
    for linears, norms in _FED_BY:
        match = linears.fullmatch(module)
        if match is not None:
            names = (f"{match.expand(norm)}.weight" for norm in norms)
            return next((name for name in names if name in weights), None)
    return None


class Smoothings:
    """Which weights of a checkpoint are smoothed, as far as its names and norms tell."""

    def __init__(self, checkpoint: Checkpoint, base: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._base = base
        self._readers = Reader(checkpoint), Reader(base)
        self._changed: dict[str, bool] = {}
        gemma = (checkpoint.architecture or "").startswith("Gemma")
        self._offset = 1.0 if gemma else 0.0

    def of(self, weight: LogicalWeight) -> Smoothing | None:
        """Say where a weight's factors stand, None where it was not smoothed.

        Raises:
            ValueError: A stored factor is not positive and finite.
            StorageError: A norm or a factor cannot be read.
        """
        columns = weight.shape[-1] if weight.shape else 1
        scale = weight.parts.get(Part.PRE_QUANT_SCALE)
        if scale is not None:
            Smoothing(scale).factors(*self._readers, columns)
        norm = self._norm_of(norm_before(weight.module, self._checkpoint.weights), columns)
        if scale is None and norm is None:
            return None
        return Smoothing(scale, norm, self._offset)

    def _norm_of(self, name: str | None, columns: int) -> tuple[TensorEntry, TensorEntry] | None:
        """Give the norm here and in the base, where it was multiplied by factors."""
        if name is None:
            return None
        if name not in self._changed:
            self._changed[name] = self._differs(name)
        if not self._changed[name]:
            return None
        norm = self._norm(self._checkpoint, name), self._norm(self._base, name)
        try:
            Smoothing(None, norm, self._offset).factors(*self._readers, columns)
        except ValueError:  # a change of sign, or from zero, is none that a linear could undo
            return None
        return norm

    def _differs(self, norm: str) -> bool:
        pair = self._checkpoint.weights.get(norm), self._base.weights.get(norm)
        if pair[0] is None or pair[1] is None or pair[0].shape != pair[1].shape:
            return False
        if any(w.format not in PLAIN_DTYPES or len(w.shape) != 1 for w in pair if w is not None):
            return False
        columns = pair[0].shape[0]
        mine = _values(self._readers[0], self._norm(self._checkpoint, norm), columns)
        theirs = _values(self._readers[1], self._norm(self._base, norm), columns)
        # One that is rounded to another dtype is the same norm.
        cast = torch.from_numpy(theirs).to(PLAIN_DTYPES[pair[0].format]).double().numpy()
        return not np.array_equal(mine, cast)

    @staticmethod
    def _norm(checkpoint: Checkpoint, name: str) -> TensorEntry:
        return checkpoint.weights[name].parts[Part.PLAIN]


def _values(reader: Reader, entry: TensorEntry, columns: int) -> Factors:
    """Read a vector of one number a column.

    Raises:
        ValueError: It has another size, or a dtype that is no floating-point number.
        StorageError: It cannot be read.
    """
    if entry.numel != columns or entry.dtype not in ("BF16", "F16", "F32"):
        raise ValueError(
            f"{entry.name}: {entry.dtype} {list(entry.shape)}, expected {columns} floating-point "
            "numbers"
        )
    data = reader.rows(entry, 0, 1, entry.nbytes)
    return np.asarray(torch_of(data.reshape(-1), entry).double().numpy().reshape(-1))
