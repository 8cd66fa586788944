"""JSON files of a checkpoint, read without trusting them.

A document with a flaw is still used as far as it can be: `NaN`, numbers beyond a double and
repeated keys are noted and read as Python's json would, so that every other check still runs. What
cannot be used at all is None, with the reason. `Infinity` is no flaw: transformers writes it
(`time_step_limit` of Nemotron's configs), and every reader of these files takes it.
"""

import json
import math
from collections import Counter

from nvfp4check.checkpoint.storage import Storage, StorageError

#: Largest JSON file that is read. The index of a checkpoint of 180,547 tensors has 17 MB.
MAX_JSON_BYTES = 100_000_000
#: Above this size a document must be mostly text, as an index is: so that no small file makes the
#: parser build millions of objects.
_TEXT_FROM = 10_000_000
_CHARACTERS_A_MARK = 16
#: Flaws that are listed; a document with more of them is no better described by all.
_MAX_PROBLEMS = 20
#: Nesting that is accepted; a deeper document could not even be walked.
MAX_DEPTH = 64


def read_json(storage: Storage, name: str) -> tuple[dict[str, object] | None, list[str]]:
    """Read a JSON file whose top is an object; return it, or None, and what is wrong with it."""
    size = storage.list()[name]
    if size > MAX_JSON_BYTES:
        return None, [f"{size:,} bytes, expected at most {MAX_JSON_BYTES:,}"]
    try:
        text = storage.read(name, 0, size).decode("utf-8")
    except StorageError as error:
        return None, [str(error)]
    except UnicodeDecodeError as error:
        return None, [f"not UTF-8 at byte {error.start}"]
    return parse_json(text)


def parse_json(text: str) -> tuple[dict[str, object] | None, list[str]]:
    """Parse a JSON text whose top is an object; return it, or None, and what is wrong with it."""
    problems: list[str] = []

    def note(problem: str) -> None:
        if problem not in problems and len(problems) < _MAX_PROBLEMS:
            problems.append(problem)

    def object_of(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            note(f"{_short(repr(twice))} appears twice in one object; the last one counts")
        return result

    def constant(text: str) -> float:
        if text == "NaN":
            note("NaN is not JSON")
        return float(text)

    def number(text: str) -> float:
        value = float(text)
        if math.isinf(value):
            note(f"{_short(text)} is beyond the range of a double")
        return value

    if len(text) > _TEXT_FROM:
        marks = max(text.count("[") + text.count("{"), text.count(","))
        if marks * _CHARACTERS_A_MARK > len(text):
            return None, [f"{marks:,} brackets or commas in {len(text):,} characters: not read"]
    try:
        document = json.loads(
            text, object_pairs_hook=object_of, parse_constant=constant, parse_float=number
        )
    except RecursionError:
        return None, ["nested too deeply"]
    except ValueError as error:
        return None, [f"not JSON: {error}"]
    if not isinstance(document, dict):
        return None, [f"the top is a {_kind(document)}, expected an object"]
    if "\\u" in text and not _is_unicode(document):
        return None, ["a string holds half of a surrogate pair"]
    if not _shallow(document):
        return None, [f"nested deeper than {MAX_DEPTH} levels"]
    return document, problems


def _is_unicode(document: object) -> bool:
    try:
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shallow(document: object) -> bool:
    level: list[object] = [document]
    for _ in range(MAX_DEPTH):
        children: list[object] = []
        for value in level:
            if isinstance(value, dict):
                children.extend(item for item in value.values() if isinstance(item, (dict, list)))
            elif isinstance(value, list):
                children.extend(item for item in value if isinstance(item, (dict, list)))
        if not children:
            return True
        level = children
    return False


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
