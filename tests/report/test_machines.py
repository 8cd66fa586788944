"""JUnit, SARIF and JSON: what other programs read."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from junitparser import Error, Failure, JUnitXml, Skipped

from nvfp4check.findings import CheckError
from nvfp4check.report.formats import Format
from nvfp4check.report.junit import junit
from nvfp4check.report.render import Extras, render
from nvfp4check.report.sarif import MOST_RESULTS, sarif

Document = dict[str, Any]
Rules = dict[str, dict[str, Any]]
SARIF_SCHEMA = Path(__file__).parents[2] / "goldens/schemas/sarif-schema-2.1.0.json"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft4Validator:
    """The validator of the OASIS schema, which is of draft 4."""
    schema = json.loads(SARIF_SCHEMA.read_text(encoding="utf-8"))
    return jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("name", ["failed", "passed", "incomplete"])
def test_sarif_keeps_to_the_schema(
    request: pytest.FixtureRequest, name: str, validator: Any, rules: Rules
) -> None:
    log = json.loads(sarif(request.getfixturevalue(name), rules=rules))
    assert list(validator.iter_errors(log)) == []


@pytest.mark.parametrize("break_it", ["level", "ruleId", "message"])
def test_the_schema_sees_a_log_that_is_wrong(
    validator: Any, failed: Document, break_it: str
) -> None:
    log = json.loads(sarif(failed, rules={}))
    log["runs"][0]["results"][0][break_it] = 7
    assert list(validator.iter_errors(log))


def test_sarif_has_a_result_for_each_finding_with_its_place(failed: Document) -> None:
    run = json.loads(sarif(failed, rules={}))["runs"][0]
    assert len(run["results"]) == len(failed["findings"])
    lost = run["results"][200]
    place = lost["locations"][0]
    assert lost["ruleId"] == "NV203"
    assert run["tool"]["driver"]["rules"][lost["ruleIndex"]]["id"] == "NV203"
    assert place["physicalLocation"]["region"]["byteOffset"] == 123_456
    assert place["physicalLocation"]["artifactLocation"]["uri"] == (
        "model-00001-of-00002.safetensors"
    )
    name = place["logicalLocations"][0]["fullyQualifiedName"]
    assert name == "model.layers.5.mlp.experts.3.up_proj.weight"


def test_every_place_in_sarif_has_a_line_for_code_scanning(failed: Document) -> None:
    results = json.loads(sarif(failed, rules={}))["runs"][0]["results"]
    regions = [r["locations"][0]["physicalLocation"]["region"] for r in results]
    assert {region["startLine"] for region in regions} == {1}


def test_more_results_than_code_scanning_takes_are_told_and_the_most_severe_kept(
    failed: Document,
) -> None:
    findings = [*failed["findings"], *failed["findings"][-1:] * MOST_RESULTS]
    run = json.loads(sarif({**failed, "findings": findings}, rules={}))["runs"][0]
    assert len(run["results"]) == MOST_RESULTS
    assert run["results"][0]["message"]["text"] == failed["findings"][0]["message"]
    told = run["invocations"][0]["toolExecutionNotifications"][-1]["message"]["text"]
    assert told.startswith(f"{len(failed['findings']):,} further findings")


def test_sarif_levels_are_those_of_the_standard(failed: Document) -> None:
    results = json.loads(sarif(failed, rules={}))["runs"][0]["results"]
    assert [r["level"] for r in results[-3:]] == ["error", "warning", "note"]


def test_sarif_explains_a_rule_that_is_known(failed: Document, rules: Rules) -> None:
    driver = json.loads(sarif(failed, rules=rules))["runs"][0]["tool"]["driver"]
    rule = next(rule for rule in driver["rules"] if rule["id"] == "NV101")
    assert rule["name"] == "TensorMissing"
    assert rule["help"]["text"] == "Repair: Export the checkpoint again."


def test_fingerprints_tell_findings_apart_and_ignore_the_location(failed: Document) -> None:
    def fingerprints(document: Document) -> list[str]:
        results = json.loads(sarif(document, rules={}))["runs"][0]["results"]
        return [result["partialFingerprints"]["nvfp4check/1"] for result in results]

    here = fingerprints(failed)
    elsewhere = failed | {"checkpoint": failed["checkpoint"] | {"location": "/elsewhere"}}
    assert len(set(here)) == len(here)
    assert fingerprints(elsewhere) == here


def test_an_incomplete_run_is_no_successful_execution(
    incomplete: Document, passed: Document
) -> None:
    def successful(document: Document) -> bool:
        run = json.loads(sarif(document, rules={}))["runs"][0]
        return bool(run["invocations"][0]["executionSuccessful"])

    assert successful(passed)
    assert not successful(incomplete)


def test_junit_has_a_case_for_each_rule_and_fails_those_with_errors(failed: Document) -> None:
    suite = next(iter(JUnitXml.fromstring(junit(failed).encode())))
    failing = {
        case.name for case in suite if any(isinstance(result, Failure) for result in case.result)
    }
    assert failing == {"NV101 tensor-missing", "NV203 scale-lost"}
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (6, 2, 0, 1)


def test_junit_fails_warnings_when_the_run_does(failed: Document) -> None:
    assert next(iter(JUnitXml.fromstring(junit(failed, fail_on="warning").encode()))).failures == 3


def test_junit_of_a_pass_has_no_failure(passed: Document) -> None:
    suite = next(iter(JUnitXml.fromstring(junit(passed).encode())))
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (5, 0, 0, 0)


@pytest.mark.parametrize(("name", "kind"), [("failed", Skipped), ("incomplete", Error)])
def test_what_was_skipped_is_an_error_where_the_verdict_hangs_on_it(
    request: pytest.FixtureRequest, name: str, kind: type
) -> None:
    text = junit(request.getfixturevalue(name))
    case = list(next(iter(JUnitXml.fromstring(text.encode()))))[-1]
    assert case.name == "NV620"
    assert [type(result) for result in case.result] == [kind]


def test_junit_is_xml_whatever_the_names_hold(failed: Document) -> None:
    failed["findings"][0]["message"] = "".join(map(chr, range(0x20))) + "]]>\ufffe\ud800"
    root = ElementTree.fromstring(junit(failed))
    assert root.tag == "testsuites"


def test_json_is_the_document_itself(failed: Document) -> None:
    assert json.loads(render(failed, Format.JSON)) == failed


def test_json_refuses_what_is_not_json(failed: Document) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        render(failed | {"seconds": float("nan")}, Format.JSON)


@pytest.mark.parametrize("format", Format)
def test_a_validation_can_be_written_in_every_format(
    format: Format, failed: Document, rules: Rules
) -> None:
    assert "NV101" in render(failed, format, Extras(rules=rules))


def test_a_format_that_a_kind_does_not_have_is_refused_with_the_choices() -> None:
    document = {"schema": "nvfp4check/rules/1"}
    with pytest.raises(CheckError, match=r"choose among json, text, markdown, html"):
        render(document, Format.SARIF)


@pytest.mark.parametrize("schema", [None, "other/validate/1", "nvfp4check", 7])
def test_a_document_of_another_tool_is_refused(schema: object) -> None:
    with pytest.raises(CheckError, match="none of nvfp4check's"):
        render({"schema": schema}, Format.TEXT)
