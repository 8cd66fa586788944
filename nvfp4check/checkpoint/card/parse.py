"""A model card read: its front matter, its prose, and its tables.

A card is untrusted text. The front matter is read by a YAML loader that makes plain values only
and refuses aliases, for a few of them expand to gigabytes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from nvfp4check.findings import CheckError

#: A card is a page of text; the longest published ones have some ten thousand characters.
MAX_CHARACTERS = 1_000_000

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?\n)---[ \t]*(?:\n|\Z)", re.DOTALL)
_RULE = re.compile(r"\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?")


class _PlainLoader(yaml.SafeLoader):
    """The safe loader without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


@dataclass(frozen=True, slots=True)
class Table:
    """A table in the text: the words of its head, and of each row."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A model card."""

    source: str
    front_matter: Mapping[str, Any]
    #: The text below the front matter.
    prose: str
    tables: tuple[Table, ...]
    #: What is wrong with the card's own form.
    problems: tuple[str, ...] = ()

    def strings(self, field: str) -> tuple[str, ...]:
        """Return a front-matter field that holds one string or a list of them."""
        value = self.front_matter.get(field)
        values = value if isinstance(value, list) else [value]
        return tuple(entry for entry in values if isinstance(entry, str))

    def sentence(self, start: int, end: int) -> str:
        """Return the sentence or line around a place of the prose, in one line."""
        before = max(self.prose.rfind(mark, 0, start) for mark in ("\n", ". ", ".\t"))
        marks = (self.prose.find(mark, end) for mark in ("\n", ". "))
        after = min((place for place in marks if place >= 0), default=len(self.prose))
        text = self.prose[before + 1 : after].strip(" .*#-\n")
        return text if len(text) <= 300 else f"{text[:299]}…"


def parse_card(text: str, source: str) -> Card:
    """Read a card.

    Raises:
        CheckError: The text is too long to be a card.
    """
    if len(text) > MAX_CHARACTERS:
        raise CheckError(
            f"{source}: {len(text):,} characters, expected a model card of at most "
            f"{MAX_CHARACTERS:,}; give the right file with --card"
        )
    text = text.replace("\r\n", "\n")
    match = _FRONT_MATTER.match(text)
    front, problems = _front_matter(match.group(1)) if match else ({}, ("no front matter",))
    prose = text[match.end() :] if match else text
    return Card(
        source=source,
        front_matter=front,
        prose=prose,
        tables=tuple(_tables(prose)),
        problems=problems,
    )


def _front_matter(text: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    try:
        found = yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return {}, (f"the front matter is not valid YAML: {first}",)
    if not isinstance(found, dict):
        return {}, ("the front matter is not a mapping",)
    return {key: value for key, value in found.items() if isinstance(key, str)}, ()


def _tables(prose: str) -> list[Table]:
    lines = prose.split("\n")
    tables = []
    for place, line in enumerate(lines[1:], start=1):
        if "|" not in line or not _RULE.fullmatch(line.strip()) or "|" not in lines[place - 1]:
            continue
        rows = []
        for row in lines[place + 1 :]:
            if "|" not in row:
                break
            rows.append(_cells(row))
        tables.append(Table(_cells(lines[place - 1]), tuple(rows)))
    return tables


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip(" *`") for cell in line.strip().strip("|").split("|"))
