"""What a fault of the catalogue is, and the copy of a checkpoint that one is planted in."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint, open_checkpoint
from nvfp4check.checkpoint.scan import why_not_scannable
from nvfp4check.checkpoint.values import torch_of
from nvfp4check.findings import CheckError
from nvfp4ref import e2m1, e4m3, packing
from nvfp4ref.formats import BLOCK_SIZE

Bytes = npt.NDArray[np.uint8]
Need = Callable[[LogicalWeight], bool]


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that planting changed.

    `first` and `last` are offsets into the file of the first and the last changed byte, where
    bytes changed in their place; `count` is how many did.
    """

    file: str
    what: str
    tensor: str | None = None
    count: int | None = None
    first: int | None = None
    last: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFault:
    """A defect that a stored checkpoint can carry, and who sees it.

    `found_by` are the rules that fire without a base; `found_with_base` those of the audit, of
    which one fires at least; `also` are rules that may fire beside them, as consequences. `remark`
    says why no rule sees it, or when one does that usually does not.
    """

    id: str
    name: str
    does: str
    threads: tuple[str, ...]
    found_by: tuple[str, ...] = ()
    found_with_base: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    remark: str = ""
    plant: "Callable[[Planting], None]"

    @property
    def visibility(self) -> str:
        """Who finds it, in words."""
        if self.found_by:
            return "validate"
        return "validate --base" if self.found_with_base else "not visible in files"


def fault(
    identifier: str,
    name: str,
    *,
    does: str,
    threads: tuple[str, ...] = (),
    found_by: tuple[str, ...] = (),
    found_with_base: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
    remark: str = "",
) -> "Callable[[Callable[[Planting], None]], CheckpointFault]":
    """Make a fault of the function below it. Threads are spelt "owner/name/pull/1"."""

    def make(plant: "Callable[[Planting], None]") -> CheckpointFault:
        return CheckpointFault(
            id=identifier,
            name=name,
            does=does,
            threads=tuple(f"https://github.com/{thread}" for thread in threads),
            found_by=found_by,
            found_with_base=found_with_base,
            also=also,
            remark=remark,
            plant=plant,
        )

    return make


