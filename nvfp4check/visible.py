r"""Make text from a checkpoint harmless to show.

Names and messages come from files that nobody vouches for. A control character could move a
terminal's cursor, break a line or reorder what stands beside it, so each is shown as its escape.
"""

import unicodedata

#: Categories of Unicode that are shown as escapes: control, format, surrogate, private use,
#: unassigned, line separator, paragraph separator.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: object, limit: int | None = None) -> str:
    r"""Return the text on one line with every unprintable character as `\xNN` or `\uNNNN`.

    With `limit`, a longer text is cut and ends in an ellipsis.
    """
    shown = str(text)
    if not shown.isprintable():
        shown = "".join(_escape(c) if unicodedata.category(c) in _HIDDEN else c for c in shown)
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit - 1]}…"


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
