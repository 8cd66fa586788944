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
    ".json": Format.JSON,
    ".md": Format.MARKDOWN,
    ".html": Format.HTML,
    ".htm": Format.HTML,
    ".xml": Format.JUNIT,
    ".sarif": Format.SARIF,
}


def format_of(path: PurePath | None) -> Format:
    """Return the format that a file's name asks for, and text where it asks for none."""
    return Format.TEXT if path is None else _SUFFIXES.get(path.suffix.lower(), Format.TEXT)
