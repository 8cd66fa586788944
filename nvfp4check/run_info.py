"""run.json: how a run was made, and over which prompts.

Any engine may write it, so nothing in it is taken to be what it should be.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import nvfp4check

SCHEMA = "nvfp4check/run/1"

#: What run.json says in words, or not at all.
_TEXTS = ("mode", "kv_cache", "dtype", "device", "activations", "logits", "perturb", "routing")


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
    #: How many processes each had a share of the products and added them up; None: not known.
    ranks: int | None = None
    #: Arithmetics of candidates that bounds were derived for.
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
        if not isinstance(document, Mapping):
            raise ValueError("no JSON object")
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
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"a prompt without id or number of tokens ({error})") from error
        if values.get("layers") is not None:
            layers = values["layers"]
            if not _whole(layers) or len(layers) != 2:
                raise ValueError(
                    f"layers {layers!r}, expected the first and the one after the last"
                )
            values["layers"] = tuple(layers)
        ids = [prompt.id for prompt in values["prompts"]]
        if len(set(ids)) < len(ids):
            raise ValueError("a prompt id occurs twice")
        for name in ("checkpoint", "config", "versions"):
            if not isinstance(values.get(name, {}), dict):
                raise ValueError(f"{name} is no object")
        for name in _TEXTS:
            if not isinstance(values.get(name), str | None):
                raise ValueError(f"{name} is no text")
        if any(not isinstance(prompt.text, str | None) for prompt in values["prompts"]):
            raise ValueError("the text of a prompt is no text")
        if not _whole([values.get("mtp", 0)]):
            raise ValueError("mtp is no number of layers")
        if values.get("seed") is not None and not _whole([values["seed"]]):
            raise ValueError("seed is no whole number")
        if not isinstance(values.get("complete", False), bool):
            raise ValueError("complete is neither true nor false")
        if any(prompt.tokens < 0 for prompt in values["prompts"]):
            raise ValueError("a prompt has fewer than 0 tokens")
        ranks = values.get("ranks")
        if ranks is not None and (type(ranks) is not int or ranks < 1):
            raise ValueError("ranks is no number of processes")
        bounds, inputs = values.get("bounds") or [], values.get("inputs")
        if not isinstance(bounds, list) or not all(isinstance(name, str) for name in bounds):
            raise ValueError("bounds is no list of dtypes")
        values["bounds"] = tuple(bounds)
        if not isinstance(inputs, dict | None):
            raise ValueError("inputs is no object")
        return cls(**values)


def _whole(values: object) -> bool:
    """Tell whether something is a list of whole numbers that are not below 0."""
    return isinstance(values, list | tuple) and all(type(n) is int and n >= 0 for n in values)
