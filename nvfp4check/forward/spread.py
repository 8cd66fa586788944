"""Experts computed by the workers of an engine, on this machine or on others.

Each work item is a few experts of one layer with the rows of their tokens. A worker reads and
multiplies them as the run itself would and gives back the outputs, not their sum: the run adds
them in the order of the experts, so it has the bits of a run without an engine. Workers take as
many threads as the run has, for sums of float32 products depend on how they are split.

Rows travel as safetensors, each expert's under its number.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load, save

from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.engine import Engine
from nvfp4check.forward.inventory import EXPERT_PARTS
from nvfp4check.forward.linears import LinearSettings
from nvfp4check.forward.meter import Meter
from nvfp4check.forward.reading import ReadAhead
from nvfp4check.forward.source import StreamedSource
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.moe import ExpertOutputs, Experts, mlp
from nvfp4ref.deepseek_v3.weights import mlp_weights

#: Bytes of the experts of one work item, the last expert excepted.
_ITEM_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Item:
    """Experts of a layer, and for each the rows of its tokens."""

    experts: tuple[int, ...]
    rows: bytes


@dataclass(frozen=True, slots=True)
class _Done:
    """The outputs of an item's experts, and what it cost."""

    outputs: bytes
    meter: Meter


class SpreadExperts:
    """Has the experts of a run computed by an engine."""

    def __init__(
        self,
        engine: Engine,
        checkpoint: Checkpoint,
        config: DeepseekV3Config,
        settings: LinearSettings,
        meter: Meter,
        taken: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._checkpoint = checkpoint
        self._config = config
        self._settings = settings
        self._meter = meter
        #: Called after each item, when the meter knows of it.
        self._taken = taken

    def of(self, prefix: str, started: Callable[[], None]) -> ExpertOutputs:
        """Return how the experts `<prefix>.<index>` are computed; `started` is called before."""

        def outputs(
            experts: Experts, x: torch.Tensor, tokens: Mapping[int, torch.Tensor]
        ) -> Iterator[torch.Tensor]:
            started()
            yield from self._outputs(prefix, x, tokens)

        return outputs

    def _outputs(
        self, prefix: str, x: torch.Tensor, tokens: Mapping[int, torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        weights = {
            expert: [
                self._checkpoint.weights[f"{prefix}.{expert}.{part}.weight"]
                for part in EXPERT_PARTS
            ]
            for expert in tokens
        }
        sizes = {expert: sum(w.nbytes for w in weights[expert]) for expert in tokens}
        items = _Items(_grouped(sizes), x, tokens)
        # Workers need the tensors of these experts, and nothing else of the checkpoint.
        lean = replace(
            self._checkpoint,
            files={},
            shards={},
            tensors={e.name: e for expert in weights.values() for w in expert for e in w.entries},
            duplicates={},
            index=None,
            json_problems=[],
        )
        arguments = (lean, self._config, self._settings, prefix, torch.get_num_threads())

        def finished(position: int, done: _Done) -> None:
            self._meter.add(done.meter)
            self._taken()

        found = self._engine.map(
            _compute, items, prepare=_prepare, arguments=arguments, finished=finished
        )
        for item, done in zip(items.groups, found, strict=True):
            rows = load(done.outputs)
            yield from (rows[str(expert)] for expert in item)


class _Items(Sequence[_Item]):
    """Work items, each made when it is handed out: all rows at once would be k times x."""

    def __init__(
        self, groups: list[tuple[int, ...]], x: torch.Tensor, tokens: Mapping[int, torch.Tensor]
    ) -> None:
        self.groups = groups
        self._x = x
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, position: int) -> _Item:  # type: ignore[override]  # no slices
        experts = self.groups[position]
        return _Item(experts, save({str(e): self._x[self._tokens[e]] for e in experts}))


def _grouped(sizes: Mapping[int, int]) -> list[tuple[int, ...]]:
    """Return the experts in groups of some `_ITEM_BYTES`, in their order."""
    groups: list[tuple[int, ...]] = []
    room = 0
    for expert, size in sizes.items():
        if room <= 0:
            groups.append(())
            room = _ITEM_BYTES
        groups[-1] += (expert,)
        room -= size
    return groups


@dataclass(frozen=True, slots=True)
class _Worker:
    """What a worker holds from one item to the next."""

    checkpoint: Checkpoint
    config: DeepseekV3Config
    settings: LinearSettings
    prefix: str


_worker: _Worker | None = None


def _prepare(
    checkpoint: Checkpoint,
    config: DeepseekV3Config,
    settings: LinearSettings,
    prefix: str,
    threads: int,
) -> None:
    global _worker
    torch.set_num_threads(threads)
    _worker = _Worker(checkpoint, config, settings, prefix)


def _compute(item: _Item) -> _Done:
    """Compute the experts of one item."""
    if _worker is None:
        raise RuntimeError("the worker was not prepared")
    meter = Meter()
    rows = load(item.rows)
    prefix = _worker.prefix
    names = [f"{prefix}.{e}.{part}.weight" for e in item.experts for part in EXPERT_PARTS]
    weights = [_worker.checkpoint.weights[name] for name in names]
    ahead = max(weight.nbytes for weight in weights)
    with ReadAhead(_worker.checkpoint.storage, ahead, meter) as reader:
        source = StreamedSource(_worker.checkpoint, _worker.config, reader, _worker.settings, meter)
        reader.announce(weights)
        outputs = {
            str(expert): mlp(rows[str(expert)], mlp_weights(source, f"{prefix}.{expert}"))
            for expert in item.experts
        }
    return _Done(save({name: rows.contiguous() for name, rows in outputs.items()}), meter)
