"""An agreement as text, Markdown, JUnit and HTML, from a document with hostile names."""

from collections import Counter
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from nvfp4check.report.agree_plots import error_plot, flip_map, kl_plot, line_plot
from nvfp4check.report.agree_words import criterion_sentence
from nvfp4check.report.formats import Format
from nvfp4check.report.render import render

Document = dict[str, Any]


def point(layer: int, name: str, error: float, **more: Any) -> Document:
    return {
        "layer": layer,
        "point": name,
        "relative_error": error,
        "sqnr_db": 30.0,
        "bitwise": error == 0,
        "input_bitwise": True,
        "tokens": 10,
        "worst": None,
        "share": 0.5,
        "held_against": "noise floor",
        "floor": 0.001,
        "log_ratio": 1.0,
        "log_ratio_low": 0.5,
        "excess": 1.0,
        "excess_low": 0.5,
        "diverges": error > 0.01,
        "nonfinite_reference": 0,
        "nonfinite_candidate": 0,
        **more,
    }


@pytest.fixture
def agreement(hostile: str) -> Document:
    run = {
        "run": "candidate",
        "checkpoint": {"location": hostile},
        "mode": "stored",
        "kv_cache": "none",
        "dtype": "float32",
        "perturb": None,
        "seed": None,
        "versions": {},
    }
    problem = {"kind": "missing", "run": "candidate", "point": "hidden", "prompt": hostile}
    return {
        "schema": "nvfp4check/agree/1",
        "tool": {"name": "nvfp4check", "version": "1.2.3"},
        "verdict": "fail",
        "criteria": [
            {
                "what": "mean KL",
                "decision": "fail",
                "found": 0.5,
                "limit": 0.1,
                "bounds": [0.3, 0.7],
                "smallest_effect": 0.02,
            }
        ],
        "alpha": 0.05,
        "power": 0.8,
        "reference": {**run, "run": "reference"},
        "candidate": run,
        "noise": [],
        "prompts": [{"id": hostile, "tokens": 10, "text": None}],
        "first_divergence": {
            "layer": 1,
            "point": "mlp_output",
            "prompt": hostile,
            "token": 3,
            "text": hostile,
            "held_against": "noise floor",
        },
        "problems": [
            {**problem, "layer": layer, "message": f"{hostile} was not recorded", "fatal": False}
            for layer in range(5)
        ],
        "blind": [{"what": "the cache", "why": hostile}],
        "layers": [
            point(0, "hidden", 0.0),
            point(1, "mlp_output", 0.5),
            point(1, "hidden", 0.2),
        ],
        "routing": {
            "tokens": 20,
            "flips": 3,
            "unexplained": 1,
            "layers": [
                {
                    "layer": 1,
                    "tokens": 20,
                    "flips": 3,
                    "unexplained": 1,
                    "unjudged": 0,
                    "score_error": 0.01,
                    "experts": 16,
                    "exercised": 9,
                    "idle": [3],
                    "load_reference": [],
                    "load_candidate": [],
                    "by_position": [0, 2, 1],
                }
            ],
            "position_width": 4,
            "worst_flips": [
                {
                    "layer": 1,
                    "prompt": hostile,
                    "token": 5,
                    "dropped": [1],
                    "taken": [2, 3],
                    "margin": None,
                    "score_error": 0.01,
                    "explained": False,
                }
            ],
            "kl_split": None,
        },
        "logits": None,
        "versus": None,
    }


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_text_names_the_divergence_and_folds_what_is_missing(agreement: Document) -> None:
    text = render(agreement, Format.TEXT)

    assert text.startswith("FAIL: candidate against reference\n")
    assert "FAIL: mean KL 0.5, limit 0.1; with 95 % confidence at least 0.3" in text
    assert "First divergence: layer 1, mlp_output" in text
    assert "(and 4 more like it)" in text
    assert "3 (1 *)" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_markdown_shows_a_hostile_name_as_it_is(agreement: Document) -> None:
    text = render(agreement, Format.MARKDOWN)

    assert "<script>" not in text
    assert "## FAIL" in text


def test_junit_fails_what_was_judged_and_skips_what_was_missing(agreement: Document) -> None:
    suite = ElementTree.fromstring(render(agreement, Format.JUNIT))[0]

    assert suite.attrib["failures"] == "1"
    assert suite.attrib["skipped"] == "5"
    # The verdict rests on KL; a layer beyond the floor is told and does not fail.
    (layer,) = [case for case in suite if case.attrib["name"] == "layer 1"]
    assert [child.tag for child in layer] == ["system-out"]


