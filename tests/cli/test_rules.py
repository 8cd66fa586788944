import html
import json
from collections.abc import Callable
from typing import Any

import pytest

from nvfp4check.checkpoint.rules import RULES

Run = Callable[..., Any]


def test_every_rule_is_listed(run: Run) -> None:
    ran = run("rules")
    assert ran.code == 0
    listed = [line.split()[:2] for line in ran.out.splitlines() if line.startswith("NV")]
    assert listed == [[rule.id, rule.name] for _, rule in sorted(RULES.items())]


@pytest.mark.parametrize("identifier", RULES)
def test_a_rule_is_explained_with_why_repair_and_incidents(run: Run, identifier: str) -> None:
    rule = RULES[identifier]
    ran = run("rules", identifier)
    said = " ".join(ran.out.split())
    assert said.startswith(f"{rule.id} {rule.name} ({rule.severity}, --level {rule.level})")
    for text in (f"Why: {rule.why}", f"Repair: {rule.repair}", *rule.incidents):
        assert " ".join(text.split()) in said


def test_a_prefix_names_a_group_in_any_case(run: Run) -> None:
    document = json.loads(run("rules", "nv60", "--format", "json").out)
    expected = sorted(identifier for identifier in RULES if identifier.startswith("NV60"))
    assert [rule["id"] for rule in document["rules"]] == expected


def test_the_json_document_says_what_it_is(run: Run) -> None:
    document = json.loads(run("rules", "--format", "json").out)
    assert document["schema"] == "nvfp4check/rules/1"
    assert document["tool"]["name"] == "nvfp4check"
    assert len(document["rules"]) == len(RULES)


@pytest.mark.parametrize(("asked", "hint"), [("quant-config-stael", "NV602"), ("NV61", "NV60")])
def test_an_unknown_rule_is_met_with_the_nearest(run: Run, asked: str, hint: str) -> None:
    ran = run("rules", asked)
    assert ran.code == 2
    assert ran.out == ""
    assert hint in ran.err.partition("Did you mean ")[2].partition("?")[0]


def test_markdown_has_a_row_for_each_rule(run: Run) -> None:
    rows = [
        line for line in run("rules", "--format", "markdown").out.splitlines() if "| NV" in line
    ]
    assert len(rows) == len(RULES)


def test_a_list_of_rules_is_no_junit_report(run: Run) -> None:
    ran = run("rules", "--format", "junit")
    assert ran.code == 2
    assert "'text', 'json', 'markdown', 'html'" in ran.err


def test_the_page_holds_every_rule_with_links_to_its_incidents(run: Run) -> None:
    page = run("rules", "--format", "html").out
    for rule in RULES.values():
        assert f'id="{rule.id}"' in page
        for url in rule.incidents:
            assert f'href="{html.escape(url)}"' in page
