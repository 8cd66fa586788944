"""The run directory as a journal: what a killed run has done, and where it goes on.

After each layer its recorded points are written, then the state that the next layer begins with,
each file whole or not at all; the last state found is where a run continues. The state folder goes
when the run is complete, unless layers of the model are left that a later run may add. Layers of
multi-token prediction may be added to a run that recorded the state after its last layer.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nvfp4check.activations import (
    HIDDEN,
    RUN_FILE,
    TOKENS_FILE,
    Run,
    RunInfo,
    layer_file,
    leftovers,
    opened,
    write_info,
    write_tensors,
)
from nvfp4check.findings import CheckError

STATE_FOLDER = "state"
_STATE = "hidden"

#: What may differ between a run and its continuation: where the checkpoint lies, how far to go.
_FREE = ("complete", "layers", "checkpoint")


class Journal:
    """One run directory being written."""

    def __init__(self, run: Path, info: RunInfo) -> None:
        self.run = run
        self.info = info

    @classmethod
    def begin(
        cls,
        run: Path,
        info: RunInfo,
        tokens: Mapping[str, torch.Tensor],
        *,
        end: int,
        resume: bool,
    ) -> "Journal":
        """Start a run, or continue the one that is there; `end` is the layer after its last.

        Raises:
            CheckError: The directory holds something else, or a run that was made differently.
        """
        first = info.layers[0] if info.layers else 0
        if not (run / RUN_FILE).exists():
            if run.exists() and (not run.is_dir() or any(run.iterdir())):
                raise CheckError(f"{run}: is there and holds no run; give a new directory to --out")
            if first:
                raise CheckError(
                    f"{run}: layers from {first} on continue a run that has computed those before; "
                    f"there is none (begin with --layers 0:{first})"
                )
            write_info(run, info)
            return cls(run, info)
        if not resume:
            raise CheckError(
                f"{run}: holds a run already; continue it with --resume, or give a new directory"
            )
        there = Run.open(run, incomplete=True)
        found = there.info
        _check_same(there, info, tokens)
        for file in leftovers(run):
            file.unlink(missing_ok=True)
        begun = found.layers[0] if found.layers else 0
        stop = info.layers[1] if info.layers else 0
        info = replace(info, checkpoint=found.checkpoint, layers=(begun, stop), complete=False)
        journal = cls(run, info)
        done = begun_to(found) if found.complete else journal.done
        _check_reach(run, done, first, stop if found.complete else end)
        if found.complete and (found.layers, found.mtp) == (info.layers, info.mtp):
            journal.info = found
        elif found.complete and info.mtp > found.mtp and not journal.done:
            raise CheckError(
                f"{run}: is complete and kept no state to go on from, as --activations hidden or "
                "all does: compute it anew with --mtp into another directory"
            )
        else:
            write_info(run, journal.info)
        return journal

    @property
    def complete(self) -> bool:
        """Whether all that was asked for is there."""
        return self.info.complete

    @property
    def done(self) -> int:
        """How many layers lie behind the last state."""
        states = (state.stem for state in (self.run / STATE_FOLDER).glob("*.safetensors"))
        kept = max((int(name) + 1 for name in states if name.isdecimal()), default=0)
        last = begun_to(self.info)
        return kept or (last if self._recorded(last - 1) else 0)

    def load_state(self, device: torch.device) -> torch.Tensor:
        """Return the hidden state after the last layer that was done, [T, D].

        Raises:
            CheckError: It cannot be read.
        """
        if not self._state(self.done - 1).is_file():
            run, layer = Run(self.run, self.info), self.done - 1
            return torch.cat([run.point(layer, prompt, HIDDEN) for prompt in run.prompts]).to(
                device
            )
        with opened(self._state(self.done - 1)) as tensors:
            state: torch.Tensor = tensors.get_tensor(_STATE)
        return state.to(device)

    def layer_done(self, layer: int, points: dict[str, torch.Tensor], hidden: torch.Tensor) -> None:
        """Write a layer's points, then the state after it."""
        if points:
            write_tensors(layer_file(self.run, layer), points)
        write_tensors(self._state(layer), {_STATE: hidden})
        if layer:
            self._state(layer - 1).unlink(missing_ok=True)

    def finish(self, *, whole_model: bool) -> None:
        """Mark the run complete."""
        self.info = replace(self.info, complete=True)
        write_info(self.run, self.info)
        if whole_model:
            shutil.rmtree(self.run / STATE_FOLDER, ignore_errors=True)

    def _recorded(self, layer: int) -> bool:
        """Tell whether the state after a layer is among its points, which are written first."""
        run = Run(self.run, self.info)
        return run.layer_file(layer).is_file() and HIDDEN in run.points(layer)

    def _state(self, layer: int) -> Path:
        return self.run / STATE_FOLDER / f"{layer:03d}.safetensors"