def test_junit_fails_a_layer_where_layers_were_judged(agreement: Document) -> None:
    agreement["criteria"][0]["what"] = "layers within the noise floor"

    suite = ElementTree.fromstring(render(agreement, Format.JUNIT))[0]

    (layer,) = [case for case in suite if case.attrib["name"] == "layer 1"]
    assert [child.tag for child in layer] == ["failure"]


def test_the_page_is_whole_and_holds_no_markup_of_names(agreement: Document) -> None:
    page = Page(render(agreement, Format.HTML))

    assert page.open == []
    assert page.tags["script"] == 0
    assert not {"link", "img", "iframe"} & set(page.tags)
    legend = 4
    assert page.tags["svg"] == 2 + legend  # errors by layer, and one row of the map of flips
    assert page.tags["polyline"] == 1 + legend  # the floor; one layer with an error makes no line


def test_a_line_stands_where_its_logarithm_does_and_breaks_at_a_gap() -> None:
    plot = line_plot("t", "", [("s", "line-a", [1.0, 0.01, None, 0.1, 0.1])], list("abcde"))

    assert plot is not None
    (line,) = plot.lines
    assert line.pieces == ("10.0,0.0 30.0,100.0", "70.0,50.0 90.0,50.0")
    assert plot.grid == (("1e-2", 100.0), ("1e-1", 50.0), ("1e0", 0.0))


def test_nothing_but_equal_points_makes_no_plot(agreement: Document) -> None:
    agreement["layers"] = [point(0, "hidden", 0.0, floor=None)]
    agreement["routing"]["layers"][0]["by_position"] = [0, 0]

    assert error_plot(agreement) is None
    assert flip_map(agreement) is None


def test_the_darkest_cell_is_the_one_with_most_flips(agreement: Document) -> None:
    heat = flip_map(agreement)

    assert heat is not None
    ((_, cells),) = heat.rows
    assert [(place, strength) for place, strength, _ in cells] == [(1, 1.0), (2, 0.625)]


@pytest.mark.parametrize(
    ("what", "decision", "said"),
    [
        ("mean KL", "pass", "PASS: mean KL 0.5, limit 0.6; with 95 % confidence at most 0.7"),
        ("mean KL", "fail", "FAIL: mean KL 0.5, limit 0.6; with 95 % confidence at least 0.3"),
        (
            "top-1 agreement",
            "pass",
            "PASS: top-1 agreement 50.00%, limit 60.00%; with 95 % confidence at least 30.00%",
        ),
        (
            "top-1 agreement",
            "fail",
            "FAIL: top-1 agreement 50.00%, limit 60.00%; with 95 % confidence at most 70.00%",
        ),
    ],
)
def test_a_decision_is_told_with_the_bound_it_rests_on(what: str, decision: str, said: str) -> None:
    criterion = {"what": what, "decision": decision, "found": 0.5, "limit": 0.6}

    assert criterion_sentence({**criterion, "bounds": [0.3, 0.7]}, 0.05) == said


@pytest.mark.parametrize(
    ("rare", "said"),
    [
        (0.0, "0.7, of positions like these; of a kind rarer than 1 in 20 there may be none"),
        (7.0, "0.7, with 7 nats at positions of a kind too rare to be among these"),
    ],
)
def test_a_limit_that_is_kept_says_what_it_speaks_of(rare: float, said: str) -> None:
    criterion = {"what": "mean KL", "decision": "pass", "found": 0.5, "limit": 0.8}
    spoken = {"bounds": [0.3, 0.7], "unseen_share": 0.05, "rare_kl": rare}

    assert criterion_sentence({**criterion, **spoken}, 0.05).endswith(said)


def test_what_is_open_is_told_with_both_bounds_and_a_remedy() -> None:
    criterion = {"what": "mean KL", "decision": "undecided", "found": 0.5, "limit": 0.6}

    assert "between 0.3 and 0.7, which more prompts" in criterion_sentence(
        {**criterion, "bounds": [0.3, 0.7]}, 0.05
    )
    assert "known from below only" in criterion_sentence({**criterion, "bounds": [0.3, 0.55]}, 0.05)
    assert "too few positions" in criterion_sentence({**criterion, "bounds": None}, 0.05)


