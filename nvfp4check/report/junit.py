"""A validation as JUnit XML: one test case a rule, for the CI systems that read it."""

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from nvfp4check.report.fold import FindingRecord, place, plural
from nvfp4check.report.visible import visible


def junit(document: Mapping[str, Any], *, fail_on: str = "error") -> str:
    """Return one test suite: a case for each rule that ran and one for each thing skipped.

    A rule fails by findings at or above `fail_on`; what it found below that stands in its
    `system-out`. What was skipped is an error where it left the verdict incomplete.
    """
    coverage = document["coverage"]
    by_rule: dict[str, list[FindingRecord]] = {rule: [] for rule in coverage["rules"]}
    for finding in document["findings"]:
        by_rule.setdefault(finding["rule"], []).append(finding)

    location = visible(document["checkpoint"]["location"])
    suite = ElementTree.Element("testsuite", name=f"nvfp4check validate {location}")
    failing = {"error"} | ({"warning"} if fail_on == "warning" else set())
    for rule, findings in by_rule.items():
        _add_rule(suite, rule, findings, failing)
    not_checked = "error" if document["verdict"] == "incomplete" else "skipped"
    for entry in coverage["skipped"]:
        case = ElementTree.SubElement(
            suite, "testcase", classname="nvfp4check.skipped", name=visible(entry["what"])
        )
        ElementTree.SubElement(case, not_checked, message=visible(entry["why"]))

    counts = {tag: str(len(suite.findall(f"testcase/{tag}"))) for tag in ("failure", "error")}
    suite.set("tests", str(len(suite)))
    suite.set("failures", counts["failure"])
    suite.set("errors", counts["error"])
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    suite.set("time", f"{document['seconds']:.3f}")
    root = ElementTree.Element("testsuites", name="nvfp4check")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_rule(
    suite: ElementTree.Element, rule: str, findings: list[FindingRecord], failing: set[str]
) -> None:
    name = f"{rule} {findings[0]['name']}" if findings else rule
    case = ElementTree.SubElement(suite, "testcase", classname="nvfp4check.validate", name=name)
    fatal = [finding for finding in findings if finding["severity"] in failing]
    rest = [finding for finding in findings if finding["severity"] not in failing]
    if fatal:
        more = f" (and {plural(len(fatal) - 1, 'other')})" if len(fatal) > 1 else ""
        failure = ElementTree.SubElement(
            case, "failure", type=rule, message=visible(fatal[0]["message"]) + more
        )
        failure.text = "\n".join(_line(finding) for finding in fatal)
    if rest:
        ElementTree.SubElement(case, "system-out").text = "\n".join(_line(f) for f in rest)


def _line(finding: FindingRecord) -> str:
    where = place(finding)
    message = f"{finding['severity']}: {visible(finding['message'])}"
    return f"{message} [{where}]" if where else message
