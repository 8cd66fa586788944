"""The output formats, by the names that `--format` takes."""

from enum import StrEnum
from pathlib import PurePath


class Format(StrEnum):
    """How a result is written."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"
    HTML = "html"
    JUNIT = "junit"
    SARIF = "sarif"


#: What the end of a file's name says about its format.
_SUFFIXES = {
    "": Format.TEXT,
    ".txt": Format.TEXT,
    ".log": Format.TEXT,
    ".json": Format.JSON,
    ".md": Format.MARKDOWN,
    ".markdown": Format.MARKDOWN,
    ".html": Format.HTML,
    ".htm": Format.HTML,
    ".xml": Format.JUNIT,
    ".sarif": Format.SARIF,
    ".sarif.json": Format.SARIF,  # SARIF 2.1.0, 3.2
}


def format_of(path: PurePath | None) -> Format | None:
    """Return the format that a file's name asks for, None where its suffix is that of none."""
    suffixes = [] if path is None else [suffix.lower() for suffix in path.suffixes]
    for end in ("".join(suffixes[-2:]), "".join(suffixes[-1:])):
        if end in _SUFFIXES:
            return _SUFFIXES[end]
    return None
