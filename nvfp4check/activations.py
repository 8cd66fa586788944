"""Run directories: what one forward pass of a model left behind, whoever made the pass.

    RUN/run.json                    schema nvfp4check/run/1: checkpoint, config, mode, prompts …
    RUN/tokens.safetensors          <prompt id>: int64 [T]
    RUN/logits.safetensors          <prompt id>: [T, vocabulary]; of the N best alone:
                                    <prompt id>/values, /tokens (int32) [T, N], /logsumexp [T]
    RUN/final_hidden.safetensors    <prompt id>: [T, hidden], after the final norm
    RUN/layers/NNN.safetensors      <prompt id>/<point>, one row a token
    RUN/mtp/NNN/                    logits or final_hidden as above, of layer NNN of multi-token
                                    prediction: rows 0 to T - 2 for the first, one fewer for each
                                    further, row i predicts token i + 2; prompts without rows are
                                    left out. Its points are in layers/NNN, with eh_proj
    RUN/bounds/NNN.safetensors      <prompt id>/<point>/<dtype>: float64 [T], how far a correct
                                    candidate of that dtype may lie from each token; <dtype>/tp8 of
                                    an engine of 8 ranks

Points: attn_input attn_output mlp_input mlp_output hidden (the residual stream after the layer),
and in layers with experts router_scores (float32 [T, E]: sigmoid + bias, what the choice is made
by, before groups are masked), router_experts (int32 [T, k], in any order), router_weights ([T, k]).

Every file is written whole or not at all: to a temporary name, to the disk, then renamed. The same
tensors give the same bytes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from nvfp4check.findings import CheckError
from nvfp4check.run_info import PromptInfo as PromptInfo
from nvfp4check.run_info import RunInfo as RunInfo

if TYPE_CHECKING:
    import torch

#: What a run keeps of the best logits, each under `<prompt id>/<part>`.
TOP_PARTS = ("values", "tokens", "logsumexp")

HIDDEN, EH_PROJ = "hidden", "eh_proj"
ROUTER_SCORES, ROUTER_EXPERTS = "router_scores", "router_experts"
ROUTER_POINTS = (ROUTER_SCORES, ROUTER_EXPERTS, "router_weights")
POINTS = ("attn_input", "attn_output", "mlp_input", "mlp_output", HIDDEN, *ROUTER_POINTS)

RUN_FILE = "run.json"
TOKENS_FILE = "tokens.safetensors"
LOGITS_FILE = "logits.safetensors"
FINAL_HIDDEN_FILE = "final_hidden.safetensors"
LAYERS_FOLDER = "layers"
BOUNDS_FOLDER = "bounds"
MTP_FOLDER = "mtp"

#: What a layer of multi-token prediction gives at its end, beside its points.
MTP_ENDS = {"final_hidden": FINAL_HIDDEN_FILE, "logits": LOGITS_FILE}

#: More layers than any model has.
MOST_LAYERS = 1 << 12

#: Experts of a layer, where a run does not say how many there are: more than any model has.
MOST_EXPERTS = 1 << 16

#: Beside the bounds: codes that were counted as flipped, and whose experts cannot legally change.
STRADDLES, SETTLED = "straddles", "settled"
#: And where attention errs whose cache keeps values in place of FP8 codes.
UNCACHED = "uncached"


class Run:
    """A run directory, read as needed."""

    def __init__(self, path: Path, info: RunInfo) -> None:
        self.path = path
        self.info = info

    @classmethod
    def open(cls, path: str | Path, *, incomplete: bool = False) -> Self:
        """Open a run directory; one that is not complete only where asked for.

        Raises:
            CheckError: There is no run, or it is not complete.
        """
        path = Path(path)
        _require_kinds(path)
        try:
            document = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
            info = RunInfo.from_json(document)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckError(
                f"{path}: no {RUN_FILE}; give a directory that `nvfp4check forward` or "
                "`nvfp4check.capture` wrote"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckError(f"{path / RUN_FILE}: not a run: {error}") from error
        if not info.complete and not incomplete:
            raise CheckError(
                f"{path}: this run was not finished; continue it with the same command and --resume"
            )
        return cls(path, info)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The ids of the prompts, in the order of the run."""
        return tuple(prompt.id for prompt in self.info.prompts)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that have recorded points."""
        files = (self.path / LAYERS_FOLDER).glob("*.safetensors")
        found = tuple(sorted(int(file.stem) for file in files if file.stem.isdecimal()))
        if found and found[-1] >= MOST_LAYERS:
            raise CheckError(
                f"{self.path / LAYERS_FOLDER}: holds a layer {found[-1]}, expected numbers below "
                f"{MOST_LAYERS}"
            )
        return found

    @property
    def own_layers(self) -> tuple[int, ...]:
        """Those of the model itself, without multi-token prediction."""
        count = self.info.config.get("num_hidden_layers")
        return tuple(n for n in self.layers if type(count) is not int or n < count)

    def tokens(self, prompt: str) -> "torch.Tensor":
        """Return the tokens of a prompt, int64 [T].

        Raises:
            CheckError: The run holds none, or another number of them than it says.
        """
        found = self._tensor(self.path / TOKENS_FILE, prompt, rank=1, whole=True)
        said = next((info.tokens for info in self.info.prompts if info.id == prompt), len(found))
        if len(found) != said:
            raise CheckError(
                f"{self.path / TOKENS_FILE}: holds {len(found):,} tokens of prompt {prompt!r}, and "
                f"{RUN_FILE} says {said:,}"
            )
        return found

    @property
    def has_logits(self) -> bool:
        """Whether the run holds logits over the whole vocabulary."""
        return (self.path / LOGITS_FILE).is_file() and self.prompts[0] in self._names(
            self.path / LOGITS_FILE
        )

    def logits(self, prompt: str) -> "torch.Tensor":
        """Return the logits of a prompt, [T, vocabulary].

        Raises:
            CheckError: The run holds none, or only the best of them.
        """
        return self._tensor(self.path / LOGITS_FILE, prompt, rank=2)

    def top_logits(self, prompt: str) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
        """Return the best logits [T, N], their tokens [T, N] and the log of the sum of all [T].

        Raises:
            CheckError: The run holds no such logits.
        """
        file = self.path / LOGITS_FILE
        names = [f"{prompt}/{part}" for part in TOP_PARTS]
        values = self._tensor(file, names[0], rank=2)
        tokens = self._tensor(file, names[1], rank=2, whole=True)
        total = self._tensor(file, names[2], rank=1)
        if not values.shape[1] or tokens.shape != values.shape or len(total) != len(values):
            shapes = ", ".join(str(list(part.shape)) for part in (values, tokens, total))
            raise CheckError(
                f"{file}: the best logits of {prompt!r} have the shapes {shapes}; expected [T, N], "
                "[T, N] and [T], N at least 1"
            )
        return values, tokens, total

    def mtp_logits(self, layer: int, prompt: str) -> "torch.Tensor":
        """Return the logits of a layer of multi-token prediction, one row a token it predicts.

        Raises:
            CheckError: The run holds none for the prompt.
        """
        return self.point(layer, prompt, "logits")

    @property
    def has_final_hidden(self) -> bool:
        """Whether the run holds the state after the final norm."""
        return (self.path / FINAL_HIDDEN_FILE).is_file()

    def final_hidden(self, prompt: str) -> "torch.Tensor":
        """Return the state of a prompt after the final norm, [T, hidden].

        Raises:
            CheckError: The run holds none.
        """
        return self._tensor(self.path / FINAL_HIDDEN_FILE, prompt, rank=2)

    def points(self, layer: int) -> tuple[str, ...]:
        """Return the points recorded at a layer, in the order of the computation."""
        names = self._names(self.layer_file(layer))
        found = {name.rpartition("/")[2] for name in names}
        return (*(p for p in POINTS if p in found), *sorted(found.difference(POINTS)))

    def rows(self, layer: int, prompt: str) -> int:
        """Return how many rows a layer has of a prompt: those of prediction have fewer each."""
        tokens = next(info.tokens for info in self.info.prompts if info.id == prompt)
        count = self.info.config.get("num_hidden_layers")
        beyond = 0 if type(count) is not int else max(0, layer - count + 1)
        return max(0, tokens - beyond)

    def point(self, layer: int, prompt: str, point: str) -> "torch.Tensor":
        """Return what was recorded at a point, one row a token; `MTP_ENDS` among them.

        Raises:
            CheckError: It was not recorded, or cannot be what that point gives.
        """
        if point in MTP_ENDS:
            return self._tensor(mtp_folder(self.path, layer) / MTP_ENDS[point], prompt, rank=2)
        file, name = self.layer_file(layer), f"{prompt}/{point}"
        if point == ROUTER_EXPERTS:
            return self._experts(file, prompt)
        return self._tensor(file, name, rank=2 if point in (*POINTS, EH_PROJ) else None)

    def _experts(self, file: Path, prompt: str) -> "torch.Tensor":
        name, scores = f"{prompt}/{ROUTER_EXPERTS}", f"{prompt}/{ROUTER_SCORES}"
        experts = self._tensor(file, name, rank=2, whole=True)
        with opened(file) as tensors:
            shape = tensors.get_slice(scores).get_shape() if scores in tensors.keys() else []  # noqa: SIM118
        counts = [self.info.config.get("n_routed_experts"), *shape[1:]]
        last = min((n for n in counts if type(n) is int), default=MOST_EXPERTS) - 1
        outside = experts[(experts < 0) | (experts > last)]
        if outside.numel():
            raise CheckError(
                f"{file}: {name!r} holds expert {int(outside[0])}, expected 0 to {last}"
            )
        return experts

    def bounded(self, layer: int) -> frozenset[str]:
        """Return what the bounds of a layer are of, as `<prompt>/<point>/<dtype>`."""
        file = bounds_file(self.path, layer)
        return frozenset(self._names(file)) if file.is_file() else frozenset()

    def bound(self, layer: int, prompt: str, point: str, dtype: str) -> "torch.Tensor":
        """Return how far each token of a candidate of a dtype may lie off at a point, [T].

        Raises:
            CheckError: It was not derived, or is none.
        """
        file, name = bounds_file(self.path, layer), f"{prompt}/{point}/{dtype}"
        bound = self._tensor(file, name, rank=1, whole=point in (STRADDLES, SETTLED))
        tokens = self.rows(layer, prompt)
        if len(bound) != tokens or not bool((bound >= 0).all()):
            raise CheckError(
                f"{file}: {name!r} is no bound: expected a number from 0 on for each of "
                f"{tokens} tokens"
            )
        return bound

    def uncached(self, layer: int, prompt: str, dtype: str) -> "torch.Tensor":
        """Return in which direction attn_output errs if its cache keeps values, [T, D].

        Raises:
            CheckError: It was not derived, or is none.
        """
        file, name = bounds_file(self.path, layer), f"{prompt}/{UNCACHED}/{dtype}"
        found = self._tensor(file, name, rank=2)
        if len(found) != self.rows(layer, prompt):
            raise CheckError(
                f"{file}: {name!r} is {list(found.shape)}, expected a row for each of "
                f"{self.rows(layer, prompt)} tokens"
            )
        return found

    def layer_file(self, layer: int) -> Path:
        """Return where a layer's points lie."""
        return layer_file(self.path, layer)

    def _tensor(
        self, file: Path, name: str, *, rank: int | None = None, whole: bool = False
    ) -> "torch.Tensor":
        """Read a tensor; with a rank, refuse it where that or the kind of number is another."""
        with opened(file) as tensors:
            if name not in tensors.keys():  # noqa: SIM118  (not a mapping)
                held = ", ".join(sorted(tensors.keys())[:4])
                raise CheckError(f"{file}: holds no {name!r}; it holds {held} …")
            tensor: torch.Tensor = tensors.get_tensor(name)
        if rank is not None:
            _require_form(f"{file}: {name!r}", tensor, rank, whole=whole)
        return tensor

    def _names(self, file: Path) -> list[str]:
        with opened(file) as tensors:
            return list(tensors.keys())


