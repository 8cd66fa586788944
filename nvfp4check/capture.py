"""A run directory from any torch module, by hooks.

    with capture(model, "run") as session:
        for name, tokens in prompts.items():
            with session.prompt(name, tokens):
                model(input_ids=torch.tensor([tokens]))

Which modules give which points is a list of `Tap`s. `TRANSFORMERS` fits transformers'
DeepseekV3ForCausalLM from 4.56 to 5; `VLLM` fits a model that passes the residual stream in two
parts, as vLLM's DeepseekV3ForCausalLM: a layer returns (hidden_states, residual), whose sum is the
stream, and `input_layernorm` returns (normed, residual). `(*VLLM, VLLM_GATE)` takes the scores of
its router too.

With `inputs=golden` every decoder layer is given what that run recorded as `hidden` of the layer
before, in place of what the model computed, so that each is judged on its own; the rest of the
model is left as it is, and logits are then those of the last layer on the golden's state. The
argument replaced is `hidden_states`; one called `residual` becomes None, as at the first layer of
a model that passes the stream in two parts.

One prompt at a time, alone in its batch. It may come in several calls, a chunk or a token each:
rows are joined in order. What a hook sees is copied at once, for engines write into the same buffer
again. A point that never fired, that has more or fewer rows than the prompt has tokens, or that
holds bit for bit what another layer or another prompt left there, is an error: a silent hook is
worse than none.
"""

import hashlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nvfp4check.activations import (
    LOGITS_FILE,
    TOKENS_FILE,
    PromptInfo,
    Run,
    RunInfo,
    layer_file,
    write_info,
    write_tensors,
)
from nvfp4check.findings import CheckError
from nvfp4check.layer_inputs import LayerInputs, give_inputs

#: Name that a tap gives to the logits; every other name is a point of a layer.
LOGITS = "logits"

