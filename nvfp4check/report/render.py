"""Choose the renderer for a document and a format.

A document says its kind in its `schema`: `nvfp4check/<kind>/<version>`. To give a new kind of
result its outputs, write its renderers here in `report/` and add them to the table.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nvfp4check.findings import CheckError
from nvfp4check.report.formats import Format
from nvfp4check.report.histograms import Plot

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Extras:
    """What a renderer may use beside the document itself.

    `rules` are the explained rules by id; `weights` gives the format of each logical weight by
    name; `histograms` show what they hold. `fail_on` is the severity from which a finding fails
    the run. `width` is that of the lines that prose is filled into.
    """

    color: bool = False
    rules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    histograms: Sequence[Plot] = ()
    fail_on: str = "error"
    width: int = 100


Renderer = Callable[[Document, Extras], str]


def render(document: Document, format: Format, extras: Extras | None = None) -> str:
    """Return the document in the format.

    Raises:
        CheckError: The document is of a kind, or the format one, that has no renderer.
    """
    if format is Format.JSON:
        return json.dumps(document, indent=2, allow_nan=False) + "\n"
    kind = kind_of_document(document)
    renderer = _RENDERERS.get((kind, format))
    if renderer is None:
        choices = [Format.JSON, *(f for k, f in _RENDERERS if k == kind)]
        raise CheckError(
            f"a result of kind {kind!r} cannot be written as {format.value}; "
            f"choose among {', '.join(choice.value for choice in choices)}"
        )
    return renderer(document, extras or Extras())


def kind_of_document(document: Document) -> str:
    """Return the kind that a document's schema names: `validate` of `nvfp4check/validate/1`.

    Raises:
        CheckError: It has no schema of this tool.
    """
    parts = str(document.get("schema")).split("/")
    if len(parts) != 3 or parts[0] != "nvfp4check":
        raise CheckError(
            f"schema {document.get('schema')!r} is none of nvfp4check's; expected a document that "
            f"a command wrote with --format json"
        )
    return parts[1]


# Each renderer's module is imported when it is used: a run that writes text loads no jinja2.


def _of(path: str, *arguments: str) -> Renderer:
    """Return the renderer `module:function` of this package, called with the document alone."""

    def write(document: Document, extras: Extras) -> str:
        module, _, name = path.partition(":")
        function: Callable[..., str] = getattr(
            importlib.import_module(f"nvfp4check.report.{module}"), name
        )
        return function(document, *arguments)

    return write


def _rules_text(document: Document, extras: Extras) -> str:
    from nvfp4check.report.rules_text import rules_text

    return rules_text(document, width=extras.width)


def _faults_text(document: Document, extras: Extras) -> str:
    from nvfp4check.report.faults_text import faults_text

    return faults_text(document, width=extras.width)


def _validate_text(document: Document, extras: Extras) -> str:
    from nvfp4check.report.validate_text import validate_text

    return validate_text(document, color=extras.color)


def _validate_junit(document: Document, extras: Extras) -> str:
    from nvfp4check.report.junit import junit

    return junit(document, fail_on=extras.fail_on)


def _validate_sarif(document: Document, extras: Extras) -> str:
    from nvfp4check.report.sarif import sarif

    return sarif(document, rules=extras.rules)


def _validate_html(document: Document, extras: Extras) -> str:
    from nvfp4check.report.validate_html import validate_html

    return validate_html(
        document, rules=extras.rules, weights=extras.weights, histograms=extras.histograms
    )


def _inspect_html(document: Document, extras: Extras) -> str:
    from nvfp4check.report.histograms import weight_plots
    from nvfp4check.report.page import render_page

    plots = weight_plots(document["code_histogram"], document["scale_histogram"])
    return render_page("inspect.html.j2", document=document, plots=plots)


def _rules_html(document: Document, extras: Extras) -> str:
    from nvfp4check.report.page import render_page

    return render_page("rules.html.j2", document=document)


def _forward_html(document: Document, extras: Extras) -> str:
    from nvfp4check.report.forward_text import PROMPT_HEADERS, forward_facts, forward_rows
    from nvfp4check.report.page import render_page

    return render_page(
        "forward.html.j2",
        facts=forward_facts(document),
        headers=PROMPT_HEADERS,
        rows=forward_rows(document),
    )


def _kernels_html(document: Document, extras: Extras) -> str:
    from nvfp4check.report.page import render_page

    tones = {"pass": "pass", "skip": "warning", "fail": "error"}
    return render_page("kernels.html.j2", runs=document.get("runs") or [document], tones=tones)


def _kernels_list_html(document: Document, extras: Extras) -> str:
    from nvfp4check.report.page import render_page

    return render_page("kernels_list.html.j2", document=document)


def _power_html(document: Document, extras: Extras) -> str:
    from nvfp4check.report.page import render_page
    from nvfp4check.report.power_text import RULE_HEADERS, fault_rows, rule_rows, summary

    return render_page(
        "power.html.j2",
        document=document,
        summary=summary(document),
        faults=list(fault_rows(document["faults"])),
        rule_headers=RULE_HEADERS,
        rules=rule_rows(document) if document["rules"] else [],
    )


def _golden_html(document: Document, extras: Extras) -> str:
    from nvfp4check.report.golden_text import HEADERS, golden_heading, golden_rows
    from nvfp4check.report.page import render_page

    return render_page(
        "golden.html.j2",
        heading=golden_heading(document),
        headers=HEADERS,
        rows=golden_rows(document),
    )


def _diff_text(document: Document, extras: Extras) -> str:
    from nvfp4check.report.diff_text import diff_text

    return diff_text(document, color=extras.color)


def _faults_html(document: Document, extras: Extras) -> str:
    from nvfp4check.report.faults_text import finders
    from nvfp4check.report.page import render_page

    return render_page("faults.html.j2", document=document, finders=finders)


def _report_html(document: Document, extras: Extras) -> str:
    from nvfp4check.report.joined_html import joined_html

    def shown(format: Format) -> Callable[[Document], str | None]:
        def as_format(one: Document) -> str | None:
            renderer = _RENDERERS.get((kind_of_document(one), format))
            return renderer(one, extras) if renderer is not None else None

        return as_format

    def text(one: Document) -> str:
        return shown(Format.TEXT)(one) or json.dumps(one, indent=1)

    return joined_html(document, shown(Format.HTML), text)


def _plain_html(title: str, text: Renderer) -> Renderer:
    """Return what makes a page of a result's text, for kinds whose tables are all there is."""

    def page(document: Document, extras: Extras) -> str:
        from nvfp4check.report.page import render_page

        return render_page("plain.html.j2", title=title, text=text(document, Extras()))

    return page


