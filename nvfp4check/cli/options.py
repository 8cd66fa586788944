"""Arguments and options that several commands share, and the file or stream a result goes to."""

import math
import os
import shutil
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from nvfp4check.cli.streams import is_terminal, write_stdout
from nvfp4check.findings import CheckError
from nvfp4check.report.formats import Format, format_of


def require_seed(seed: int) -> int:
    """Return a seed if it is one that generators of random numbers take.

    Raises:
        CheckError: It is negative or has more than 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise CheckError(f"--seed {seed}: give a whole number from 0 to 2**63 - 1")
    return seed


def require_rare_kl(nats: float) -> float:
    """Return the KL of rare positions if it is one.

    Raises:
        CheckError: It is negative, or not finite.
    """
    if not 0 <= nats < math.inf:
        raise CheckError(f"--rare-kl {nats}: give nats that are 0 or more, and finite")
    return nats


def seed_option(help: str) -> Any:
    """Return the option --seed, which says what chance decides."""
    return typer.Option("--seed", metavar="N", help=help, callback=require_seed)


CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="A checkpoint: a directory, or a URL: hf://org/name, or one that fsspec opens.",
        show_default=False,
    ),
]

OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write the result to FILE, whole or not at all, instead of stdout.",
        show_default=False,
    ),
]

FindingsFormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        help="How to write the result. [default: by the suffix of --output, else text]",
        case_sensitive=False,
        show_default=False,
    ),
]


JobsOption = Annotated[
    int, typer.Option("--jobs", metavar="N", min=1, help="Processes that share the work.")
]

DeviceOption = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="What computes: cpu, or cuda.")
]

SampleSeedOption = Annotated[int, seed_option("Which sample is drawn.")]

ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")
]

AllowSkipsOption = Annotated[
    bool,
    typer.Option("--allow-skips", help="Exit with 0 though something could not be checked."),
]

PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='JSON lines with "id" and "text" or "tokens". [default: the model card\'s four]',
        show_default=False,
    ),
]

LogitsOption = Annotated[
    str,
    typer.Option(
        "--logits", metavar="KEEP", help="full, topk:N, or hidden (the state before them)."
    ),
]

MaxMemoryOption = Annotated[
    float,
    typer.Option(
        "--max-memory",
        metavar="GIB",
        min=0.1,
        max=2**20,
        help="Memory to take at most, in GiB.",
    ),
]

MaxKlOption = Annotated[
    float | None,
    typer.Option("--max-kl", metavar="NATS", help="Limit on the mean KL.", show_default=False),
]

RareKlOption = Annotated[
    float,
    typer.Option(
        "--rare-kl",
        metavar="NATS",
        help="KL that --max-kl allows positions to have that are too rare to be among these; "
        "log of the vocabulary (12) is that of a guess.",
    ),
]

MinTop1Option = Annotated[
    float | None,
    typer.Option(
        "--min-top1",
        metavar="SHARE",
        help="Limit on top-1 agreement, such as 0.95.",
        show_default=False,
    ),
]


class Level(StrEnum):
    """How much of a checkpoint is read."""

    HEADERS = "headers"
    BYTES = "bytes"


class Kept(StrEnum):
    """Which points of each layer a run keeps."""

    NONE = "none"
    HIDDEN = "hidden"
    ALL = "all"


class PlainFormat(StrEnum):
    """The formats of a command whose result is no list of findings."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"
    HTML = "html"


PlainFormatOption = Annotated[
    PlainFormat | None,
    typer.Option(
        "--format",
        help="How to write the result. [default: by the suffix of --output, else text]",
        case_sensitive=False,
        show_default=False,
    ),
]


def prepared_format(
    asked: StrEnum | None, output: Path | None, formats: type[StrEnum] = PlainFormat
) -> Format:
    """Return the format to write: the one asked for, else the one the file's name says.

    It is called before the work, so that no result is computed that then has no place or no form.

    Raises:
        CheckError: The result has no place, or the file's name asks for none of `formats`.
    """
    require_writable(output)
    if asked is not None:
        return Format(asked.value)
    named = format_of(output)
    known = [format.value for format in formats]
    if named is None or named.value not in known:
        why = (
            f"{output and output.suffix} is the suffix of no format"
            if named is None
            else f"this command has no {named.value} result"
        )
        raise CheckError(
            f"cannot write {output}: {why}; give another suffix, or --format "
            f"{', '.join(known[:-1])} or {known[-1]}"
        )
    return named


def wants_color(output: Path | None) -> bool:
    """Tell whether text may be coloured: on a terminal, unless NO_COLOR or TERM=dumb say no."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return output is None and is_terminal(sys.stdout) and not plain


def line_width(output: Path | None) -> int:
    """Return how wide lines of prose may be: 100, or what a narrower terminal has."""
    widest = 100
    if output is not None or not is_terminal(sys.stdout):
        return widest
    return min(widest, shutil.get_terminal_size((widest, 24)).columns)


def split_ids(values: list[str] | None) -> tuple[str, ...]:
    """Return the ids of a repeatable option that also takes several ids with commas between."""
    parts = (part.strip().upper() for value in values or () for part in value.split(","))
    return tuple(part for part in parts if part)


def require_limits(max_kl: float | None, min_top1: float | None) -> None:
    """Check that limits on logits are numbers that a result can keep or break.

    Raises:
        CheckError: One is no number, or none that a result can break.
    """
    if max_kl is not None and not 0 <= max_kl < math.inf:
        raise CheckError(f"--max-kl {max_kl}: give a limit in nats that is 0 or more, and finite")
    if min_top1 is not None and not 0 <= min_top1 <= 1:
        raise CheckError(f"--min-top1 {min_top1}: give a share between 0 and 1, 0.95 for 95 %")


def require_writable(output: Path | None) -> None:
    """Check before the work, and not after it, that the result will have a place.

    Raises:
        CheckError: The directory is not there or cannot be written, or the path is a directory.
    """
    if output is None or (output.exists() and not output.is_file() and not output.is_dir()):
        return
    directory = output.resolve().parent
    if output.is_dir():
        raise CheckError(f"cannot write {output}: it is a directory; give --output a file")
    if not directory.is_dir():
        raise CheckError(f"cannot write {output}: there is no directory {directory}; make it first")
    if not os.access(directory, os.W_OK):
        raise CheckError(f"cannot write {output}: {directory} is not yours to write in")


def write(text: str, output: Path | None) -> None:
    """Write a result to a file, atomically, or to stdout.

    Raises:
        CheckError: The file, or stdout, cannot be written.
    """
    if output is None:
        write_stdout(text, "; give --output a file")
        return
    try:
        _write_file(text, output)
    except OSError as error:
        raise CheckError(
            f"cannot write {output}: {error.strerror}; give --output a path in a directory that "
            f"exists and can be written"
        ) from error


def _write_file(text: str, output: Path) -> None:
    if output.is_dir():
        raise IsADirectoryError(21, "it is a directory")
    # A device or a pipe cannot be replaced by a rename, and needs none.
    if output.exists() and not output.is_file():
        output.write_text(text, encoding="utf-8")
        return
    target = output.resolve()  # through a link, the file it leads to is replaced and the link kept
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
    ) as stream:
        try:
            stream.write(text)
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
            os.replace(stream.name, target)
        except BaseException:
            os.unlink(stream.name)
            raise


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
