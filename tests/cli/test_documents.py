"""What each command prints with --format json, held against the schema of its kind."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = ROOT / "goldens/tiny-deepseek-v3"
NVFP4, FP8 = str(TINY / "nvfp4"), str(TINY / "fp8")
RUN = str(TINY / "activations/reference-nvfp4-stored")
SCHEMAS = ROOT / "tests/schemas"

Run = Callable[..., Any]
Document = dict[str, Any]

#: Name to command line; `{tmp}` is an empty directory.
COMMANDS = {
    "validate": f"validate {NVFP4} --base {FP8}",
    "validate-findings": f"validate {TINY}/nvfp4-raw",
    "validate-headers": f"validate {NVFP4} --level headers",
    "validate-sample": f"validate {NVFP4} --sample 0.1",
    "validate-card": f"validate {NVFP4} --card {ROOT}/goldens/model_card.md",
    "diff": f"diff {NVFP4} {FP8} --only *.layers.1.*",
    "diff-headers": f"diff {NVFP4} {FP8} --level headers",
    "inspect": f"inspect {NVFP4}",
    "inspect-headers": f"inspect {NVFP4} --level headers",
    "inspect-weight": f"inspect {NVFP4} model.layers.3.mlp.experts.0.down_proj",
    "rules": "rules",
    "faults": "faults list --kind all",
    "faults-inject": f"faults inject {NVFP4} {{tmp}}/broken --fault F1a",
    "kernels-list": "kernels list",
    "kernels": "kernels test --op swizzle --impl reference",
    "power": "kernels power --op swizzle",
    "bench": "kernels bench --predict",
    "forward": f"forward {NVFP4} --text Hello --layers 0:1 --out {{tmp}}/run",
    "agree": f"agree {RUN} {RUN}",
    "agree-limits": f"agree {RUN} {RUN} --max-kl 0.01 --min-top1 0.9",
    "golden": f"golden verify {RUN}",
    "golden-record": "golden record {tmp}/run {tmp}/golden --origin me",
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_document_keeps_to_the_schema_of_its_kind(
    run: Run, keeps_to_schema: Callable[[Document], None], tmp_path: Path, name: str
) -> None:
    shutil.copytree(RUN, tmp_path / "run") if name == "golden-record" else None
    ran = run(*COMMANDS[name].format(tmp=tmp_path).split(), "--format", "json")
    document = json.loads(ran.out)
    assert re.fullmatch(rf"nvfp4check/{name.partition('-')[0]}(-list)?/1", document["schema"])
    keeps_to_schema(document)


def test_a_joined_report_and_what_it_joins_keep_to_theirs(
    run: Run, keeps_to_schema: Callable[[Document], None], tmp_path: Path
) -> None:
    run("rules", "NV6", "--output", str(tmp_path / "rules.json"))
    document = json.loads(run("report", str(tmp_path / "rules.json"), "--format", "json").out)
    keeps_to_schema(document)
    keeps_to_schema(document["inputs"][0]["document"])


@pytest.mark.parametrize(
    "path", sorted(TINY.glob("activations/*/run.json")), ids=lambda p: p.parent.name
)
def test_a_run_keeps_to_its_schema(keeps_to_schema: Callable[[Document], None], path: Path) -> None:
    keeps_to_schema(json.loads(path.read_text(encoding="utf-8")))


def _required(schema: Document, value: Any) -> Iterator[list[str | int]]:
    """List the paths to all the fields that a schema requires of a document."""
    for name in schema.get("required", ()) if isinstance(value, dict) else ():
        yield [name]
        yield from ([name, *rest] for rest in _required(schema["properties"][name], value[name]))
    if isinstance(value, list) and value:
        yield from ([0, *rest] for rest in _required(schema["items"], value[0]))


@pytest.mark.parametrize(
    "name", ["validate-findings", "diff", "agree-limits", "kernels", "inspect"]
)
def test_a_schema_misses_each_promised_field_and_sees_a_wrong_type(run: Run, name: str) -> None:
    kind = name.partition("-")[0]
    schema = json.loads((SCHEMAS / f"{kind}.json").read_text(encoding="utf-8"))
    text = run(*COMMANDS[name].split(), "--format", "json").out
    validator = jsonschema.Draft202012Validator(schema)
    paths = list(_required(schema, json.loads(text)))
    assert len(paths) > 12
    for *where, field in paths:
        document = json.loads(text)
        holder = reduce(getitem, where, document)
        del holder[field]
        assert not validator.is_valid(document), (where, field)
        holder[field] = [["of another kind"]]
        of_any_type = field in ("observed", "expected", "found", "a", "b") and where
        assert of_any_type or not validator.is_valid(document), (where, field)


@pytest.mark.parametrize("path", sorted(SCHEMAS.iterdir()), ids=lambda path: path.stem)
def test_a_schema_is_one_and_names_its_kind(path: Path) -> None:
    schema = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema"] == {"const": f"nvfp4check/{path.stem}/1"}


def test_every_kind_that_the_program_writes_has_a_schema() -> None:
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "nvfp4check").rglob("*.py"))
    named = {kind for text in sources for kind in re.findall(r"nvfp4check/([a-z-]+)/1\b", text)}
    inner = {"bench-agree", "goldens", "journal"}  # its own files and measurements: no one's input
    kinds = {kind for kind in named - inner if not kind.startswith("bench-")}
    assert kinds == {path.stem for path in SCHEMAS.iterdir()}
