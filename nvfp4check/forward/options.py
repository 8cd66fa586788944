"""What a forward run is asked for."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

import torch

from nvfp4check.engine import Engine
from nvfp4check.findings import CheckError
from nvfp4ref.deepseek_v3.linear import LinearMode


class Activations(StrEnum):
    """Which points of each layer are kept."""

    NONE = "none"
    #: The residual stream after the layer, and what the router chose.
    HIDDEN = "hidden"
    ALL = "all"


class KvCache(StrEnum):
    """Whether keys and values pass through the cache format that the checkpoint declares."""

    STORED = "stored"
    NONE = "none"


class Arithmetic(StrEnum):
    """The dtype of activations."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in torch."""
        return {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[
            self
        ]


@dataclass(frozen=True, slots=True)
class Logits:
    """What of the logits is kept: all, the best N, or none but the state they come from."""

    kind: str = "full"
    top: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what `full`, `topk:N` or `hidden` asks for.

        Raises:
            CheckError: The text is none of these.
        """
        kind, _, count = text.partition(":")
        if kind in ("full", "hidden") and not count:
            return cls(kind)
        if kind == "topk" and count.isdecimal() and int(count) > 0:
            return cls(kind, int(count))
        raise CheckError(f"--logits {text!r}: give full, hidden, or topk:N such as topk:20")

    def __str__(self) -> str:
        return f"topk:{self.top}" if self.kind == "topk" else self.kind


@dataclass(frozen=True, slots=True)
class Perturbation:
    """Noise of a size that rounding to a dtype has, to find the floor under differences."""

    dtype: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what `ulp:DTYPE` asks for.

        Raises:
            CheckError: The text is not of this form.
        """
        kind, _, dtype = text.partition(":")
        if kind != "ulp" or dtype not in ("bfloat16", "float16", "float32"):
            raise CheckError(f"--perturb {text!r}: give ulp:bfloat16, ulp:float16 or ulp:float32")
        return cls(dtype)

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next number of the dtype."""
        return float(torch.finfo(getattr(torch, self.dtype)).eps)

    def __str__(self) -> str:
        return f"ulp:{self.dtype}"


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Layers first to stop, the last not included; stop None is the end of the model."""

    first: int = 0
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what `A:B`, `A:` or `:B` asks for.

        Raises:
            CheckError: The text is not of this form.
        """
        first, colon, stop = text.partition(":")
        if not colon or not all(part.isdecimal() or not part for part in (first, stop)):
            raise CheckError(f"--layers {text!r}: give A:B, for example 0:4")
        return cls(int(first or 0), int(stop) if stop else None)

    def within(self, layers: int) -> tuple[int, int]:
        """Return first and stop for a model of so many layers.

        Raises:
            CheckError: The range is empty or leads beyond the model.
        """
        stop = layers if self.stop is None else self.stop
        if not 0 <= self.first < stop <= layers:
            raise CheckError(
                f"--layers {self.first}:{stop}: the model has layers 0 to {layers - 1}, "
                f"so A:B with 0 <= A < B <= {layers}"
            )
        return self.first, stop


#: Memory a run takes at most unless told otherwise.
DEFAULT_MAX_MEMORY = 4 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardOptions:
    """How a run is computed and what is kept of it."""

    #: None: `stored` for a quantised checkpoint, `unquantized` for another.
    mode: LinearMode | None = None
    kv_cache: KvCache = KvCache.STORED
    arithmetic: Arithmetic = Arithmetic.FLOAT32
    device: str = "cpu"
    activations: Activations = Activations.NONE
    logits: Logits = Logits()
    layers: LayerRange = LayerRange()
    #: Compute the layers of multi-token prediction as well.
    mtp: bool = False
    perturbation: Perturbation | None = None
    seed: int = 0
    #: A run whose expert choices are forced.
    routing: Path | None = None
    #: Dtypes of candidates that bounds are derived for.
    bounds: tuple[str, ...] = ()
    #: A run whose states each layer begins with.
    inputs: Path | None = None
    #: Bytes.
    max_memory: int = DEFAULT_MAX_MEMORY
    #: Who computes the experts; None: this process.
    engine: Engine | None = None
    resume: bool = False
