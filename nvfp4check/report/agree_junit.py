"""An agreement as JUnit XML: a test case for each criterion, layer and broken run."""

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from nvfp4check.report import agree_words as words
from nvfp4check.report.visible import visible


def agree_junit(document: Mapping[str, Any]) -> str:
    """Return one test suite.

    What was judged fails or, undecided, is an error. A layer is judged only where the verdict
    rests on layers; elsewhere its divergence stands in `system-out`.
    """
    suite = ElementTree.Element("testsuite", name=f"nvfp4check agree {words.title(document)}")
    for criterion in document["criteria"]:
        case = _case(suite, "criterion", criterion["what"])
        found = words.criterion_sentence(criterion, document["alpha"])
        if criterion["decision"] == "fail":
            ElementTree.SubElement(case, "failure", type="fail", message=found)
        elif criterion["decision"] == "undecided":
            ElementTree.SubElement(case, "error", type="undecided", message=found)
    if not document["criteria"]:
        case = _case(suite, "criterion", "something is judged")
        message = next(words.criteria_sentences(document))
        ElementTree.SubElement(case, "error", type="undecided", message=message)
    judged = any(c["what"].startswith("layers within") for c in document["criteria"])
    for layer in dict.fromkeys(point["layer"] for point in document["layers"]):
        case = _case(suite, "layer", f"layer {layer}")
        lines = [
            f"{point['point']}: relative error {words.number(point['relative_error'])}, floor "
            f"{words.number(point['floor'])}, error over bound "
            f"{words.number(point.get('bound_ratio'))}"
            for point in document["layers"]
            if point["layer"] == layer and point["diverges"]
        ]
        first = document["first_divergence"]
        if first and first["layer"] == layer:
            lines.insert(0, words.divergence_sentence(document) or "")
        if lines and judged:
            failure = ElementTree.SubElement(case, "failure", type="layer", message=lines[0])
            failure.text = "\n".join(lines)
        elif lines:
            ElementTree.SubElement(case, "system-out").text = "\n".join(lines)
    for problem in document["problems"]:
        case = _case(suite, "run", f"{problem['run']}: {problem['kind']}")
        tag = "failure" if problem["fatal"] else "skipped"
        ElementTree.SubElement(case, tag, message=visible(problem["message"]))
    suite.set("tests", str(len(suite)))
    for tag, name in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(name, str(len(suite.findall(f"testcase/{tag}"))))
    root = ElementTree.Element("testsuites", name="nvfp4check")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, kind: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", classname=f"nvfp4check.agree.{kind}", name=visible(name)
    )
