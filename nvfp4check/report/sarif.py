"""A validation as SARIF 2.1.0, for code scanning and the viewers of static analysis.

A finding's place is the shard, with the byte offset where it is known, and the tensor as a logical
location. Section numbers are those of the OASIS standard. GitHub takes a subset of it: a region
must have a line, so that of a binary file is its first, and of more than `MOST_RESULTS` a whole
upload is refused, so that the most severe are kept and the number of the others is told.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from nvfp4check.report.fold import FindingRecord
from nvfp4check.report.visible import visible

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)

#: The base that the shards' relative paths are resolved against (3.14.14).
_BASE = "CHECKPOINT"

#: Results of a run that GitHub's code scanning accepts.
MOST_RESULTS = 25_000

#: 3.27.10: `info` is a note.
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


def sarif(document: Mapping[str, Any], *, rules: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the findings as one SARIF run.

    `rules` are the explained rules by id, as `nvfp4check rules --format json` gives them.
    """
    coverage = document["coverage"]
    named = {finding["rule"]: finding for finding in document["findings"]}
    identifiers = sorted({*coverage["rules"], *named})
    index = {identifier: position for position, identifier in enumerate(identifiers)}
    location = visible(document["checkpoint"]["location"])
    kept = document["findings"][:MOST_RESULTS]
    told = [f"skipped {entry['what']}: {entry['why']}" for entry in coverage["skipped"]]
    if len(kept) < len(document["findings"]):
        told.append(
            f"{len(document['findings']) - len(kept):,} further findings, none more severe, are "
            "left out here; JSON has them all"
        )
    run = {
        "tool": {
            "driver": {
                "name": document["tool"]["name"],
                "version": document["tool"]["version"],
                "rules": [_descriptor(i, rules.get(i), named.get(i)) for i in identifiers],
            }
        },
        "invocations": [
            {
                "executionSuccessful": document["verdict"] != "incomplete",
                "toolExecutionNotifications": [
                    {"level": "warning", "message": {"text": visible(text)}} for text in told
                ],
            }
        ],
        "originalUriBaseIds": {_BASE: {"description": {"text": f"the checkpoint {location}"}}},
        "results": [_result(finding, index) for finding in kept],
        "columnKind": "unicodeCodePoints",
        "properties": {"verdict": document["verdict"], "checkpoint": location},
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, allow_nan=False) + "\n"


def _descriptor(
    identifier: str, rule: Mapping[str, Any] | None, finding: FindingRecord | None
) -> dict[str, Any]:
    descriptor: dict[str, Any] = {"id": identifier}
    known = rule or finding
    if known is None:
        return descriptor
    descriptor["name"] = "".join(word.capitalize() for word in known["name"].split("-"))
    descriptor["defaultConfiguration"] = {"level": _LEVELS[known["severity"]]}
    if rule is not None:
        descriptor["shortDescription"] = {"text": rule["fires_when"]}
        descriptor["fullDescription"] = {"text": rule["why"]}
        descriptor["help"] = {"text": f"Repair: {rule['repair']}"}
        if rule["incidents"]:
            descriptor["helpUri"] = rule["incidents"][0]
    return descriptor


def _result(finding: FindingRecord, index: Mapping[str, int]) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": _physical(finding)}
    if finding.get("tensor"):
        tensor = visible(finding["tensor"])
        location["logicalLocations"] = [{"fullyQualifiedName": tensor, "kind": "tensor"}]
    properties = {
        key: finding[key]
        for key in ("count", "observed", "expected")
        if finding.get(key) is not None
    }
    return {
        "ruleId": finding["rule"],
        "ruleIndex": index[finding["rule"]],
        "level": _LEVELS[finding["severity"]],
        "message": {"text": visible(finding["message"])},
        "locations": [location],
        "partialFingerprints": {"nvfp4check/1": _fingerprint(finding)},
        "properties": properties,
    }


def _physical(finding: FindingRecord) -> dict[str, Any]:
    shard = finding.get("shard")
    path = quote(str(PurePosixPath(visible(shard)))) if shard else "./"
    region = {"startLine": 1}
    if finding.get("offset") is not None:
        region |= {"byteOffset": finding["offset"], "byteLength": 0}
    return {"artifactLocation": {"uri": path, "uriBaseId": _BASE}, "region": region}


def _fingerprint(finding: FindingRecord) -> str:
    """Return what stays the same when the checkpoint is written anew: the rule and the tensor."""
    parts = (finding["rule"], finding.get("tensor") or "", finding.get("shard") or "")
    return hashlib.sha256("\0".join(parts).encode("utf-8", "backslashreplace")).hexdigest()[:32]
