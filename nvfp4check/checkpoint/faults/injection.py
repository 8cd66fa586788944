"""Plant one fault in a copy of a checkpoint: links for what stays, copies of what changes."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvfp4check import __version__
from nvfp4check.checkpoint.editing import link_checkpoint
from nvfp4check.checkpoint.faults import CHECKPOINT_FAULTS
from nvfp4check.checkpoint.faults.base import Change, CheckpointFault, Planting
from nvfp4check.findings import CheckError

SCHEMA = "nvfp4check/faults/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """What was planted, and where."""

    fault: CheckpointFault
    source: str
    target: str
    seed: int
    changes: tuple[Change, ...]
    files_changed: tuple[str, ...]
    files_linked: int

    def to_json(self) -> dict[str, Any]:
        """Return the document of schema nvfp4check/faults/1."""
        return {
            "schema": SCHEMA,
            "tool": {"name": "nvfp4check", "version": __version__},
            "planted": {
                "source": self.source,
                "target": self.target,
                "seed": self.seed,
                "changes": [asdict(change) for change in self.changes],
                "files_changed": [*self.files_changed],
                "files_linked": self.files_linked,
            },
            "faults": [record(self.fault)],
        }


def record(fault: CheckpointFault) -> dict[str, Any]:
    """Return a fault as JSON."""
    return {
        "kind": "checkpoint",
        "id": fault.id,
        "name": fault.name,
        "does": fault.does,
        "seen_by": fault.visibility,
        "found_by": [*fault.found_by],
        "found_with_base": [*fault.found_with_base],
        "remark": fault.remark,
        "threads": [*fault.threads],
    }


def inject(
    source: str | Path, target: str | Path, fault: str, *, tensor: str | None = None, seed: int = 0
) -> Injection:
    """Plant a fault in a copy. The source is only read; the target appears whole or not at all.

    Raises:
        CheckError: There is no such fault, the checkpoint has no place for it, or the target
            exists or lies inside the source.
    """
    chosen = _find(fault)
    place = _checked_target(str(source), Path(target))
    unfinished = place.with_name(f".{place.name}.unfinished-{os.getpid()}")
    try:
        editor = link_checkpoint(source, unfinished)
        planting = Planting(editor, seed, tensor)
        chosen.plant(planting)
        changed, linked = _compare(Path(source), unfinished)
        os.rename(unfinished, place)
    except OSError as error:
        raise CheckError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Injection(
        fault=chosen,
        source=str(source),
        target=str(target),
        seed=seed,
        changes=tuple(planting.changes),
        files_changed=changed,
        files_linked=linked,
    )


def _find(fault: str) -> CheckpointFault:
    names: Mapping[str, CheckpointFault] = {
        **{known.name: known for known in CHECKPOINT_FAULTS.values()},
        **{known.id.lower(): known for known in CHECKPOINT_FAULTS.values()},
    }
    found = names.get(fault.lower())
    if found is None:
        near = [known for known in CHECKPOINT_FAULTS if known.lower().startswith(fault.lower())]
        hint = f" Did you mean {', '.join(near)}?" if fault and near else ""
        raise CheckError(f"no fault {fault!r}.{hint} `nvfp4check faults list` lists every fault.")
    return found


def _checked_target(source: str, target: Path) -> Path:
    if not Path(source).is_dir():
        raise CheckError(
            f"{source}: is no local directory; a fault is planted in a copy of a local checkpoint"
        )
    place, original = target.absolute(), Path(source).resolve()
    if os.path.lexists(place):
        raise CheckError(f"{target}: exists; a fault is planted in a new directory, give another")
    if place.parent.resolve().is_relative_to(original):
        raise CheckError(f"{target}: lies inside {source}; give a directory beside it")
    if not place.parent.is_dir():
        raise CheckError(f"{target}: there is no directory {place.parent}; make it first")
    return place


def _compare(source: Path, target: Path) -> tuple[tuple[str, ...], int]:
    """Name the files of the copy that are not the source's, and count those that are."""
    changed, linked = [], 0
    for path in sorted(path for path in target.rglob("*") if path.is_file()):
        name = path.relative_to(target)
        original = source / name
        if original.exists() and os.path.samefile(original, path):
            linked += 1
        else:
            changed.append(str(name))
    return tuple(changed), linked
