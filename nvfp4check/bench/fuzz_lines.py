"""Fuzzing by command lines: damage that `diff`, the audit, `agree`, `forward` and others meet.

A target is a strategy that damages files, and the command lines that are given them. `{case}` is
the directory of the damaged files; beside it lie sound ones: `{nvfp4}` and its base `{fp8}`, and
`{run}`, a run of it.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from nvfp4check.bench import fuzz_cases as cases
from nvfp4check.bench.fuzz_cases import Files
from nvfp4check.cli.main import main
from nvfp4check.report.formats import Format

#: What the exit codes of a command mean.
_VERDICTS = {0: "holds", 1: "does not hold", 2: "refused", 3: "undecided"}
_PROMPTS = "prompts.jsonl"
_RESULT = "result.json"
_MANIFEST = "MANIFEST.json"
_TOKENIZER = "tokenizer.json"
_SOUND_PROMPTS = b'{"id": "a", "tokens": [0, 5, 9, 33]}\n{"id": "b", "tokens": [1, 60]}\n'
#: The formats that every command has.
FORMATS = (Format.TEXT, Format.JSON, Format.MARKDOWN, Format.HTML)


class UncaughtError(Exception):
    """A command ended by an exception that is no message: where it arose, and which it was."""

    def __init__(self, where: str, text: str) -> None:
        super().__init__(text)
        self.where = where


class Lines(NamedTuple):
    """What is damaged, and the command lines that meet it."""

    strategy: Callable[[], st.SearchStrategy[Files]]
    lines: tuple[str, ...]


def run_line(line: str, case: Path, format: Format) -> tuple[str, str]:
    """Run one command line; return its verdict and what it printed.

    Raises:
        UncaughtError: It ended by an exception that is no message.
    """
    home = sound_home()
    places = {"case": case, **{name: home / name for name in ("nvfp4", "fp8", "run")}}
    argv = [part.format(**places) for part in line.split()] + ["--format", format.value]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    if "Traceback (most recent call last)" in err.getvalue():
        raise _uncaught(err.getvalue())
    return _VERDICTS[code], out.getvalue()


def _uncaught(printed: str) -> UncaughtError:
    lines = printed.split("\nnvfp4check: internal error")[0].splitlines()
    frames = [line for line in lines if line.startswith("  File ") and "nvfp4" in line]
    file, _, rest = frames[-1].removeprefix('  File "').partition('", line ')
    last = next(line for line in reversed(lines) if line[:1].strip())
    return UncaughtError(f"{Path(file).name}:{rest.partition(',')[0]}", last)


@cache
def _keeper() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="nvfp4check-fuzz-sound-")


@cache
def sound_home() -> Path:
    """Make the sound directories, once in a process."""
    home = Path(_keeper().name)
    for name, files in (("nvfp4", cases.sound()), ("fp8", cases.sound_base())):
        (home / name).mkdir()
        for file, content in files.items():
            (home / name / file).write_bytes(content)
    (home / _PROMPTS).write_bytes(_SOUND_PROMPTS)
    quiet = ["--activations", "all", "--output", str(home / "forward.json")]
    prompts = ["--prompts", str(home / _PROMPTS), "--out", str(home / "run")]
    if main(["forward", str(home / "nvfp4"), *prompts, *quiet]) != 0:
        raise RuntimeError("the sound run could not be made")
    golden = ["golden", "record", str(home / "run"), str(home / "golden"), "--origin", "fuzz"]
    main([*golden, "--output", str(home / "golden.json")])
    return home


# Damage


def _pairs() -> st.SearchStrategy[Files]:
    names = ("data", "names", "header", "config", "quantisation", "files")
    return st.one_of(*(cases.TARGETS[name]() for name in names))


@cache
def _golden() -> dict[str, bytes]:
    folder = sound_home() / "golden"
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _runs() -> st.SearchStrategy[Files]:
    """Damage a run that is also a golden: its documents, headers, bytes and files."""
    sound = _golden()
    documents = [name for name in sound if name.endswith(".json")]
    tensors = [name for name in sound if name.endswith(".safetensors")]

    def one(name: str) -> st.SearchStrategy[bytes]:
        data = sound[name]
        ways = cases.turned_bytes(data) | cases.cut_bytes(data)
        if name in documents:
            return ways | cases.edited_json(data) | cases.edited_json(data)
        return ways | cases.turned_bytes(data, 400) | cases.edited_header(data)

    damaged = st.sampled_from(documents + tensors).flatmap(
        lambda name: one(name).map(lambda data: {**sound, name: data})
    )
    lacking = st.sampled_from(sorted(sound)).map(
        lambda name: {other: data for other, data in sound.items() if other != name}
    )
    return damaged | damaged | damaged | lacking


def _prompts() -> st.SearchStrategy[Files]:
    """Damage a file of prompts."""
    lines = [json.loads(line) for line in _SOUND_PROMPTS.splitlines()]
    edited = cases.edited_json(json.dumps(lines).encode()).map(
        lambda data: _as_lines(json.loads(data))
    )
    made = st.lists(
        st.fixed_dictionaries({"id": cases.texts}, optional={"tokens": st.lists(st.integers())})
        | cases.json_values,
        max_size=4,
    ).map(_as_lines)
    return (edited | made | cases.turned_bytes(_SOUND_PROMPTS)).map(lambda data: {_PROMPTS: data})


def _as_lines(documents: Any) -> bytes:
    documents = documents if isinstance(documents, list) else [documents]
    return b"\n".join(json.dumps(one).encode("utf-8", "surrogatepass") for one in documents)


@cache
def _tokenizer() -> bytes:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(("[UNK]", "a", "b", "ab", "hello"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return str(tokenizer.to_str()).encode()


def _tokenizers() -> st.SearchStrategy[Files]:
    """Damage a tokenizer: the library that reads it is not ours."""
    data = _tokenizer()
    ways = cases.edited_json(data) | cases.edited_json(data) | cases.turned_bytes(data)
    return ways.map(lambda data: {**cases.sound(), _TOKENIZER: data})


@cache
def _results() -> tuple[bytes, ...]:
    home = sound_home()
    lines = (
        "validate {nvfp4} --base {fp8}",
        "diff {nvfp4} {fp8}",
        "agree {run} {run}",
        "inspect {nvfp4}",
        "rules NV6",
        "kernels list --op swizzle",
    )
    return tuple(run_line(line, home, Format.JSON)[1].encode() for line in lines)


def _reports() -> st.SearchStrategy[Files]:
    """Damage the result of a command, as `report` reads it."""
    return (
        st.sampled_from(_results())
        .flatmap(lambda data: cases.edited_json(data) | cases.turned_bytes(data))
        .map(lambda data: {_RESULT: data})
    )


#: What is damaged beyond one checkpoint, and who meets it.
LINE_TARGETS: dict[str, Lines] = {
    "pair": Lines(
        _pairs,
        (
            "diff {nvfp4} {case}",
            "diff {case} {fp8}",
            "validate {case} --base {fp8}",
            "validate {nvfp4} --base {case}",
        ),
    ),
    "run": Lines(
        _runs,
        (
            "agree {run} {case}",
            "agree {case} {run} --noise {run}",
            "agree {case} {case} --max-kl 0.1",
            "golden verify {case} --run {run}",
        ),
    ),
    "prompts": Lines(
        _prompts, ("forward {nvfp4} --layers 0:1 --prompts {case}/prompts.jsonl --out {case}/run",)
    ),
    "tokenizer": Lines(_tokenizers, ("forward {case} --layers 0:1 --text ab --out {case}/run",)),
    "result": Lines(_reports, ("report {case}/result.json",)),
}
