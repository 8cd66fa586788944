import re
from collections.abc import Callable
from typing import Any

import pytest

from nvfp4check.report.fold import fold, kind_of, place, size_text
from nvfp4check.report.formats import Format
from nvfp4check.report.render import Extras, render
from nvfp4check.report.validate_markdown import markdown, validate_markdown
from nvfp4check.report.validate_text import validate_text
from nvfp4check.report.visible import value_text, visible

Document = dict[str, Any]
RENDERERS = [validate_text, validate_markdown]

#: A character that moves a cursor, reorders or hides, whatever renders it.
ACTIVE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029]")


def test_the_first_line_is_the_verdict_with_its_counts(failed: Document) -> None:
    first = validate_text(failed).splitlines()[0]
    assert first == "FAIL: 201 errors, 1 warning, 1 note in /models/tiny"


def test_a_sound_checkpoint_is_a_pass_without_findings(passed: Document) -> None:
    assert validate_text(passed) == (
        "PASS: no findings in /models/tiny\n"
        "DeepseekV3ForCausalLM, modelopt 0.39.0, 413.31 GB\n"
        "\n"
        "weights stored as      count\n"
        "-------------------  -------\n"
        "nvfp4                  1,234\n"
        "bf16                      56\n"
        "\n"
        "Checked the headers of 2,000 tensors and the bytes of 2,000 of them "
        "(5.00 MB of codes and scales), by 5 rules, in 12.3 s.\n"
        "Nothing was skipped.\n"
    )


def test_where_no_byte_was_read_none_is_spoken_of(passed: Document) -> None:
    passed["coverage"] |= {"level": "bytes", "bytes_checked": 0}
    assert "Checked the headers of 2,000 tensors, by 5 rules, in 12.3 s.\n" in validate_text(passed)


@pytest.mark.parametrize("render", RENDERERS)
def test_what_was_skipped_is_said_with_the_reason(
    render: Callable[[Document], str], incomplete: Document
) -> None:
    said = render(incomplete)
    assert "INCOMPLETE" in said
    assert "NV620" in said
    assert "no model card" in said


def test_repeats_of_one_kind_are_folded_and_counted(failed: Document) -> None:
    said = validate_text(failed)
    assert "error NV101 tensor-missing (200 findings)\n" in said
    assert said.count("not in the checkpoint, and the architecture needs it") == 1
    assert "… and 199 more of model.layers.*.mlp.experts.*.down_proj.weight_scale\n" in said


def test_a_rule_with_many_kinds_shows_the_first_and_counts_the_others(failed: Document) -> None:
    first = failed["findings"][0]
    failed["findings"] = [
        first | {"tensor": f"model.{letter}.{n}.weight"} for letter in "abcdef" for n in range(5)
    ]
    said = validate_text(failed)
    assert [f"model.{letter}.0.weight" in said for letter in "abcdef"] == [True] * 3 + [False] * 3
    assert "  … and 15 more of 3 other kinds\n" in said


def test_folding_loses_no_finding(failed: Document) -> None:
    folds = fold(failed["findings"])
    assert [finding for group in folds for finding in group.findings] == failed["findings"]


def test_a_finding_shows_its_place_and_both_values(failed: Document) -> None:
    said = validate_text(failed)
    where = "model.layers.5.mlp.experts.3.up_proj.weight, model-00001-of-00002.safetensors"
    assert f"    at: {where}, byte 123,456\n" in said
    assert "    observed: 812\n    expected: 0\n" in said


def test_a_place_does_not_repeat_what_the_message_names() -> None:
    finding = {"message": "a.weight is missing", "tensor": "a.weight", "shard": "1.safetensors"}
    assert place(finding) == "1.safetensors"


def test_a_place_does_not_repeat_the_count_either() -> None:
    finding = {"message": "1,812 of 2,000 blocks", "count": 1812}
    assert place(finding) == ""
    assert place(finding | {"count": 812}) == "812 in all"


def test_a_run_at_level_headers_claims_no_bytes(passed: Document) -> None:
    passed["coverage"]["level"] = "headers"
    passed["coverage"]["bytes_checked"] = 0
    assert "Checked the headers of 2,000 tensors, by 5 rules" in validate_text(passed)


@pytest.mark.parametrize("render", RENDERERS)
def test_a_sample_says_what_it_may_have_missed(
    render: Callable[[Document], str], passed: Document
) -> None:
    passed["coverage"]["sample"] = {
        "fraction": 0.1,
        "seed": 7,
        "groups": 50,
        "groups_read": 5,
        "weights": 200,
        "weights_read": 20,
        "missed": [{"defective_groups": 1, "probability": 0.9}],
    }
    said = render(passed)
    assert "20 of 200 weights, in 5 of 50 groups" in said
    assert "A defect in 1 group is missed with probability 0.9." in said


@pytest.mark.parametrize("render", RENDERERS)
def test_no_character_of_a_hostile_name_reaches_the_terminal(
    render: Callable[[Document], str], failed: Document, hostile: str
) -> None:
    assert ACTIVE.search(hostile)
    assert not ACTIVE.search(render(failed))
    assert "x1b" in render(failed)


def test_colour_is_used_only_when_asked_for(failed: Document) -> None:
    plain, colored = validate_text(failed), validate_text(failed, color=True)
    assert "\x1b" not in plain
    assert re.sub("\x1b\\[[0-9]+m", "", colored) == plain
    assert colored.startswith("\x1b[31mFAIL")


def test_markdown_shows_a_hostile_name_as_text(hostile: str) -> None:
    shown = markdown(hostile)
    assert not re.search(r"(?<!\\)[|`*_]", shown)
    assert "<" not in shown


def test_a_markdown_table_keeps_its_columns(failed: Document) -> None:
    rows = [line for line in validate_markdown(failed).splitlines() if line.startswith("| error")]
    assert len(rows) == 2
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)])
def test_every_control_character_is_made_visible(code: int) -> None:
    assert visible(f"a{chr(code)}b") == f"a\\x{code:02x}b"


@pytest.mark.parametrize("character", "\u200b\u202e\u2028\u2066\ufeff\ud800\ue000")
def test_what_reorders_or_hides_is_made_visible(character: str) -> None:
    assert visible(character) == f"\\u{ord(character):04x}"


def test_plain_text_stays_as_it_is() -> None:
    assert visible("±6, … café 模型") == "±6, … café 模型"


def test_a_long_value_is_cut() -> None:
    assert value_text(list(range(1000)), 20) == "[0, 1, 2, 3, 4, 5, …"


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("layers.12.mlp.experts.255.up_proj", "layers.*.mlp.experts.*.up_proj"),
        ("model.norm2.weight", "model.norm2.weight"),
        ("blocks.3", "blocks.*"),
        (None, ""),
    ],
)
def test_a_kind_has_no_numbers_of_layers_and_experts(tensor: str | None, kind: str) -> None:
    assert kind_of(tensor) == kind


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (413_306_995_616, "413.31 GB"),
        (10**15, "1,000.00 TB"),
    ],
)
def test_sizes_are_in_decimal_units(count: int, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize("width", [60, 100])
def test_prose_keeps_to_the_width_it_is_given(rules: dict[str, dict[str, Any]], width: int) -> None:
    rule = rules["NV101"] | {"why": "word " * 60}
    document = {"schema": "nvfp4check/rules/1", "explained": True, "rules": [rule]}
    lines = render(document, Format.TEXT, Extras(width=width)).splitlines()
    assert width - 5 <= max(map(len, lines)) <= width
