"""A forward run from beginning to end: layer by layer, all prompts at once."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import nvfp4check
from nvfp4check.activations import (
    HIDDEN,
    ROUTER_POINTS,
    TOKENS_FILE,
    PromptInfo,
    Run,
    RunInfo,
    write_tensors,
)
from nvfp4check.checkpoint.opening import Checkpoint, open_checkpoint
from nvfp4check.findings import CheckError
from nvfp4check.forward.bounds.layer import LayerBounds
from nvfp4check.forward.bounds.recording import roundings_of, write_bounds
from nvfp4check.forward.budget import Budget, plan
from nvfp4check.forward.head import Head, embed, write_logits
from nvfp4check.forward.inventory import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    check_weights,
    needed,
)
from nvfp4check.forward.journal import Journal
from nvfp4check.forward.linears import LinearSettings
from nvfp4check.forward.meter import Meter
from nvfp4check.forward.noise import perturbed
from nvfp4check.forward.options import Activations, ForwardOptions
from nvfp4check.forward.reach import Reach, Step
from nvfp4check.forward.reading import ReadAhead
from nvfp4check.forward.setup import (
    cache_format_of,
    config_of,
    device_of,
    fingerprint,
    forced_run,
    given_inputs,
    mode_of,
    refuse_bounds,
)
from nvfp4check.forward.source import StreamedSource
from nvfp4check.forward.spread import SpreadExperts
from nvfp4check.tokens import Prompt, tokenize
from nvfp4ref.deepseek_v3.cache import CacheFormat
from nvfp4ref.deepseek_v3.linear import LinearMode
from nvfp4ref.deepseek_v3.model import decoder_layer, empty_caches
from nvfp4ref.deepseek_v3.norm import rms_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardResult:
    """A finished run and where its time went."""

    run: Run
    meter: Meter
    seconds: float
    #: Layers computed by this call; a continued run has fewer than the model.
    layers: int


def ignore(step: Step) -> None:
    """Report nothing."""


def run_forward(
    location: str | Path,
    prompts: Sequence[Prompt],
    out: Path,
    options: ForwardOptions | None = None,
    progress: Callable[[Step], None] = ignore,
) -> ForwardResult:
    """Compute a checkpoint's forward pass over prompts into a run directory.

    Raises:
        CheckError: The checkpoint, the prompts, the options or the directory do not allow it, or
            values that are not finite appear.
    """
    options = options or ForwardOptions()
    checkpoint = open_checkpoint(location)
    pass_ = _Pass(checkpoint, prompts, options)
    start = time.perf_counter()
    try:
        with options.engine.kept() if options.engine is not None else nullcontext():
            journal = Journal.begin(out, pass_.info, resume=options.resume)
            layers = 0 if journal.complete else pass_.compute(journal, progress)
    except OSError as error:
        raise CheckError(
            f"{out}: cannot be written: {error.strerror or error}; make room or choose another "
            "directory, and continue with --resume"
        ) from error
    return ForwardResult(
        run=Run.open(out),
        meter=pass_.meter,
        seconds=time.perf_counter() - start,
        layers=layers,
    )


@dataclass
class _Points:
    """Collects the recorded points of one layer, split by prompt."""

    lengths: Mapping[str, int]
    kept: Activations
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def record(self, point: str, value: torch.Tensor) -> None:
        wanted = self.kept is Activations.ALL or (
            self.kept is Activations.HIDDEN and point in (HIDDEN, *ROUTER_POINTS)
        )
        if wanted:
            parts = torch.split(value, list(self.lengths.values()))
            for prompt, part in zip(self.lengths, parts, strict=True):
                self.tensors[f"{prompt}/{point}"] = part


class _Pass:
    """Everything that holds for all layers of a run."""

    def __init__(
        self, checkpoint: Checkpoint, prompts: Sequence[Prompt], options: ForwardOptions
    ) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.config = config_of(checkpoint)
        self.first, self.stop = options.layers.within(self.config.num_hidden_layers)
        self.device = device_of(options.device)
        if options.engine is not None and self.device.type != "cpu":
            raise CheckError(
                f"--device {options.device}: workers of an engine compute on processors; give "
                "--device cpu, or --engine local"
            )
        self.dtype = options.arithmetic.dtype
        check_weights(checkpoint, self.config, range(self.stop))
        self.mode = mode_of(checkpoint, self.config, options.mode)
        self.cache_format = cache_format_of(checkpoint, options.kv_cache)
        self.prompts = tokenize(prompts, checkpoint.storage, self.config.vocab_size)
        self.tokens = {p.id: torch.tensor(p.tokens, dtype=torch.int64) for p in self.prompts}
        self.lengths = {prompt: len(tokens) for prompt, tokens in self.tokens.items()}
        self.forced = forced_run(options.routing, self.tokens)
        self.inputs = given_inputs(options.inputs, self.tokens)
        refuse_bounds(options)
        self.roundings = roundings_of(options.bounds, self.dtype)
        self.budget = self._plan()
        self.meter = Meter()

    def _plan(self) -> Budget:
        names = set(needed(self.config, range(self.stop))) - {EMBEDDING, HEAD}
        widest = self.dtype == torch.float64 or self.mode is LinearMode.STORED
        return plan(
            self.options.max_memory,
            list(self.lengths.values()),
            self.config,
            torch.float64.itemsize if widest else torch.float32.itemsize,
            max(self.checkpoint.weights[name].nbytes for name in names),
        )

    @property
    def info(self) -> RunInfo:
        """What run.json says."""
        options = self.options
        return RunInfo(
            prompts=tuple(
                PromptInfo(id=p.id, tokens=self.lengths[p.id], text=p.text) for p in self.prompts
            ),
            checkpoint={
                "location": self.checkpoint.location,
                "fingerprint": fingerprint(self.checkpoint),
                "architecture": self.checkpoint.architecture,
                "producer": self.checkpoint.quantization.producer,
            },
            config=dict(self.checkpoint.config or {}),
            mode=str(self.mode),
            kv_cache=str(options.kv_cache),
            dtype=str(options.arithmetic),
            device=str(self.device),
            activations=str(options.activations),
            logits=str(options.logits),
            layers=(self.first, self.stop),
            perturb=str(options.perturbation) if options.perturbation else None,
            seed=options.seed if options.perturbation else None,
            routing=str(options.routing) if options.routing else None,
            bounds=options.bounds,
            inputs=dict(self.inputs.digests) if self.inputs else None,
            versions={
                "nvfp4check": nvfp4check.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "machine": platform.machine(),
            },
        )

    def compute(self, journal: Journal, progress: Callable[[Step], None]) -> int:
        """Compute from where the journal stands to the end; return how many layers that were."""
        settings = LinearSettings(
            mode=self.mode,
            device=self.device,
            chunk=self.budget.chunk,
            power_of_two_scales=self.checkpoint.quantization.scale_fmt == "ue8m0",
        )
        write_tensors(journal.run / TOKENS_FILE, self.tokens)
        begin = journal.done
        reach = Reach(self.checkpoint, self.config, begin, self.stop, sum(self.lengths.values()))

        def taken() -> None:
            progress(reach.step(self.meter.bytes_read))

        engine, spread = self.options.engine, None
        if engine is not None:
            spread = SpreadExperts(
                engine, self.checkpoint, self.config, settings, self.meter, taken
            ).of
        with ReadAhead(self.checkpoint.storage, self.budget.ahead, self.meter, taken) as reader:
            source = StreamedSource(
                self.checkpoint, self.config, reader, settings, self.meter, spread
            )
            hidden = self._embedded() if begin == 0 else journal.load_state(self.device)
            for layer in range(begin, self.stop):
                reach.layer = layer
                hidden, points, bounds = self._layer(hidden, layer, source)
                if bounds is not None:
                    names = self.options.bounds
                    write_bounds(journal.run, layer, bounds, names, self.lengths)
                journal.layer_done(layer, points, hidden)
            reach.layer = self.stop
            whole_model = self.stop == self.config.num_hidden_layers
            if whole_model:
                norm = source.tensor(FINAL_NORM)
                normed = rms_norm(hidden, norm, self.config.rms_norm_eps)
                head = Head(source.weight(HEAD), reader, settings, self.meter)
                write_logits(
                    journal.run,
                    self.lengths,
                    normed,
                    head,
                    self.options.logits,
                    self.config.vocab_size,
                )
        journal.finish(whole_model=whole_model)
        return self.stop - begin

    def _embedded(self) -> torch.Tensor:
        tokens = torch.cat(list(self.tokens.values()))
        embedded = embed(self.checkpoint, self.checkpoint.weights[EMBEDDING], tokens)
        return embedded.to(self.device, self.dtype)

    def _layer(
        self, hidden: torch.Tensor, layer: int, source: StreamedSource
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], LayerBounds | None]:
        """Return the state after a layer, what was recorded of it, and its bounds if asked for."""
        if self.inputs is not None and layer:
            given = [self.inputs.rows(layer, prompt) for prompt in self.lengths]
            hidden = torch.cat(given).to(self.device, self.dtype)
        points = _Points(self.lengths, self.options.activations)
        following = layer + 1 if layer + 1 < self.stop else None
        scale = source.cache_scale(layer) if self.cache_format is CacheFormat.FP8 else None
        caches = empty_caches(
            len(self.prompts),
            self.config,
            self.dtype,
            self.cache_format,
            1.0 if scale is None else scale,
            self.device,
        )
        lengths = list(self.lengths.values())
        weights = source.layer(layer, following)
        bounds = None
        if self.roundings is not None:
            bounds = LayerBounds(hidden, lengths, weights, self.config, self.roundings, scale)
            weights = bounds.weights

        def record(point: str, value: torch.Tensor) -> None:
            points.record(point, value)
            if bounds is not None:
                bounds.record(point, value)

        hidden, _ = decoder_layer(
            hidden,
            caches,
            lengths,
            weights,
            self.config,
            forced_experts=self._forced_experts(layer),
            record=record,
        )
        if self.options.perturbation is not None:
            hidden = self._perturbed(hidden, layer)
            points.record(HIDDEN, hidden)
        self._check_finite(hidden, layer)
        return hidden, points.tensors, bounds

    def _perturbed(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        perturbation, seed = self.options.perturbation, self.options.seed
        if perturbation is None:
            return hidden
        parts = torch.split(hidden, list(self.lengths.values()))
        return torch.cat(
            [
                perturbed(part, perturbation, seed, layer, prompt)
                for prompt, part in zip(self.lengths, parts, strict=True)
            ]
        )

    def _forced_experts(self, layer: int) -> torch.Tensor | None:
        if self.forced is None or not self.config.is_moe(layer):
            return None
        experts = torch.cat(
            [self.forced.point(layer, prompt, "router_experts") for prompt in self.lengths]
        )
        expected = (sum(self.lengths.values()), self.config.num_experts_per_tok)
        if tuple(experts.shape) != expected or not (
            int(experts.min()) >= 0 and int(experts.max()) < self.config.n_routed_experts
        ):
            raise CheckError(
                f"{self.forced.layer_file(layer)}: router_experts {list(experts.shape)} up to "
                f"{int(experts.max())}, expected {list(expected)} below "
                f"{self.config.n_routed_experts}"
            )
        return experts.to(self.device)

    def _check_finite(self, hidden: torch.Tensor, layer: int) -> None:
        bad = ~hidden.isfinite().all(dim=-1)
        if not bad.any():
            return
        parts = torch.split(bad, list(self.lengths.values()))
        prompt, token = next(
            (prompt, int(part.nonzero()[0]))
            for prompt, part in zip(self.lengths, parts, strict=True)
            if part.any()
        )
        raise CheckError(
            f"layer {layer}: the state of {int(bad.sum())} of {len(bad)} tokens is not finite "
            f"after it, first prompt {prompt!r}, token {token}; `nvfp4check validate` looks for "
            "the weight"
        )