def _require_kinds(run: Path) -> None:
    """Refuse a part of a run that is a pipe, a link in a circle, or a folder for a file.

    Raises:
        CheckError: One is.
    """
    for names, kind, fits in (
        ((RUN_FILE, TOKENS_FILE, LOGITS_FILE, FINAL_HIDDEN_FILE), "file", Path.is_file),
        ((LAYERS_FOLDER, BOUNDS_FOLDER, MTP_FOLDER), "folder", Path.is_dir),
    ):
        for path in (run / name for name in names):
            if os.path.lexists(path) and not fits(path):
                raise CheckError(
                    f"{path}: is no {kind} and leads to none, so that it cannot be part of a run"
                )


def _require_form(where: str, tensor: "torch.Tensor", rank: int, *, whole: bool) -> None:
    """Check what kind of numbers a tensor of a run holds, and in how many dimensions.

    Raises:
        CheckError: It is of another form.
    """
    kind = str(tensor.dtype).removeprefix("torch.")
    fits = kind.startswith(("int", "uint")) if whole else tensor.is_floating_point()
    if tensor.dim() != rank or not fits:
        raise CheckError(
            f"{where} is {kind} {list(tensor.shape)}, expected {'whole' if whole else 'real'} "
            f"numbers in {rank} dimension{'s' if rank > 1 else ''}"
        )


