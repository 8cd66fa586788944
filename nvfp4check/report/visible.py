"""How a JSON value is shown: on one line, harmless, and cut where it is long."""

import json

from nvfp4check.visible import visible as visible


def value_text(value: object, limit: int = 120) -> str:
    """Return a JSON value as it is shown beside `found` and `expected`."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return visible(text, limit)