_RENDERERS: dict[tuple[str, Format], Renderer] = {
    ("validate", Format.TEXT): _validate_text,
    ("validate", Format.MARKDOWN): _of("validate_markdown:validate_markdown"),
    ("validate", Format.HTML): _validate_html,
    ("validate", Format.JUNIT): _validate_junit,
    ("validate", Format.SARIF): _validate_sarif,
    ("inspect", Format.TEXT): _of("inspect_text:inspect_text"),
    ("inspect", Format.MARKDOWN): _of("inspect_text:inspect_markdown"),
    ("inspect", Format.HTML): _inspect_html,
    ("kernels", Format.TEXT): _of("kernels_text:kernels_text"),
    ("kernels", Format.MARKDOWN): _of("kernels_text:kernels_markdown"),
    ("kernels", Format.HTML): _kernels_html,
    ("kernels-list", Format.TEXT): _of("kernels_text:kernels_list_text"),
    ("kernels-list", Format.MARKDOWN): _of("kernels_text:kernels_list_text", "github"),
    ("kernels-list", Format.HTML): _kernels_list_html,
    ("power", Format.TEXT): _of("power_text:power_text"),
    ("power", Format.MARKDOWN): _of("power_text:power_markdown"),
    ("power", Format.HTML): _power_html,
    ("rules", Format.TEXT): _rules_text,
    ("rules", Format.MARKDOWN): _of("rules_text:rules_markdown"),
    ("rules", Format.HTML): _rules_html,
    ("diff", Format.TEXT): _diff_text,
    ("diff", Format.MARKDOWN): _of("diff_text:diff_markdown"),
    ("diff", Format.HTML): _of("diff_html:diff_html"),
    ("faults", Format.TEXT): _faults_text,
    ("faults", Format.MARKDOWN): _of("faults_text:faults_markdown"),
    ("faults", Format.HTML): _faults_html,
    ("bench", Format.TEXT): _of("bench_text:bench_text"),
    ("bench", Format.MARKDOWN): _of("bench_text:bench_text", "github"),
    ("bench", Format.HTML): _plain_html("Kernel timings", _of("bench_text:bench_text")),
    ("codegen", Format.TEXT): _of("codegen_text:codegen_text"),
    ("codegen", Format.MARKDOWN): _of("codegen_text:codegen_text", "github"),
    ("codegen", Format.HTML): _plain_html("Compiled kernels", _of("codegen_text:codegen_text")),
    ("agree", Format.TEXT): _of("agree_text:agree_text"),
    ("agree", Format.MARKDOWN): _of("agree_text:agree_markdown"),
    ("agree", Format.HTML): _of("agree_html:agree_html"),
    ("agree", Format.JUNIT): _of("agree_junit:agree_junit"),
    ("release", Format.TEXT): _of("release_text:release_text"),
    ("release", Format.MARKDOWN): _of("release_text:release_text", "github"),
    ("release", Format.HTML): _of("release_text:release_html"),
    ("report", Format.TEXT): _of("joined_html:joined_text"),
    ("report", Format.MARKDOWN): _of("joined_html:joined_text", "github"),
    ("report", Format.HTML): _report_html,
    ("capture", Format.TEXT): _of("capture_text:capture_text"),
    ("capture", Format.MARKDOWN): _of("capture_text:capture_text", "github"),
    ("capture", Format.HTML): _plain_html(
        "Capture from a server", _of("capture_text:capture_text")
    ),
    ("golden", Format.TEXT): _of("golden_text:golden_text"),
    ("golden", Format.MARKDOWN): _of("golden_text:golden_text", "github"),
    ("golden", Format.HTML): _golden_html,
    ("forward", Format.TEXT): _of("forward_text:forward_text"),
    ("forward", Format.MARKDOWN): _of("forward_text:forward_text", "github"),
    ("forward", Format.HTML): _forward_html,
}
