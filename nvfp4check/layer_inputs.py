"""Another run's states as the inputs of each layer, so that every layer is judged on its own.

Contract:
    layer 0    begins with the embedded tokens, as always
    layer n    begins with what the other run recorded as `hidden` of layer n - 1, in the dtype of
               whoever computes
    digest     sha256 of a prompt's tokens and of every recorded `hidden`: run.json keeps it, and
               two runs whose digests are equal had the same inputs
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from nvfp4check.activations import HIDDEN, Run
from nvfp4check.findings import CheckError

if TYPE_CHECKING:
    import torch


class LayerInputs:
    """The recorded states of a run, as inputs of another."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @classmethod
    def open(cls, run: Run | str | Path) -> Self:
        """Open a run whose states are given on.

        Raises:
            CheckError: It is no run, or recorded no states.
        """
        found = run if isinstance(run, Run) else Run.open(run)
        if not any(HIDDEN in found.points(layer) for layer in found.layers):
            raise CheckError(
                f"{found.path}: recorded no {HIDDEN}; run forward with --activations hidden or all"
            )
        return cls(found)

    def rows(self, layer: int, prompt: str) -> "torch.Tensor":
        """Return what a layer after the first begins with, [T, D].

        Raises:
            CheckError: It was not recorded.
        """
        return self.run.point(layer - 1, prompt, HIDDEN)

    def require(self, prompt: str, tokens: "torch.Tensor") -> None:
        """Refuse a prompt that the run has not, or with other tokens.

        Raises:
            CheckError: So it is.
        """
        import torch

        if prompt not in self.run.prompts or not torch.equal(self.run.tokens(prompt), tokens):
            raise CheckError(f"{self.run.path}: has not the same tokens for prompt {prompt!r}")

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """The digest of each prompt."""
        import torch

        found = {}
        for prompt in self.run.prompts:
            digest = hashlib.sha256(self.run.tokens(prompt).numpy().tobytes())
            for layer in self.run.layers:
                if HIDDEN in self.run.points(layer):
                    state = self.run.point(layer, prompt, HIDDEN).contiguous()
                    digest.update(state.view(torch.uint8).numpy())
            found[prompt] = f"sha256:{digest.hexdigest()}"
        return found
