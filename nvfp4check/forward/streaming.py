"""A forward run from beginning to end: layer by layer, all prompts at once."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import nvfp4check
from nvfp4check.activations import (
    TOKENS_FILE,
    PromptInfo,
    Run,
    RunInfo,
    mtp_folder,
    write_tensors,
)
from nvfp4check.checkpoint.opening import Checkpoint, open_checkpoint
from nvfp4check.findings import CheckError
from nvfp4check.forward.bounds.recording import roundings_of, write_bounds
from nvfp4check.forward.bounds.watched import Tell
from nvfp4check.forward.budget import Budget, plan
from nvfp4check.forward.fp8_inputs import check_fp8_inputs
from nvfp4check.forward.head import Head, embed, write_logits
from nvfp4check.forward.inventory import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Ends,
    check_weights,
    needed,
)
from nvfp4check.forward.journal import Journal
from nvfp4check.forward.layers import Layers
from nvfp4check.forward.linears import LinearSettings
from nvfp4check.forward.meter import Meter
from nvfp4check.forward.options import ForwardOptions
from nvfp4check.forward.predicting import predictors_of, rows_at, shortened
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
from nvfp4ref.deepseek_v3.linear import LinearMode
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
            journal = Journal.begin(
                out, pass_.info, pass_.tokens, end=pass_.end, resume=options.resume
            )
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


@dataclass(frozen=True, slots=True)
class _Opened:
    """What is open while a run is computed."""

    journal: Journal
    reach: Reach
    reader: ReadAhead
    source: StreamedSource
    settings: LinearSettings
    layers: Layers


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
        self.prompts = tokenize(prompts, checkpoint.storage, self.config.vocab_size)
        self.tokens = {p.id: torch.tensor(p.tokens, dtype=torch.int64) for p in self.prompts}
        self.lengths = {prompt: len(tokens) for prompt, tokens in self.tokens.items()}
        self.whole_model = self.stop == self.config.num_hidden_layers
        self.predictors = range(0)
        if options.mtp:
            predictors = predictors_of(self.config, max(self.lengths.values()))
            self.predictors = predictors if self.whole_model else range(0)
        self.end = self.stop + len(self.predictors)
        check_weights(checkpoint, self.config, range(self.end))
        self.mode = mode_of(checkpoint, self.config, options.mode)
        if self.mode is LinearMode.STORED:
            check_fp8_inputs(checkpoint, self.config, range(self.end))
        self.cache_format = cache_format_of(checkpoint, options.kv_cache)
        self.forced = forced_run(options.routing, self.tokens)
        self.inputs = given_inputs(options.inputs, self.tokens)
        refuse_bounds(options)
        self.roundings = roundings_of(options.bounds, self.dtype, self.config)
        self.budget = self._plan()
        self.meter = Meter()

    def _plan(self) -> Budget:
        names = set(needed(self.config, range(self.end)))
        for ends in (Ends(), *map(Ends.of_mtp, self.predictors)):
            names -= {ends.embedding, ends.head}  # of these, some rows at a time
        widest = self.dtype == torch.float64 or self.mode is LinearMode.STORED
        return plan(
            self.options.max_memory,
            list(self.lengths.values()),
            self.config,
            torch.float64.itemsize if widest else torch.float32.itemsize,
            max(self.checkpoint.weights[name].nbytes for name in names),
            len(self.options.bounds),
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
            mtp=self.config.num_nextn_predict_layers if options.mtp else 0,
            perturb=str(options.perturbation) if options.perturbation else None,
            seed=options.seed if options.perturbation else None,
            routing=str(options.routing) if options.routing else None,
            ranks=1,
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
            quantization=self.checkpoint.quantization,
        )
        write_tensors(journal.run / TOKENS_FILE, self.tokens)
        begin = journal.done
        layers, tokens = range(begin, self.stop), sum(self.lengths.values())
        reach = Reach(self.checkpoint, self.config, layers, self.predictors, tokens)

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
            run = _Opened(journal, reach, reader, source, settings, self._layers(source))
            hidden = self._trunk(begin, run)
            if self.whole_model:
                self._ends(hidden, begin, run)
        journal.finish(whole_model=self.whole_model)
        return self.end - begin

    def _layers(self, source: StreamedSource) -> Layers:
        return Layers(
            config=self.config,
            options=self.options,
            cache_format=self.cache_format,
            device=self.device,
            source=source,
            forced=self.forced,
            inputs=self.inputs,
            roundings=self.roundings,
        )

    def _trunk(self, begin: int, run: "_Opened") -> torch.Tensor:
        """Compute the layers left; return the state after the last."""
        if begin:
            hidden = run.journal.load_state(self.device)
        else:
            hidden = self._embedded(EMBEDDING, self.tokens)
        for layer in range(begin, self.stop):
            run.reach.at_layer(layer)
            following = layer + 1 if layer + 1 < self.stop else None
            done = run.layers.decoder(hidden, layer, following, self.lengths)
            if done.bounds is not None:
                names = self.options.bounds
                write_bounds(run.journal.run, layer, done.bounds, names, self.lengths)
            run.journal.layer_done(layer, done.points, done.hidden)
            hidden = done.hidden
        return hidden

    def _ends(self, hidden: torch.Tensor, begin: int, run: "_Opened") -> None:
        """Write the logits of the state after the trunk, then what MTP layers make of it.

        Where these have begun before, the state is that after the last of them.
        """
        if begin <= self.stop:
            run.reach.at_head()
            normed = self._normed(hidden, FINAL_NORM, run)
            self._write_logits(run.journal.run, self.lengths, normed, HEAD, run)
        for layer in self.predictors:
            if layer >= begin:
                run.reach.at_layer(layer)
                hidden = self._predicted(hidden, layer, run)

    def _predicted(self, hidden: torch.Tensor, layer: int, run: "_Opened") -> torch.Tensor:
        """Compute an MTP layer and write its logits; return the state after it.

        `hidden` is the state before it, with one row more of each prompt.
        """
        depth = layer - self.stop
        lengths, ends = rows_at(depth, self.lengths), Ends.of_mtp(layer)
        norm = Ends.of_mtp(layer - 1).norm if depth else FINAL_NORM
        tokens = {prompt: self.tokens[prompt][depth + 1 :] for prompt in lengths}
        before = shortened(hidden, rows_at(depth - 1, self.lengths), lengths)
        embedded = self._embedded(ends.embedding, tokens)
        following = layer + 1 if layer + 1 in self.predictors else None
        predicted = run.layers.predictor(
            before, run.source.tensor(norm), embedded, layer, following, lengths
        )
        done, bounds = predicted.computed, predicted.bounds
        normed = self._normed(done.hidden, ends.norm, run)
        folder = mtp_folder(run.journal.run, layer)
        if bounds is None:
            self._write_logits(folder, lengths, normed, ends.head, run)
        else:
            bounds.normed(run.source.tensor(ends.norm), normed)
            self._write_logits(folder, lengths, normed, ends.head, run, bounds.logits)
            write_bounds(run.journal.run, layer, bounds, self.options.bounds, lengths)
        run.journal.layer_done(layer, done.points, done.hidden)
        return done.hidden

    def _normed(self, hidden: torch.Tensor, name: str, run: "_Opened") -> torch.Tensor:
        return rms_norm(hidden, run.source.tensor(name), self.config.rms_norm_eps)

    def _write_logits(
        self,
        folder: Path,
        lengths: Mapping[str, int],
        hidden: torch.Tensor,
        name: str,
        run: "_Opened",
        tell: Tell | None = None,
    ) -> None:
        head = Head(run.source.weight(name), run.reader, run.settings, self.meter, tell)
        write_logits(folder, lengths, hidden, head, self.options.logits, self.config.vocab_size)

    def _embedded(self, name: str, tokens: Mapping[str, torch.Tensor]) -> torch.Tensor:
        packed = torch.cat(list(tokens.values()))
        embedded = embed(self.checkpoint, self.checkpoint.weights[name], packed)
        return embedded.to(self.device, self.dtype)
