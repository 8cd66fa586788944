"""What people see of a comparison, and that nothing in it is markup."""

import pytest

from nvfp4check.report.diff_folds import fold_weights, largest, placed, ranges, verdict
from nvfp4check.report.diff_html import diff_html, profiles_of
from nvfp4check.report.diff_text import SHOWN_FOLDS, SHOWN_LARGEST, diff_markdown, diff_text


def weight(name, cls="identical", **more):
    return {
        "name": name,
        "class": cls,
        "formats": ["nvfp4", "nvfp4"],
        "elements": 1 << 20,
        "sqnr_db": None,
        "max_abs": 0.0,
        "worst": None,
        "max_ulp": None,
        "changed_codes": 0,
        "changed_scales": 0,
        "bound_holds": True,
        "beyond": 0,
        "relative_error": 0.0,
        "weighted": False,
        "diagnosis": None,
    } | more


def document(weights, **more):
    side = {
        "location": "./model",
        "producer": "modelopt 0.39.0",
        "architecture": "DeepseekV3ForCausalLM",
        "formats": {"nvfp4": len(weights)},
        "bytes": 1 << 30,
        "weights": len(weights),
    }
    summary = {}
    for entry in weights:
        summary[entry["class"]] = summary.get(entry["class"], 0) + 1
    return {
        "schema": "nvfp4check/diff/1",
        "a": side,
        "b": side,
        "level": "bytes",
        "fail_on": "different",
        "failing": {"weights": 0, "config": 0},
        "summary": summary,
        "patterns": [],
        "config": [],
        "weights": weights,
        "sample": None,
        "skipped": [],
        "bytes_read": 1 << 31,
        "seconds": 2.0,
    } | more


def whole_model(cls="different"):
    """44,000 expert weights, most of them identical, some of every layer not."""
    return [
        weight(
            f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight",
            **(
                {
                    "cls": cls,
                    "sqnr_db": 10.0 + layer,
                    "relative_error": 0.1 + expert / 1000,
                    "bound_holds": False,
                    "diagnosis": f"it is a's model.layers.{layer}.mlp.experts.{expert + 1}.up",
                    "worst": {"row": 1, "column": 2, "a": 0.5, "b": "NaN"},
                }
                if expert < 3
                else {}
            ),
        )
        for layer in range(3, 61)
        for expert in range(256)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    ]


def test_a_whole_model_fits_a_screen():
    found = document(whole_model(), failing={"weights": 522, "config": 0})
    lines = diff_text(found).splitlines()

    assert len(lines) <= 40
    assert lines[0] == "DIFFERENT: 522 of 44,544 weights"
    assert any("44,022 identical" in line for line in lines)
    assert any("3-60" in line and "174" in line for line in lines)
    assert sum("%" in line for line in lines) == SHOWN_LARGEST


def test_more_ways_to_differ_than_fit_are_counted():
    weights = [
        weight(f"model.layers.0.kind{n}.weight", "different", diagnosis=f"reason {chr(97 + n)}")
        for n in range(20)
    ]
    text = diff_text(document(weights, failing={"weights": 20, "config": 0}))

    assert "… and 8 rows more (8 weights)" in text
    assert text.count("reason") == SHOWN_FOLDS


def test_kinds_of_which_the_same_is_said_share_a_row():
    weights = [weight(f"model.layers.5.kind{n}.weight", "only-in-a") for n in range(20)]

    (fold,) = fold_weights(weights, 12)

    assert (fold.count, fold.where) == (20, "5")
    assert fold.kind.endswith("and 19 kinds more")
    assert len(fold_weights(weights)) == 20


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((3,), "3"), ((3, 4), "3-4"), ((0, 2, 3, 4, 9), "0, 2-4, 9")],
)
def test_layers_are_given_as_ranges(numbers, text):
    assert ranges(numbers) == text


def test_a_weight_has_a_layer_and_a_kind():
    assert placed("model.layers.12.mlp.experts.7.up_proj.weight") == (12, "mlp.experts.*.up_proj")
    assert placed("lm_head.weight") == (None, "lm_head")


def test_the_largest_errors_come_first_and_equal_ones_by_name():
    weights = [
        weight("b", "different", relative_error=0.5),
        weight("a", "different", relative_error=0.5),
        weight("c", "different", relative_error=0.9),
        weight("d"),
    ]

    assert [w["name"] for w in largest(weights, 10)] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("weights", "more", "word"),
    [
        ([weight("a")], {}, "SAME"),
        ([weight("a")], {"config": [{}]}, "SAME WEIGHTS"),
        ([weight("a", "requantized")], {}, "WITHIN ROUNDING"),
        ([weight("a")], {"skipped": [{"what": "x", "why": "y"}]}, "INCOMPLETE"),
        ([weight("a", "different")], {"failing": {"weights": 1, "config": 0}}, "DIFFERENT"),
    ],
)
def test_the_first_word_is_the_answer(weights, more, word):
    assert verdict(document(weights, **more))[0] == word


def test_a_hostile_name_is_shown_and_not_obeyed():
    name = "model.layers.0.<script>alert(1)</script>\x1b[2J|`x`.weight"
    found = document(
        [weight(name, "different", relative_error=1.0, bound_holds=False)],
        failing={"weights": 1, "config": 0},
    )

    assert "<script" not in diff_html(found).replace("<script>alert", "", 0).partition("<body>")[2]
    assert "\x1b" not in diff_text(found)
    assert "\x1b" not in diff_markdown(found)
    assert "<script" not in diff_markdown(found)


def test_the_profile_shows_the_worst_of_each_kind_in_each_layer():
    layers, full, profiles = profiles_of(whole_model())

    assert layers == 61
    assert full == 0.2  # the largest error is 10.2 %
    assert [profile.kind for profile in profiles] == [
        f"mlp.experts.*.{leaf}" for leaf in ("down_proj", "gate_proj", "up_proj")
    ]
    bars = profiles[0].bars
    assert [bar.layer for bar in bars] == [*range(3, 61)]
    assert all(bar.height == pytest.approx(51) and bar.tone == "error" for bar in bars)


def test_identical_checkpoints_have_no_profile():
    assert profiles_of([weight("model.layers.1.mlp.up_proj.weight")])[2] == []
    assert "Through the layers" not in diff_html(document([weight("model.layers.1.a.weight")]))
