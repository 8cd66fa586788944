"""Goldens: runs that are kept, with where they came from, and held against later ones.

A golden is a run directory; a MANIFEST.json, in it or in a folder above, lists each of its files
with its origin, the versions and dtype behind it, and its sha256. A file that is missing, differs
from its manifest or differs from the run at hand is a difference, always: recording one is a
difference too, so that nothing passes in the same step in which it is blessed. Where no golden is
recorded at all there is nothing to hold anything against: that is an error, and no verdict.

Contract of a comparison:
    bits       every tensor of the golden is there with the same dtype, shape and bytes
    float32    floating tensors within a relative Frobenius distance of 2e-5 of the golden; experts
               equal as sets. 2e-5 is 335 units of 2**-24: float32 sums in another order were seen
               to move the stream by 2 units a layer, so 61 layers keep well inside, and a wrong
               computation is off by 1e-3 and more
    What a golden does not hold is not compared; what it holds and the run lacks is a difference.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nvfp4check.activations import (
    BOUNDS_FOLDER,
    FINAL_HIDDEN_FILE,
    LAYERS_FOLDER,
    LOGITS_FILE,
    MTP_FOLDER,
    RUN_FILE,
    TOKENS_FILE,
    Run,
    opened,
    write_bytes,
)
from nvfp4check.findings import CheckError
from nvfp4check.forward.again import computed_again

SCHEMA = "nvfp4check/goldens/1"
MANIFEST_FILE = "MANIFEST.json"

#: Largest relative Frobenius distance between float32 runs of one model; see the contract above.
FLOAT32_LIMIT = 2e-5


class Closeness(StrEnum):
    """How close a run has to come to its golden."""

    BITS = "bits"
    FLOAT32 = "float32"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Difference:
    """One way in which a golden and what it is held against differ."""

    file: str
    tensor: str = ""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a verification or a recording found."""

    golden: str
    differences: tuple[Difference, ...]
    #: Files and tensors that were compared.
    compared: int

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


class Manifest:
    """The list of golden files: origin and sha256 of each, by its path from the manifest."""

    def __init__(self, path: Path, files: dict[str, dict[str, Any]]) -> None:
        self.path = path
        self.files = files

    @classmethod
    def near(cls, golden: Path) -> "Manifest":
        """Return the manifest in a golden or the nearest folder above; a new one in the golden.

        Raises:
            CheckError: The manifest is not one.
        """
        golden = golden.resolve()
        for folder in (golden, *golden.parents):
            path = folder / MANIFEST_FILE
            if path.is_file():
                try:
                    document = json.loads(path.read_text(encoding="utf-8"))
                except (OSError, ValueError) as error:
                    raise CheckError(f"{path}: cannot be read: {error}") from error
                if not _is_manifest(document):
                    raise CheckError(f"{path}: is no manifest of goldens ({SCHEMA})")
                return cls(path, document["files"])
        return cls(golden / MANIFEST_FILE, {})

    def name(self, file: Path) -> str:
        """Return a file's name in this manifest."""
        return file.resolve().relative_to(self.path.parent).as_posix()

    def of(self, golden: Path) -> dict[str, dict[str, Any]]:
        """Return the entries of one golden."""
        prefix = self.name(golden)
        prefix = "" if prefix == "." else f"{prefix}/"
        return {name: entry for name, entry in self.files.items() if name.startswith(prefix)}

    def write(self) -> None:
        """Write the manifest, its files in order."""
        document = {"schema": SCHEMA, "files": dict(sorted(self.files.items()))}
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        write_bytes(self.path, text.encode("utf-8"))


def record(run: Path, golden: Path, origin: str, *, replace: bool = False) -> Comparison:
    """Keep a run as a golden; the differences say what was written.

    A golden that holds the same bytes is left as it is, and nothing differs.

    Raises:
        CheckError: The run is none, the origin is empty, or the golden differs and `replace` is
            not given.
    """
    info = Run.open(run).info
    if not origin.strip():
        raise CheckError("a golden needs an origin: who made the run, from what")
    manifest = Manifest.near(golden)
    new = {file.relative_to(run).as_posix(): file for file in _run_files(run)}
    old = {file.relative_to(golden).as_posix(): file for file in _run_files(golden)}
    differences = tuple(
        Difference(file=name, message=_recorded(old.get(name), new.get(name)))
        for name in sorted({*new, *old})
        if _digest(old.get(name)) != _digest(new.get(name))
    )
    if old and differences and not replace:
        raise CheckError(
            f"{golden}: holds another run ({len(differences)} files differ, first "
            f"{differences[0].file}); give --replace to record this one instead"
        )
    for name, file in old.items():
        if name not in new:
            file.unlink()
            manifest.files.pop(manifest.name(file), None)
    for name, file in new.items():
        target = golden / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.resolve() != target.resolve():
            shutil.copyfile(file, target)
        manifest.files[manifest.name(target)] = {
            "origin": origin,
            "dtype": info.dtype,
            "versions": info.versions,
            "sha256": _digest(target),
        }
    if differences:
        manifest.write()
    return Comparison(golden=str(golden), differences=differences, compared=len(new))