class Planting:
    """A copy of a checkpoint to plant in: what may be chosen, what is read, what was changed."""

    def __init__(self, editor: CheckpointEditor, seed: int, pattern: str | None) -> None:
        self.editor = editor
        self.rng = np.random.default_rng(seed)
        self.pattern = pattern
        self.changes: list[Change] = []
        self.checkpoint: Checkpoint = open_checkpoint(editor.path)

    # Choosing

    def nvfp4(self, need: Need | None = None, what: str = "NVFP4 weight") -> LogicalWeight:
        """Choose a whole NVFP4 weight by the seed, among those that the pattern and `need` admit.

        Raises:
            CheckError: There is none.
        """

        def usable(weight: LogicalWeight) -> bool:
            return (
                weight.format is WeightFormat.NVFP4
                and Part.GLOBAL_SCALE in weight.parts
                and why_not_scannable(weight) is None
                and (need is None or need(weight))
            )

        return self.weight(usable, what)

    def weight(self, need: Need, what: str) -> LogicalWeight:
        """Choose any weight by the seed, among those that the pattern and `need` admit.

        Raises:
            CheckError: There is none.
        """
        return self.one_of(
            [w for w in self.checkpoint.weights.values() if self._admits(w) and need(w)], what
        )

    def one_of(self, choices: Sequence[LogicalWeight], what: str) -> LogicalWeight:
        """Choose one by the seed.

        Raises:
            CheckError: There is none.
        """
        if not choices:
            where = "" if self.pattern is None else f" that --tensor {self.pattern} fits"
            raise CheckError(f"cannot plant: the checkpoint has no {what}{where}")
        return choices[int(self.rng.integers(len(choices)))]

    def _admits(self, weight: LogicalWeight) -> bool:
        if self.pattern is None:
            return True
        names = (weight.name, weight.module, *(entry.name for entry in weight.entries))
        return any(fnmatch.fnmatchcase(name, self.pattern) for name in names)

    def sibling(self, weight: LogicalWeight, leaf: str) -> LogicalWeight | None:
        """Find the weight of another projection of the same MLP, expert or attention."""
        return self.checkpoint.weights.get(f"{weight.module.rpartition('.')[0]}.{leaf}.weight")

    # Reading: the files as they are, after whatever was changed before

    def codes(self, weight: LogicalWeight) -> torch.Tensor:
        """Read codes [N, K], one a byte."""
        return packing.unpack(self.tensor(weight.parts[Part.CODES].name).view(torch.uint8))

    def scales(self, weight: LogicalWeight) -> torch.Tensor:
        """Read the bytes of block scales [N, C]."""
        return self.tensor(weight.parts[Part.BLOCK_SCALES].name).view(torch.uint8)

    def scalar(self, weight: LogicalWeight, part: Part) -> float:
        """Read a scale of one element."""
        return float(self.tensor(weight.parts[part].name).double().item())

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        entry = self.editor.entry(name)
        return torch_of(np.frombuffer(self.editor.read(name), np.uint8), entry)

    def in_scales(self, weight: LogicalWeight) -> torch.Tensor:
        """Decode to units of the global scale [N, K]: code times block scale, exact."""
        spread = e4m3.decode(self.scales(weight)).repeat_interleave(BLOCK_SIZE, 1)
        return e2m1.decode(self.codes(weight)) * spread

    # Changing

    def set_codes(self, weight: LogicalWeight, codes: torch.Tensor, what: str) -> None:
        """Overwrite codes [N, K]."""
        self.overwrite(weight.parts[Part.CODES].name, packing.pack(codes.to(torch.uint8)), what)

    def set_scales(self, weight: LogicalWeight, scales: torch.Tensor, what: str) -> None:
        """Overwrite the bytes of block scales [N, C]."""
        self.overwrite(weight.parts[Part.BLOCK_SCALES].name, scales.to(torch.uint8), what)

    def set_scalar(self, weight: LogicalWeight, part: Part, value: float, what: str) -> None:
        """Overwrite a scale of one element."""
        before = self.tensor(weight.parts[part].name)
        after = torch.full_like(before, value)
        self.overwrite(
            weight.parts[part].name,
            after,
            f"{what}: {before.item():.6g} becomes {after.item():.6g}",
        )

    def scale_global(self, weight: LogicalWeight, factor: float, what: str) -> None:
        """Multiply the global decode scale, in whichever direction it is stored."""
        stored = self.scalar(weight, Part.GLOBAL_SCALE)
        value = stored / factor if weight.global_scale_is_reciprocal else stored * factor
        self.set_scalar(weight, Part.GLOBAL_SCALE, value, what)

    def overwrite(self, name: str, values: torch.Tensor, what: str) -> None:
        """Overwrite a tensor with values of its own dtype and size.

        Raises:
            CheckError: That would not change a byte.
        """
        entry = self.editor.entry(name)
        new = values.contiguous().flatten().view(torch.uint8).numpy()
        old = np.frombuffer(self.editor.read(name), np.uint8)
        different = np.flatnonzero(old != new)
        if not different.size:
            raise CheckError(
                f"cannot plant in {name}: it would not change a byte; choose another tensor with "
                "--tensor, or another --seed"
            )
        first, last = int(different[0]), int(different[-1])
        self.editor.patch(name, new[first : last + 1].tobytes(), first)
        self.note(
            entry,
            what,
            count=int(different.size),
            first=entry.start + first,
            last=entry.start + last,
        )

    def note(
        self,
        entry: TensorEntry,
        what: str,
        count: int | None = None,
        first: int | None = None,
        last: int | None = None,
    ) -> None:
        """Record a change of a tensor."""
        self.changes.append(Change(entry.shard, what, entry.name, count, first, last))

    def note_file(self, file: str, what: str, count: int | None = None) -> None:
        """Record a change of a file."""
        self.changes.append(Change(file, what, count=count))


def is_expert(weight: LogicalWeight) -> bool:
    """Whether the weight is a routed expert's."""
    return ".experts." in weight.name


def leaf(weight: LogicalWeight) -> str:
    """Return the last part of the module's name: gate_proj, o_proj."""
    return weight.module.rpartition(".")[2]
