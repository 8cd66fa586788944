"""Another run's states as the inputs of each layer, so that every layer is judged on its own.

Contract:
    layer 0    begins with the embedded tokens, as always
    layer n    begins with what the other run recorded as `hidden` of layer n - 1, in the dtype of
               whoever computes; of prediction, with the norm of that
    digest     sha256 of a prompt's tokens and of every recorded `hidden`: run.json keeps it, and
               two runs whose digests are equal had the same inputs
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

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
                if HIDDEN in self.run.points(layer) and self.run.rows(layer, prompt):
                    state = self.run.point(layer, prompt, HIDDEN).contiguous()
                    digest.update(state.view(torch.uint8).numpy().tobytes())
            found[prompt] = f"sha256:{digest.hexdigest()}"
        return found


def give_inputs(
    model: "torch.nn.Module",
    name: str | None,
    given: "Callable[[int, torch.Tensor], torch.Tensor]",
) -> Iterator[Callable[[], None]]:
    """Hook the decoder layers of a model so that each after the first begins with given states.

    `name` is that of a layer with `{layer}` for its number, `given` makes of a layer and the state
    it is called with what it begins with. Yields what removes each hook.

    Raises:
        CheckError: The model has no such layers, or a layer takes no hidden_states.
    """
    modules = dict(model.named_modules())
    layers = [at for at in range(len(modules)) if name and name.format(layer=at) in modules]
    if name is None or not layers:
        raise CheckError("inputs: no tap names the decoder layers; give one that ends in {layer}")
    for layer in layers[1:]:
        module = modules[name.format(layer=layer)]
        signature = inspect.signature(module.forward)
        if "hidden_states" not in signature.parameters:
            raise CheckError(
                f"inputs: {name.format(layer=layer)} takes {', '.join(signature.parameters)}, "
                "expected hidden_states among them"
            )

        def give(
            module: "torch.nn.Module",
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            layer: int = layer,
            signature: inspect.Signature = signature,
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            call = signature.bind(*args, **kwargs)
            call.arguments["hidden_states"] = given(layer, call.arguments["hidden_states"])
            if "residual" in call.arguments:
                call.arguments["residual"] = None
            return call.args, call.kwargs

        yield module.register_forward_pre_hook(give, with_kwargs=True).remove
