"""Typed access to the fields of untrusted JSON.

A field of the wrong type is noted, with its place, and counts as absent.
"""

from collections.abc import Mapping


class Fields:
    """The fields of one object, with its place in the file for what is noted of them."""

    def __init__(self, file: str, where: str, fields: Mapping[str, object]) -> None:
        self.file = file
        self.where = where
        self.fields = fields
        self.problems: list[str] = []

    def bad(self, key: str, expected: str) -> None:
        """Note that a field is not what is expected."""
        found = repr(self.fields[key])
        found = found if len(found) <= 60 else found[:57] + "..."
        self.problems.append(f"{self.file}: {self.where}{key} is {found}, expected {expected}")

    def text(self, key: str) -> str | None:
        """Give a string."""
        value = self.fields.get(key)
        if value is not None and not isinstance(value, str):
            self.bad(key, "a string")
            return None
        return value

    def size(self, key: str) -> int | None:
        """Give a positive whole number."""
        value = self.fields.get(key)
        if value is not None and not (type(value) is int and value > 0):
            self.bad(key, "a positive whole number")
            return None
        return value

    def object(self, key: str) -> dict[str, object] | None:
        """Give an object."""
        value = self.fields.get(key)
        if value is not None and not isinstance(value, dict):
            self.bad(key, "an object")
            return None
        return value

    def texts(self, key: str) -> tuple[str, ...] | None:
        """Give a list of strings."""
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.bad(key, "a list of strings")
            return None
        return tuple(value)

    def block(self, key: str) -> tuple[int, int] | None:
        """Give the two sides of a block."""
        value = self.fields.get(key)
        if value is None:
            return None
        if isinstance(value, list) and len(value) == 2:
            rows, columns = value
            if type(rows) is int and type(columns) is int and min(rows, columns) > 0:
                return rows, columns
        self.bad(key, "two positive whole numbers")
        return None

    def below(self, key: str) -> "Fields":
        """Go into an object; one that is not there has no fields."""
        below = Fields(self.file, f"{self.where}{key}.", self.object(key) or {})
        below.problems = self.problems
        return below