def test_the_histogram_of_kl_shows_the_decades_that_occur_and_one_beside_them() -> None:
    counts = [["0", 0], ["<1e-12", 0], ["1e-12", 0], ["1e-11", 3], ["1e-10", 12], ["1e-9", 0]]
    plot = kl_plot({"logits": {"kl_histogram": [*counts, ["1e-8", 0]]}})

    assert [bar.count for bar in plot.bars] == [0, 3, 12, 0]
    assert plot.ticks == ("1e\u221212", "1e\u221211", "1e\u221210", "1e\u22129")
    assert plot.scale == (("0", 100.0), ("5", 58.33), ("10", 16.67))
    assert plot.bars[2].height == 100


def test_the_layer_where_runs_part_is_shown_point_by_point(agreement: Document) -> None:
    agreement["layers"][1] |= {
        "worst": {"prompt": "p", "token": 7, "relative_error": 0.75},
        "outlier": {"prompt": "p", "token": 7, "tokens": 1, "error": 0.75, "noise": 0.0125},
    }

    text, page = (render(agreement, form) for form in (Format.TEXT, Format.HTML))

    shown = text.partition("Layer 1, where they part")[2]
    (row,) = [line for line in shown.splitlines() if line.startswith("1        mlp_output")]
    assert "30.0 dB" in row
    assert "p, 7: 0.75" in row
    assert "noise floor, 0.001" in row
    assert "1 token farther than noise takes any (p, 7): 0.75, noise at most 0.0125" in row
    assert "Layer 1, where they part" in page
    assert "All 3 points" in page


def test_runs_that_do_not_part_have_no_such_layer(agreement: Document) -> None:
    agreement["first_divergence"] = None

    assert "where they part" not in render(agreement, Format.TEXT)
    assert "where they part" not in render(agreement, Format.MARKDOWN)
    assert "All 3 points" in render(agreement, Format.HTML)


def test_a_point_beyond_its_bound_says_at_how_many_tokens(agreement: Document) -> None:
    agreement["layers"][1] |= {
        "held_against": "bound",
        "bound": 0.25,
        "bound_ratio": 2.5,
        "bound_tokens": 146,
        "bound_exceeding": 3,
    }

    shown = render(agreement, Format.TEXT).partition("where they part")[2]

    assert "bound, 0.25" in shown
    assert "beyond at 3 of 146 tokens" in shown


LOGITS = {
    **dict.fromkeys(
        ("kl_mean", "kl_median", "kl_p95", "kl_p99", "kl_p999", "kl_max", "kl_reverse_mean"), 0.5
    ),
    **dict.fromkeys(("jsd_mean", "top1", "top5_overlap", "top10_overlap", "delta_p_rms"), 0.25),
    **dict.fromkeys(("ppl_reference", "ppl_candidate", "ppl_log_ratio"), 3.0),
    **dict.fromkeys(("kl_ci95", "top1_ci95"), (0.125, 0.75)),
    **dict.fromkeys(("kl_smallest_effect", "top1_smallest_effect"), 0.5),
    **dict.fromkeys(("by_confidence", "by_position", "kl_histogram", "by_prompt", "worst"), ()),
    **{"positions": 10, "segments": 4, "contaminated": 0, "kl_infinite": 0, "best_only": None},
}


def test_a_column_of_noise_is_shown_where_there_is_noise(agreement: Document) -> None:
    agreement["logits"] = {**LOGITS, "noise": []}
    without = render(agreement, Format.TEXT)
    agreement["noise"] = [agreement["reference"]]
    agreement["logits"] = {**LOGITS, "noise": [LOGITS]}
    with_noise = render(agreement, Format.TEXT)

    assert "noise floor" not in without.partition("\nLogits\n")[2].splitlines()[0]
    assert "noise floor" in with_noise.partition("\nLogits\n")[2].splitlines()[0]


def test_a_verdict_by_bounds_says_that_logits_are_not_judged(agreement: Document) -> None:
    agreement["logits"] = {**LOGITS, "noise": []}
    bounds = {**agreement["criteria"][0], "what": "layers within their derived bounds"}
    agreement["criteria"] = [{**bounds, "limit": None}]

    assert "The verdict rests on layers alone" in render(agreement, Format.TEXT)
    agreement["criteria"].append({**bounds, "what": "logits within the noise floor", "limit": None})
    assert "The verdict rests on layers alone" not in render(agreement, Format.TEXT)


def test_logits_beyond_the_noise_behind_layers_within_it_point_at_the_head(
    agreement: Document,
) -> None:
    agreement["logits"] = {**LOGITS, "noise": [], "held_against_noise": {"diverges": True}}
    assert "it is the norm, the head" not in render(agreement, Format.TEXT)

    agreement["first_divergence"] = None
    assert "it is the norm, the head" in render(agreement, Format.TEXT)
