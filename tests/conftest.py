"""What every folder of tests may use."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, settings

# Bits of sums are those of one thread, in every process of a test; nothing has loaded torch yet.
os.environ["OMP_NUM_THREADS"] = "1"

# A busy machine is no fault of a test.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The same examples on every run; `--hypothesis-profile explore` draws others.
settings.register_profile("tests", settings.get_profile("explore"), derandomize=True, database=None)
settings.load_profile("tests")

SCHEMAS = Path(__file__).parent / "schemas"


@pytest.fixture(scope="session")
def keeps_to_schema() -> Callable[[dict[str, Any]], None]:
    """Return a function that holds a document against the JSON schema of its kind.

    The schemas say what scripts may count on: each field that is promised, its type and its words.
    A field may be added; a promised one may not go, nor change its meaning.
    """

    def check(document: dict[str, Any]) -> None:
        _, kind, version = document["schema"].split("/")
        assert version == "1"
        schema = json.loads((SCHEMAS / f"{kind}.json").read_text(encoding="utf-8"))
        errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
        assert [f"{error.json_path}: {error.message[:200]}" for error in errors] == []

    return check
