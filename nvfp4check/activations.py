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
                                    candidate of that dtype may lie from each token

Points: attn_input attn_output mlp_input mlp_output hidden (the residual stream after the layer),
and in layers with experts router_scores (float32 [T, E]: sigmoid + bias, what the choice is made
by, before groups are masked), router_experts (int32 [T, k], in any order), router_weights ([T, k]).

Every file is written whole or not at all: to a temporary name, to the disk, then renamed. The same
tensors give the same bytes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import nvfp4check
from nvfp4check.findings import CheckError

if TYPE_CHECKING:
    import torch

SCHEMA = "nvfp4check/run/1"

#: What a run keeps of the best logits, each under `<prompt id>/<part>`.
TOP_PARTS = ("values", "tokens", "logsumexp")

HIDDEN = "hidden"
ROUTER_POINTS = ("router_scores", "router_experts", "router_weights")
POINTS = ("attn_input", "attn_output", "mlp_input", "mlp_output", HIDDEN, *ROUTER_POINTS)

RUN_FILE = "run.json"
TOKENS_FILE = "tokens.safetensors"
LOGITS_FILE = "logits.safetensors"
FINAL_HIDDEN_FILE = "final_hidden.safetensors"
LAYERS_FOLDER = "layers"
BOUNDS_FOLDER = "bounds"
MTP_FOLDER = "mtp"

