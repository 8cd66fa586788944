"""Where the logits of a run come from, read a few positions at a time.

Three kinds: stored over the whole vocabulary; the state after the final norm, which the head turns
into logits (a head of 129,280 rows is read once for each block of positions); and the best few of
each position, as servers give them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nvfp4check.activations import FINAL_HIDDEN_FILE, LOGITS_FILE, Run
from nvfp4check.agreement.logits import BLOCK_ELEMENTS, Rows
from nvfp4check.agreement.topk import TopRows
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.findings import CheckError
from nvfp4check.forward.head import Head
from nvfp4check.forward.inventory import HEAD
from nvfp4check.forward.linears import LinearSettings
from nvfp4check.forward.meter import Meter
from nvfp4check.forward.reading import ReadAhead
from nvfp4ref.deepseek_v3.linear import LinearMode

#: Log-probability of the token that really followed, beside the best ones of a server.
FOLLOWING = "following"

#: Elements of logits that are made of states at one time, 0.5 GB of float32. To read a head of
#: 129,280 x 7,168 and to widen it costs as much as to multiply 150 states with it: 1,000 share it.
_STATE_ELEMENTS = 16 * BLOCK_ELEMENTS

#: Bytes of the head that are read ahead of their use, and that one part takes as float64.
_HEAD_AHEAD = 1 << 28
_HEAD_CHUNK = 1 << 26


@dataclass(frozen=True, slots=True)
class Full:
    """Logits over the whole vocabulary."""

    positions: int
    vocabulary: int
    rows: Rows
    #: Positions to take at one time.
    block: int


@dataclass(frozen=True, slots=True)
class Top:
    """The best few of each position."""

    positions: int
    rows: TopRows


Source = Full | Top


def holds_logits(run: Run) -> bool:
    """Tell whether a run has logits of any kind, or the states that a head makes them of."""
    return any((run.path / name).is_file() for name in (LOGITS_FILE, FINAL_HIDDEN_FILE))


@contextmanager
def opened_logits(run: Run, head: str | None = None) -> Iterator["Logits"]:
    """Open what a run holds of logits, for as long as the block lasts.

    `head` is the checkpoint whose head makes logits of final states; by default the run's own.
    """
    with ExitStack() as files:
        yield Logits(run, head, files)


class Logits:
    """The logits of a run, whatever form they are stored in."""

    def __init__(self, run: Run, head: str | None, files: ExitStack) -> None:
        self._run = run
        self._head_of = head
        self._files = files
        self._stored = self._open(LOGITS_FILE)
        self._states = None if self._stored is not None else self._open(FINAL_HIDDEN_FILE)
        self._head: _StreamedHead | None = None
        self._names = set(self._stored.keys()) if self._stored is not None else set()

    @property
    def there(self) -> bool:
        """Whether the run holds any."""
        return self._stored is not None or self._states is not None

    def has(self, prompt: str) -> bool:
        """Whether the run holds those of a prompt."""
        states = set(self._states.keys()) if self._states is not None else set()
        return bool({prompt, f"{prompt}/values"} & self._names) or prompt in states

    def tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has."""
        return next(info.tokens for info in self._run.info.prompts if info.id == prompt)

    def of(self, prompt: str) -> Source:
        """Return the logits of one prompt.

        Raises:
            CheckError: The run has none for it.
        """
        if prompt in self._names and self._stored is not None:
            return self._full(self._stored.get_slice(prompt))
        if f"{prompt}/values" in self._names:
            return self._top(prompt)
        if self._states is not None and prompt in self._states.keys():  # noqa: SIM118
            return self._from_state(self._states.get_slice(prompt))
        raise CheckError(f"{self._run.path}: holds no logits of prompt {prompt!r}")

    def _open(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self._run.path / name
        if not path.is_file():
            return None
        try:
            return self._files.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise CheckError(f"{path}: cannot be read as part of a run: {error}") from error

    def _shape(self, stored: Any, name: str) -> list[int]:
        """Return the shape of real numbers [T, D]."""
        shape: list[int] = stored.get_shape()
        if len(shape) != 2 or not shape[1] or not stored[:0].is_floating_point():
            raise CheckError(
                f"{self._run.path / name}: holds {stored.get_dtype()} {shape}, expected real "
                "numbers, a row for each token"
            )
        return shape

    def _full(self, stored: Any) -> Full:
        positions, vocabulary = self._shape(stored, LOGITS_FILE)
        block = max(1, BLOCK_ELEMENTS // max(1, vocabulary))
        return Full(positions, vocabulary, lambda first, stop: stored[first:stop], block)

    def _top(self, prompt: str) -> Top:
        values, tokens, total = self._run.top_logits(prompt)
        logprobs = values.double() - total.double().unsqueeze(-1)
        following = torch.full((len(logprobs),), torch.nan, dtype=torch.float64)
        if f"{prompt}/{FOLLOWING}" in self._names and self._stored is not None:
            following = self._stored.get_tensor(f"{prompt}/{FOLLOWING}").double()
        if following.shape != total.shape:
            raise CheckError(
                f"{self._run.path / LOGITS_FILE}: {FOLLOWING} of {prompt!r} has the shape "
                f"{list(following.shape)}, expected {list(total.shape)}"
            )
        rows = TopRows(
            tokens=tokens.long(), logprobs=logprobs, following=following, ranked=tokens.shape[1]
        )
        return Top(len(logprobs), rows)

    def _from_state(self, stored: Any) -> Full:
        if self._head is None:
            self._head = _StreamedHead(self._run, self._head_of, self._files)
        head = self._head
        positions, width = self._shape(stored, FINAL_HIDDEN_FILE)
        if width != head.width:
            raise CheckError(
                f"{self._run.path / FINAL_HIDDEN_FILE}: states of width {width}, but the head of "
                f"{head.location} takes {head.width}; name the run's own checkpoint with --head"
            )
        block = max(1, _STATE_ELEMENTS // head.vocabulary)
        return Full(positions, head.vocabulary, lambda first, stop: head(stored[first:stop]), block)


class _StreamedHead:
    """The head of a checkpoint, read anew for each block of states."""

    def __init__(self, run: Run, location: str | None, files: ExitStack) -> None:
        location = location or run.info.checkpoint.get("location")
        if not location:
            raise CheckError(
                f"{run.path}: holds final states and does not say of which checkpoint; give the "
                "checkpoint that has the head with --head"
            )
        self.location = str(location)
        try:
            checkpoint = open_checkpoint(self.location)
        except CheckError as error:
            raise CheckError(
                f"{run.path} holds final states, which need the head of {self.location}: {error}; "
                "say where the checkpoint lies with --head"
            ) from error
        if HEAD not in checkpoint.weights:
            raise CheckError(f"{self.location}: holds no {HEAD}")
        weight = checkpoint.weights[HEAD]
        self.vocabulary, self.width = weight.shape
        mode = run.info.mode
        meter = Meter()
        reader = files.enter_context(
            ReadAhead(checkpoint.storage, _HEAD_AHEAD, meter, lambda: None)
        )
        settings = LinearSettings(
            mode=LinearMode(mode) if mode in set(LinearMode) else LinearMode.WEIGHT_ONLY,
            device=torch.device("cpu"),
            chunk=_HEAD_CHUNK,
            quantization=checkpoint.quantization,
        )
        self._head = Head(weight, reader, settings, meter)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        logits = torch.empty(len(states), self.vocabulary, dtype=states.dtype)
        for first, part in self._head.logits(states):
            logits[:, first : first + part.shape[1]] = part
        return logits