def verify(
    golden: Path,
    run: Path | None = None,
    checkpoint: str | Path | None = None,
    closeness: Closeness = Closeness.BITS,
    inputs: Path | None = None,
) -> Comparison:
    """Hold a golden against its manifest, and a run or a fresh one of a checkpoint against it.

    `inputs` is the run whose states each layer of the golden began with, where it did.

    Raises:
        CheckError: No golden is recorded there, the run or the checkpoint cannot be read, or a
            fresh run cannot be computed as the golden was.
    """
    if inputs is not None and checkpoint is None:
        raise CheckError("--inputs: goes with --checkpoint, for a fresh run to begin with")
    manifest = Manifest.near(golden)
    listed = manifest.of(golden)
    if not listed:
        there = (
            "holds a run, but no manifest lists it" if _run_files(golden) else "nothing is there"
        )
        raise CheckError(
            f"{golden}: is no golden: {there}; `nvfp4check golden record RUN {golden}` makes one"
        )
    differences = list(_against_manifest(golden, manifest))
    compared = len(listed)
    if (golden / RUN_FILE).is_file():
        kept = Run.open(golden)
        if run is not None:
            more, count = compare(kept, Run.open(run), closeness)
            differences += more
            compared += count
        if checkpoint is not None:
            with TemporaryDirectory(prefix="nvfp4check-golden-") as folder:
                fresh = computed_again(kept, checkpoint, Path(folder) / "run", inputs)
                more, count = compare(kept, fresh, closeness)
            differences += more
            compared += count
    return Comparison(
        golden=str(golden), differences=tuple(sorted(set(differences))), compared=compared
    )


def compare(golden: Run, run: Run, closeness: Closeness) -> tuple[list[Difference], int]:
    """Return how a run differs from a golden, and how many tensors were compared."""
    differences: list[Difference] = []
    compared = 0
    for file in _run_files(golden.path):
        name = file.relative_to(golden.path).as_posix()
        if file.suffix != ".safetensors" or file.parent.name == BOUNDS_FOLDER:
            continue  # bounds are what others are held against, and nothing that they compute
        if not (run.path / name).is_file():
            differences.append(Difference(file=name, message="the run has no such file"))
            continue
        try:
            tensors = opened(file), opened(run.path / name)
        except CheckError as error:
            differences.append(Difference(file=name, message=str(error)))
            continue
        with tensors[0] as kept, tensors[1] as found:
            there = set(found.keys())
            for tensor in sorted(kept.keys()):
                compared += 1
                message = (
                    _distance(kept.get_tensor(tensor), found.get_tensor(tensor), tensor, closeness)
                    if tensor in there
                    else "the run has no such tensor"
                )
                if message:
                    differences.append(Difference(file=name, tensor=tensor, message=message))
    return differences, compared


def _distance(
    kept: torch.Tensor, found: torch.Tensor, name: str, closeness: Closeness
) -> str | None:
    """Return what differs between two tensors, None if they are as close as they have to be."""
    if kept.shape != found.shape:
        return f"shape {list(found.shape)}, expected {list(kept.shape)}"
    if closeness is Closeness.BITS:
        if kept.dtype != found.dtype:
            return f"dtype {found.dtype}, expected {kept.dtype}"
        if torch.equal(_bytes(kept), _bytes(found)):
            return None
        return f"{int((kept != found).sum())} of {kept.numel()} values differ"
    if not kept.is_floating_point():
        if name.endswith("router_experts"):
            kept, found = kept.sort(dim=-1).values, found.sort(dim=-1).values
        differ = (kept != found).flatten(1).any(dim=1) if kept.ndim > 1 else kept != found
        rows = differ.nonzero().flatten().tolist()
        return f"{len(rows)} of {len(kept)} rows differ, first {rows[0]}" if rows else None
    if not found.isfinite().all():
        return "values are not finite"
    if name.endswith("router_weights"):  # stand in the order of the experts, which is free
        kept, found = kept.sort(dim=-1).values, found.sort(dim=-1).values
    kept, found = kept.double(), found.double()
    distance = float((found - kept).norm())
    allowed = FLOAT32_LIMIT * float(kept.norm())
    if distance <= allowed:
        return None
    relative = distance / float(kept.norm()) if kept.any() else float("inf")
    return f"relative distance {relative:.2e}, allowed {FLOAT32_LIMIT:.0e}"


def _against_manifest(golden: Path, manifest: Manifest) -> Iterator[Difference]:
    listed = manifest.of(golden)
    there = {manifest.name(file): file for file in _run_files(golden)}
    for name, entry in listed.items():
        if name not in there and not (manifest.path.parent / name).is_file():
            yield Difference(file=name, message=f"missing, though {manifest.path.name} lists it")
        elif _digest(manifest.path.parent / name) != entry.get("sha256"):
            yield Difference(file=name, message="has another sha256 than its manifest says")
    for name in there.keys() - listed.keys():
        yield Difference(file=name, message=f"not listed in {manifest.path.name}")


def _run_files(run: Path) -> list[Path]:
    """Return the files of a run, whatever else lies beside them."""
    top = (RUN_FILE, TOKENS_FILE, LOGITS_FILE, FINAL_HIDDEN_FILE)
    files = [run / name for name in top if (run / name).is_file()]
    files += sorted((run / LAYERS_FOLDER).glob("*.safetensors"))
    files += sorted((run / BOUNDS_FOLDER).glob("*.safetensors"))
    return files + sorted((run / MTP_FOLDER).glob("*/*.safetensors"))


def _is_manifest(document: object) -> bool:
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return False
    files = document.get("files")
    return isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values())


def _recorded(old: Path | None, new: Path | None) -> str:
    if new is None:
        return "removed: the run has no such file"
    return "recorded: was missing" if old is None else "recorded: replaces other bytes"


def _digest(file: Path | None) -> str | None:
    return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
