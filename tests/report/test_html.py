from collections import Counter
from html.parser import HTMLParser
from typing import Any

from nvfp4check.report.histograms import histogram
from nvfp4check.report.model_map import model_map
from nvfp4check.report.validate_html import SHOWN_PER_FOLD, validate_html

Document = dict[str, Any]
Rules = dict[str, dict[str, Any]]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """What a browser would make of a page: its tags, its text, its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def page(document: Document, rules: Rules | None = None, **more: Any) -> Page:
    return Page(validate_html(document, rules=rules or {}, **more))


def test_every_tag_is_closed(failed: Document, rules: Rules) -> None:
    assert page(failed, rules).open == []


def test_the_verdict_comes_first(failed: Document) -> None:
    body = page(failed).text.partition("FAIL: /models/tiny")[2].split()
    assert body[:5] == ["FAIL", "/models/tiny", "201", "errors,", "1"]


def test_a_hostile_name_is_text_and_never_markup(failed: Document, hostile: str) -> None:
    shown = page(failed, weights={hostile: "nvfp4"})
    assert shown.tags["script"] == 0
    assert "\\x1b[2J<script>alert('x')</script>\\u202e\\x0a&\"|`" in shown.text
    assert "\x1b" not in shown.text
    assert "\u202e" not in shown.text


def test_a_hostile_name_cannot_leave_an_attribute(failed: Document) -> None:
    name = 'model.layers.1."onload="alert(1).weight'
    shown = page(failed, weights={name: "nvfp4"})
    assert not any(key.startswith("on") for key, _ in shown.attributes)
    assert any(value and '"onload="alert(1)' in value for _, value in shown.attributes)


def test_the_page_needs_nothing_from_outside(failed: Document, rules: Rules) -> None:
    shown = page(failed, rules)
    assert not {"script", "link", "img", "iframe", "object"} & set(shown.tags)
    assert [value for key, value in shown.attributes if key in ("src", "href")] == [
        "https://example.org/thread/1"
    ]


def test_only_a_web_address_becomes_a_link(failed: Document, rules: Rules) -> None:
    shown = page(failed, rules)
    assert "javascript:alert(1)" in shown.text
    assert not any(value == "javascript:alert(1)" for _, value in shown.attributes)


def test_a_rule_is_explained_beside_its_findings(failed: Document, rules: Rules) -> None:
    assert "Repair. Export the checkpoint again." in page(failed, rules).text


def test_a_long_fold_says_how_many_it_leaves_out(failed: Document) -> None:
    text = page(failed).text
    assert text.count("not in the checkpoint, and the architecture needs it") == SHOWN_PER_FOLD
    assert "and 100 that only --format json lists" in text


def test_a_pass_says_so(passed: Document) -> None:
    text = page(passed).text
    assert "PASS" in text
    assert "Nothing was skipped." in text


def test_the_map_shows_the_worst_finding_of_each_cell(failed: Document) -> None:
    weights = {f"model.layers.{n}.mlp.experts.0.down_proj.weight": "nvfp4" for n in range(6)}
    weights |= {"lm_head.weight": "bf16"}
    shown = model_map(weights, failed["findings"])
    row = next(row for row in shown.rows if row.label == "mlp.experts.*.down_proj")
    assert [(run.start, run.length, run.tone) for run in row.runs] == [
        (0, 3, "nvfp4"),
        (3, 2, "error"),
        (5, 1, "nvfp4"),
    ]
    assert row.runs[1].title == "layers 3 to 4: nvfp4, 100 findings"
    assert [(name, cell.tone) for name, cell in shown.outside] == [("lm_head", "info")]


def test_a_layer_without_the_module_is_left_empty() -> None:
    weights = {f"model.layers.{n}.mlp.gate.weight": "bf16" for n in (0, 2)}
    (row,) = model_map(weights, []).rows
    assert [(run.start, run.length) for run in row.runs] == [(0, 1), (2, 1)]


def test_a_hostile_layer_number_makes_no_endless_map() -> None:
    assert model_map({"model.layers.999999.mlp.gate.weight": "bf16"}, []).layers == 0


def test_a_graver_finding_wins_the_cell_in_any_order() -> None:
    tensor = "model.layers.0.mlp.gate.weight"
    for order in (("error", "info", "warning"), ("info", "warning", "error")):
        found = [{"tensor": tensor, "severity": severity} for severity in order]
        (row,) = model_map({tensor: "bf16"}, found).rows
        assert row.runs[0].tone == "error"


def test_bars_are_in_per_cent_of_the_tallest() -> None:
    plot = histogram("Codes", "", {"0": 50, "1": 200, "2": 0, "3": 1})
    assert [bar.height for bar in plot.bars] == [25.0, 100.0, 0.0, 0.7]
    assert plot.bars[0].title == "0: 50 (19.92%)"
    assert plot.ticks == ("0", "1", "2", "3")


def test_a_histogram_is_drawn_with_a_bar_for_each_value_that_occurs(failed: Document) -> None:
    plot = histogram("Codes", "of 3 weights", {"0": 5, "1": 2, "2": 0})
    without, drawn = page(failed), page(failed, histograms=[plot])
    assert drawn.tags["rect"] - without.tags["rect"] == 2
    assert "of 3 weights" in drawn.text