def begun_to(info: RunInfo) -> int:
    """Return how many layers a complete run has, multi-token prediction aside."""
    return info.layers[1] if info.layers else 0


def _check_reach(run: Path, done: int, first: int, stop: int) -> None:
    """Refuse to go on elsewhere than where the run stands."""
    if first and not done:
        raise CheckError(f"{run}: has no state to go on from at layer {first}; begin at layer 0")
    if first > done:
        raise CheckError(f"{run}: has layers 0 to {done - 1} and cannot go on at layer {first}")
    if stop < done:
        raise CheckError(f"{run}: has layers 0 to {done - 1} already, more than up to {stop - 1}")


def _difference(name: str, then: Any, now: Any) -> str:
    """Say in what a field differs; of a mapping, such as the model's config, in which keys."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return f"{name} {then!r} then, {now!r} now"
    keys = [key for key in {**then, **now} if _plain(then.get(key)) != _plain(now.get(key))]
    return f"{name} differs in {', '.join(keys)}"


def _check_same(run: Run, asked: RunInfo, tokens: Mapping[str, torch.Tensor]) -> None:
    """Refuse to continue a run that was made differently; all differences are named.

    Multi-token prediction may be added to a run without it.
    """
    found = run.info
    before, now = found.to_json(), asked.to_json()
    if not found.mtp:
        before["mtp"] = now["mtp"]
    differ = [
        _difference(name, before.get(name), now[name])
        for name in now
        if name not in (*_FREE, "prompts") and _plain(before.get(name)) != _plain(now[name])
    ]
    differ += _prompts_differ(run, asked, tokens)
    if found.checkpoint.get("fingerprint") != asked.checkpoint.get("fingerprint"):
        differ.append("another checkpoint (its headers differ)")
    if differ:
        raise CheckError(f"{run.path}: cannot be continued: {'; '.join(differ)}")


def _prompts_differ(run: Run, asked: RunInfo, tokens: Mapping[str, torch.Tensor]) -> list[str]:
    """Say in which prompts two runs differ, if in any."""
    if run.prompts != tuple(prompt.id for prompt in asked.prompts):
        return [f"prompts {_named(run.prompts)} then, {_named(tuple(tokens))} now"]
    if run.info.prompts != asked.prompts:
        pairs = zip(run.info.prompts, asked.prompts, strict=True)
        return [f"prompt {then.id!r} is another text" for then, now in pairs if then != now][:1]
    if not (run.path / TOKENS_FILE).exists():
        return []  # stopped before it was written
    other = [name for name in tokens if not torch.equal(run.tokens(name), tokens[name])]
    return [f"prompt {name!r} has other tokens" for name in other[:1]]


def _named(prompts: Sequence[str]) -> str:
    more = f" and {len(prompts) - 3:,} more" if len(prompts) > 3 else ""
    return ", ".join(map(repr, prompts[:3])) + more


def _plain(value: object) -> object:
    """Return a value as JSON would give it back."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value