#: Beside the bounds: codes that were counted as flipped, and whose experts cannot legally change.
STRADDLES, SETTLED = "straddles", "settled"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptInfo:
    """One prompt of a run."""

    id: str
    #: How many tokens it has.
    tokens: int
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """run.json: how the run was made."""

    prompts: tuple[PromptInfo, ...]
    #: Whether everything that was asked for is there.
    complete: bool = False
    #: Location, fingerprint and architecture of the checkpoint; free form for other engines.
    checkpoint: dict[str, Any] = field(default_factory=dict)
    #: config.json of the model.
    config: dict[str, Any] = field(default_factory=dict)
    mode: str | None = None
    kv_cache: str | None = None
    dtype: str | None = None
    device: str | None = None
    activations: str | None = None
    logits: str | None = None
    #: First layer computed, and the one after the last.
    layers: tuple[int, int] | None = None
    #: How many layers of multi-token prediction follow them.
    mtp: int = 0
    perturb: str | None = None
    seed: int | None = None
    #: The run whose experts were forced.
    routing: str | None = None
    #: Dtypes of candidates that bounds were derived for.
    bounds: tuple[str, ...] = ()
    #: Digest by prompt of the states that each layer began with, where another run gave them.
    inputs: dict[str, str] | None = None
    #: Name and version of whatever made the run, and of what it ran on.
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the document."""
        tool = {"name": "nvfp4check", "version": nvfp4check.__version__}
        return {"schema": SCHEMA, "tool": tool, **asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Return what a document says; fields of later versions are left aside.

        Raises:
            ValueError: The document is not a run.json of this schema.
        """
        if document.get("schema") != SCHEMA:
            raise ValueError(f"schema {document.get('schema')!r}, expected {SCHEMA!r}")
        known = {entry.name for entry in fields(cls)}
        values = {name: value for name, value in document.items() if name in known}
        prompts = values.get("prompts")
        if not isinstance(prompts, list) or not prompts:
            raise ValueError("no list of prompts")
        try:
            values["prompts"] = tuple(
                PromptInfo(id=str(p["id"]), tokens=int(p["tokens"]), text=p.get("text"))
                for p in prompts
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"a prompt without id or number of tokens ({error})") from error
        if values.get("layers") is not None:
            first, stop = values["layers"]
            values["layers"] = (int(first), int(stop))
        values["bounds"] = tuple(values.get("bounds") or ())
        for name in ("checkpoint", "config", "versions"):
            if not isinstance(values.get(name, {}), dict):
                raise ValueError(f"{name} is no object")
        return cls(**values)


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
        try:
            document = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
            info = RunInfo.from_json(document)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckError(
                f"{path}: no {RUN_FILE}; give a directory that `nvfp4check forward` or "
                "`nvfp4check.capture` wrote"
            ) from None
        except (OSError, ValueError, AttributeError, TypeError) as error:
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
        return tuple(sorted(int(file.stem) for file in files if file.stem.isdecimal()))

    @property
    def own_layers(self) -> tuple[int, ...]:
        """Those of the model itself, without multi-token prediction."""
        count = self.info.config.get("num_hidden_layers")
        return tuple(n for n in self.layers if type(count) is not int or n < count)

    def tokens(self, prompt: str) -> "torch.Tensor":
        """Return the tokens of a prompt, int64 [T]."""
        return self._tensor(self.path / TOKENS_FILE, prompt)

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
        return self._tensor(self.path / LOGITS_FILE, prompt)

    def top_logits(self, prompt: str) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
        """Return the best logits [T, N], their tokens [T, N] and the log of the sum of all [T].

        Raises:
            CheckError: The run holds no such logits.
        """
        file = self.path / LOGITS_FILE
        values, tokens, total = (self._tensor(file, f"{prompt}/{part}") for part in TOP_PARTS)
        return values, tokens, total

    def mtp_logits(self, layer: int, prompt: str) -> "torch.Tensor":
        """Return the logits of a layer of multi-token prediction, one row a token it predicts.

        Raises:
            CheckError: The run holds none for the prompt.
        """
        return self._tensor(mtp_folder(self.path, layer) / LOGITS_FILE, prompt)

    @property
    def has_final_hidden(self) -> bool:
        """Whether the run holds the state after the final norm."""
        return (self.path / FINAL_HIDDEN_FILE).is_file()

    def final_hidden(self, prompt: str) -> "torch.Tensor":
        """Return the state of a prompt after the final norm, [T, hidden].

        Raises:
            CheckError: The run holds none.
        """
        return self._tensor(self.path / FINAL_HIDDEN_FILE, prompt)

    def points(self, layer: int) -> tuple[str, ...]:
        """Return the points recorded at a layer, in the order of the computation."""
        names = self._names(self.layer_file(layer))
        found = {name.rpartition("/")[2] for name in names}
        return (*(p for p in POINTS if p in found), *sorted(found.difference(POINTS)))

    def point(self, layer: int, prompt: str, point: str) -> "torch.Tensor":
        """Return what was recorded at a point, one row a token.

        Raises:
            CheckError: It was not recorded.
        """
        return self._tensor(self.layer_file(layer), f"{prompt}/{point}")

    def bounded(self, layer: int) -> frozenset[str]:
        """Return what the bounds of a layer are of, as `<prompt>/<point>/<dtype>`."""
        file = bounds_file(self.path, layer)
        return frozenset(self._names(file)) if file.is_file() else frozenset()

    def bound(self, layer: int, prompt: str, point: str, dtype: str) -> "torch.Tensor":
        """Return how far each token of a candidate of a dtype may lie off at a point, [T].

        Raises:
            CheckError: It was not derived.
        """
        return self._tensor(bounds_file(self.path, layer), f"{prompt}/{point}/{dtype}")

    def layer_file(self, layer: int) -> Path:
        """Return where a layer's points lie."""
        return layer_file(self.path, layer)

    def _tensor(self, file: Path, name: str) -> "torch.Tensor":
        with opened(file) as tensors:
            if name not in tensors.keys():  # noqa: SIM118  (not a mapping)
                held = ", ".join(sorted(tensors.keys())[:4])
                raise CheckError(f"{file}: holds no {name!r}; it holds {held} …")
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor

    def _names(self, file: Path) -> list[str]:
        with opened(file) as tensors:
            return list(tensors.keys())


def opened(file: Path) -> Any:
    """Open a file of tensors that is part of a run.

    Raises:
        CheckError: It is not there, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (FileNotFoundError, SafetensorError) as error:
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