def opened(file: Path) -> Any:
    """Open a file of tensors that is part of a run.

    Raises:
        CheckError: It is not there, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckError(f"{file}: cannot be read as part of a run: {error}") from error


def layer_file(run: Path, layer: int) -> Path:
    """Return where a layer's points lie in a run."""
    return run / LAYERS_FOLDER / f"{layer:03d}.safetensors"


def mtp_folder(run: Path, layer: int) -> Path:
    """Return where the logits of a layer of multi-token prediction lie in a run."""
    return run / MTP_FOLDER / f"{layer:03d}"


def bounds_file(run: Path, layer: int) -> Path:
    """Return where a layer's bounds lie in a run."""
    return run / BOUNDS_FOLDER / f"{layer:03d}.safetensors"


def write_info(run: Path, info: RunInfo) -> None:
    """Write run.json."""
    run.mkdir(parents=True, exist_ok=True)
    text = json.dumps(info.to_json(), indent=1, ensure_ascii=False) + "\n"
    write_bytes(run / RUN_FILE, text.encode("utf-8"))


def write_tensors(file: Path, tensors: "Mapping[str, torch.Tensor]") -> None:
    """Write a safetensors file; tensors may lie on any device and in any stride."""
    from safetensors.torch import save

    file.parent.mkdir(parents=True, exist_ok=True)
    owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(file, save(owned))


def write_bytes(file: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(run: Path) -> Iterator[Path]:
    """Find the temporary files that a killed process left in a run."""
    yield from run.glob("**/.*.tmp")
