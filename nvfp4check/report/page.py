"""HTML pages: one self-contained file, in which nothing from a checkpoint is ever markup.

Two guards stand between a hostile name and the page. Every value that a template prints has its
unprintable characters made visible, and is then escaped; only what a template's own macro made is
left as it is.
"""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

import nvfp4check
from nvfp4check.report.fold import place, plural, size_text
from nvfp4check.report.inspect_text import shape_text
from nvfp4check.report.visible import value_text, visible


def render_page(template: str, /, **values: Any) -> str:
    """Return the page that a template makes of the values."""
    return _environment().get_template(template).render(version=nvfp4check.__version__, **values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nvfp4check.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters["size"] = size_text
    environment.filters["place"] = place
    environment.filters["plural"] = plural
    environment.filters["shape"] = shape_text
    environment.filters["value"] = value_text
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.globals["web_link"] = _web_link
    return environment


def _web_link(url: object) -> Markup:
    """Return a link to a web address, and the plain text of whatever else claims to be one."""
    shown = visible(url)
    if not shown.startswith("https://"):
        return escape(shown)
    return Markup('<a href="{0}" rel="noreferrer">{0}</a>').format(shown)


def _finalize(value: object) -> object:
    return value if isinstance(value, Markup) else visible(value)