#: From a module, its positional inputs and its output to points and their values.
Extract = Callable[[torch.nn.Module, tuple[Any, ...], Any], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Tap:
    """Where a hook goes: a module's name, with `{layer}` for the number of the layer."""

    module: str
    extract: Extract


def first_output(point: str) -> Extract:
    """Take a module's output, or the first of several."""

    def extract(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> dict[str, Any]:
        return {point: output[0] if isinstance(output, (tuple, list)) else output}

    return extract


def sum_of_outputs(point: str) -> Extract:
    """Take the sum of both outputs, where the residual stream travels in two parts."""

    def extract(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> dict[str, Any]:
        parts = output if isinstance(output, (tuple, list)) else (output,)
        if len(parts) != 2 or getattr(parts[1], "shape", None) != parts[0].shape:
            raise CheckError(
                f"{type(module).__name__} returns no (hidden_states, residual) of one shape; give "
                f"taps that fit where this engine keeps its residual stream, or none for {point}"
            )
        return {point: parts[0] + parts[1]}

    return extract


def transformers_router(
    module: torch.nn.Module, inputs: tuple[Any, ...], output: Any
) -> dict[str, torch.Tensor]:
    """Take what the gate of transformers chose, and compute the scores it chose by.

    Up to 4.57 the gate returns (experts, weights), from 5 on (logits, weights, experts).
    """
    x, weight = inputs[0], module.weight
    logits = x.reshape(-1, x.shape[-1]).float() @ weight.float().T
    experts = next(part for part in output if not part.is_floating_point())
    weights = next(
        part for part in output if part.is_floating_point() and part.shape == experts.shape
    )
    return {
        "router_scores": logits.sigmoid() + module.e_score_correction_bias,
        "router_experts": experts.to(torch.int32),
        "router_weights": weights,
    }


def gate_scores(
    module: torch.nn.Module, inputs: tuple[Any, ...], output: Any
) -> dict[str, torch.Tensor]:
    """Take the scores that a gate's logits lead to, where the choice is made elsewhere."""
    logits = output[0] if isinstance(output, (tuple, list)) else output
    return {"router_scores": logits.float().sigmoid() + module.e_score_correction_bias.float()}


TRANSFORMERS = (
    Tap("model.layers.{layer}.input_layernorm", first_output("attn_input")),
    Tap("model.layers.{layer}.self_attn", first_output("attn_output")),
    Tap("model.layers.{layer}.post_attention_layernorm", first_output("mlp_input")),
    Tap("model.layers.{layer}.mlp", first_output("mlp_output")),
    Tap("model.layers.{layer}.mlp.gate", transformers_router),
    Tap("model.layers.{layer}", first_output("hidden")),
    Tap("lm_head", first_output(LOGITS)),
)

VLLM = (
    Tap("model.layers.{layer}.input_layernorm", first_output("attn_input")),
    Tap("model.layers.{layer}.self_attn", first_output("attn_output")),
    Tap("model.layers.{layer}.post_attention_layernorm", first_output("mlp_input")),
    Tap("model.layers.{layer}.mlp", first_output("mlp_output")),
    Tap("model.layers.{layer}", sum_of_outputs("hidden")),
)

#: Beside `VLLM`, where the gate is called as a module and not inside a fused kernel.
VLLM_GATE = Tap("model.layers.{layer}.mlp.gate", gate_scores)


@dataclass
class _Seen:
    """What the hooks saw of one prompt: layer (None for the logits) and point to its calls."""

    tokens: torch.Tensor
    calls: dict[tuple[int | None, str], list[torch.Tensor]] = field(default_factory=dict)
    #: Names of the modules whose hooks fired.
    fired: set[str] = field(default_factory=set)
    #: Rows that each layer was given so far.
    given: dict[int, int] = field(default_factory=dict)


class Session:
    """Prompts being captured."""

    def __init__(self, inputs: LayerInputs | None = None) -> None:
        self.prompts: dict[str, _Seen] = {}
        self._open: _Seen | None = None
        self._name = ""
        self._inputs = inputs

    @contextmanager
    def prompt(self, name: str, tokens: Sequence[int] | torch.Tensor) -> Iterator[None]:
        """Take whatever the model computes inside for this prompt.

        Raises:
            CheckError: The name was used before, or another prompt is open.
        """
        if self._open is not None or name in self.prompts:
            raise CheckError(f"prompt {name!r}: captured already, or inside another prompt")
        seen = _Seen(torch.as_tensor(tokens, dtype=torch.int64).flatten())
        if self._inputs is not None:
            self._inputs.require(name, seen.tokens)
        self.prompts[name] = self._open = seen
        self._name = name
        try:
            yield
        finally:
            self._open = None

    def given(self, layer: int, state: torch.Tensor) -> torch.Tensor:
        """Return what a layer is to begin with, in the place of a state [..., D].

        Raises:
            CheckError: More rows come than the prompt has tokens.
        """
        if self._open is None or self._inputs is None:
            return state
        start = self._open.given.get(layer, 0)
        stop = start + state.numel() // state.shape[-1]
        rows = self._inputs.rows(layer, self._name)[start:stop]
        self._open.given[layer] = stop
        if rows.numel() != state.numel():
            raise CheckError(
                f"prompt {self._name!r}: layer {layer} is called with rows {start} to {stop - 1} "
                f"of {state.shape[-1]}, and the given run has {len(rows)} there of "
                f"{rows.shape[-1]}; run each prompt once, alone in its batch"
            )
        return rows.reshape(state.shape).to(state.device, state.dtype)

    def see(self, module: str, layer: int | None, values: Mapping[str, torch.Tensor]) -> None:
        """Copy what a hook saw; outside of a prompt it is left aside."""
        if self._open is None:
            return
        self._open.fired.add(module)
        for point, value in values.items():
            rows = value.detach().reshape(-1, value.shape[-1]).to("cpu", copy=True)
            self._open.calls.setdefault((layer, point), []).append(rows)


@contextmanager
def capture(
    model: torch.nn.Module,
    run: str | Path,
    taps: Sequence[Tap] = TRANSFORMERS,
    *,
    engine: str = "",
    inputs: Run | str | Path | None = None,
) -> Iterator[Session]:
    """Hook a model, and write what its prompts left as a run directory at the end.

    `engine` names what computes, for run.json; `inputs` is the run whose states every layer is
    given. Nothing is written if the block raises.

    Raises:
        CheckError: A tap fits no module, a point is missing, incomplete or repeated, or the
            directory holds something.
    """
    run = Path(run)
    if run.exists() and any(run.iterdir()):
        raise CheckError(f"{run}: is not empty; give a new directory")
    given = None if inputs is None else LayerInputs.open(inputs)
    session = Session(given)
    with ExitStack() as hooks:
        expected = _hook(model, taps, session, hooks)
        if given is not None:
            name = next((tap.module for tap in taps if tap.module.endswith("{layer}")), None)
            for hook in give_inputs(model, name, session.given):
                hooks.callback(hook)
        yield session
    packed = {name: _join(name, seen, expected) for name, seen in session.prompts.items()}
    if not packed:
        raise CheckError(f"{run}: no prompt was captured; call the model inside session.prompt")
    _check_repeats(packed, session.prompts)
    _write(run, session.prompts, packed, model, engine, given)


def _hook(
    model: torch.nn.Module, taps: Sequence[Tap], session: Session, hooks: ExitStack
) -> list[str]:
    """Place the hooks; return the name of every module that must fire."""
    modules = dict(model.named_modules())
    placed: list[str] = []
    for tap in taps:
        before = len(placed)
        per_layer = "{layer}" in tap.module
        for layer in range(len(modules)) if per_layer else (None,):
            name = tap.module.format(layer=layer)
            if name not in modules:
                if layer is not None and f"{tap.module.partition('{layer}')[0]}{layer}" in modules:
                    continue  # a layer without this part, such as a dense layer without a gate
                break

            def see(
                module: torch.nn.Module,
                inputs: tuple[Any, ...],
                output: Any,
                name: str = name,
                layer: int | None = layer,
                extract: Extract = tap.extract,
            ) -> None:
                session.see(name, layer, extract(module, inputs, output))

            hooks.callback(modules[name].register_forward_hook(see).remove)
            placed.append(name)
        if len(placed) == before:
            raise CheckError(f"no module is called {tap.module}; give taps that fit this model")
    return placed


def _join(
    prompt: str, seen: _Seen, expected: Sequence[str]
) -> dict[tuple[int | None, str], torch.Tensor]:
    """Join the calls of each point, and refuse what is missing or has another number of rows."""
    silent = [name for name in expected if name not in seen.fired]
    if silent:
        raise CheckError(
            f"prompt {prompt!r}: {len(silent)} hooks saw nothing, first {silent[0]}; does a "
            "compiled or captured graph bypass the module's forward?"
        )
    joined = {key: torch.cat(calls) for key, calls in seen.calls.items()}
    for (layer, point), rows in joined.items():
        if len(rows) != len(seen.tokens):
            raise CheckError(
                f"prompt {prompt!r}: {_place(layer, point)} has {len(rows)} rows in "
                f"{len(seen.calls[layer, point])} calls, expected one for each of "
                f"{len(seen.tokens)} tokens; run each prompt once, alone in its batch, without a "
                "warm-up inside session.prompt"
            )
    return joined


def _place(layer: int | None, point: str) -> str:
    return point if layer is None else f"{point} of layer {layer}"


def _check_repeats(
    packed: Mapping[str, Mapping[tuple[int | None, str], torch.Tensor]],
    prompts: Mapping[str, _Seen],
) -> None:
    """Refuse activations that stand, bit for bit, at two layers or under two prompts."""
    places: dict[tuple[str, bytes], tuple[str, int | None]] = {}
    for prompt, points in packed.items():
        for (layer, point), rows in points.items():
            if point.startswith("router_") or not rows.any():
                continue
            content = rows.contiguous().view(torch.uint8).numpy().tobytes()
            key = point, hashlib.sha256(content).digest()
            other, other_layer = places.setdefault(key, (prompt, layer))
            same_tokens = torch.equal(prompts[other].tokens, prompts[prompt].tokens)
            if other_layer != layer or (other != prompt and not same_tokens):
                raise CheckError(
                    f"{_place(layer, point)}, prompt {prompt!r}, is bit for bit the "
                    f"{_place(other_layer, point)}, prompt {other!r}: a buffer was read again "
                    "and not written"
                )


def _write(
    run: Path,
    prompts: Mapping[str, _Seen],
    packed: Mapping[str, Mapping[tuple[int | None, str], torch.Tensor]],
    model: torch.nn.Module,
    engine: str,
    given: LayerInputs | None,
) -> None:
    layers = sorted(
        {layer for points in packed.values() for layer, _ in points if layer is not None}
    )
    for layer in layers:
        tensors = {
            f"{prompt}/{point}": rows
            for prompt, points in packed.items()
            for (its_layer, point), rows in points.items()
            if its_layer == layer
        }
        write_tensors(layer_file(run, layer), tensors)
    logits = {
        prompt: points[None, LOGITS]
        for prompt, points in packed.items()
        if (None, LOGITS) in points
    }
    if logits:
        write_tensors(run / LOGITS_FILE, logits)
    write_tensors(run / TOKENS_FILE, {prompt: seen.tokens for prompt, seen in prompts.items()})
    some = next(iter(model.parameters()), torch.empty(0))
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    write_info(
        run,
        RunInfo(
            prompts=tuple(
                PromptInfo(id=prompt, tokens=len(seen.tokens)) for prompt, seen in prompts.items()
            ),
            complete=True,
            # What begins with _ says where this machine keeps the model.
            config={k: v for k, v in (to_dict() if to_dict else {}).items() if k[:1] != "_"},
            mode="captured",
            dtype=str(some.dtype).removeprefix("torch."),
            device=str(some.device),
            activations="all",
            logits="full" if logits else None,
            layers=(layers[0], layers[-1] + 1) if layers else None,
            ranks=_ranks(),
            inputs={prompt: given.digests[prompt] for prompt in prompts} if given else None,
            versions={
                "engine": engine or type(model).__name__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
        ),
    )


def _ranks() -> int:
    """Return among how many processes a model may be split, as torch knows."""
    distributed = torch.distributed
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


__all__ = [
    "TRANSFORMERS",
    "VLLM",
    "VLLM_GATE",
    "Session",
    "Tap",
    "capture",
    "first_output",
    "sum_of_outputs",
]
