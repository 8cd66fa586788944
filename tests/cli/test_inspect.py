import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
TINY = Path(__file__).parents[2] / "goldens/tiny-deepseek-v3"
WEIGHT = "model.layers.1.mlp.experts.0.down_proj.weight"


def test_the_document_counts_every_code_and_scale(run: Run) -> None:
    document = json.loads(run("inspect", str(TINY / "nvfp4"), "--format", "json").out)
    assert document["schema"] == "nvfp4check/inspect/1"
    assert sum(document["code_histogram"]) == document["formats"]["nvfp4"]["elements"]
    assert 16 * sum(document["scale_histogram"]) == sum(document["code_histogram"])


@pytest.mark.parametrize("format", ["text", "markdown", "html"])
def test_formats_and_weights_are_shown(run: Run, format: str) -> None:
    ran = run("inspect", str(TINY / "nvfp4"), "--format", format)
    assert ran.code == 0
    for said in ("nvfp4", "3,801,088", "kv_a_proj", "80 x 256", "245.76 kB"):
        assert said in ran.out.replace("\\_", "_")


def test_level_headers_reads_no_byte(run: Run) -> None:
    ran = run("inspect", str(TINY / "nvfp4"), "--level", "headers", "--format", "json")
    document = json.loads(ran.out)
    assert document["code_histogram"] is None
    assert document["formats"]["nvfp4"]["weights"] == 212


@pytest.mark.parametrize("name", [WEIGHT, WEIGHT.removesuffix(".weight"), f"{WEIGHT}_scale_2"])
def test_a_weight_is_found_by_any_of_its_names(run: Run, name: str) -> None:
    ran = run("inspect", str(TINY / "nvfp4"), name)
    assert ran.code == 0
    assert f"weight               {WEIGHT}\n" in ran.out
    assert "first values, 4 rows of 16" in ran.out
    for stored in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        assert f"{WEIGHT.removesuffix('.weight')}.{stored} " in ran.out


@pytest.mark.parametrize("format", ["json", "markdown", "html"])
def test_a_weight_is_shown_in_every_format(run: Run, format: str) -> None:
    ran = run("inspect", str(TINY / "fp8"), WEIGHT, "--format", format)
    assert ran.code == 0
    assert WEIGHT in ran.out.replace("\\_", "_")


def test_an_unknown_weight_is_met_with_those_that_are_close(run: Run) -> None:
    ran = run("inspect", str(TINY / "nvfp4"), WEIGHT.replace("down", "dwon"))
    assert ran.code == 2
    assert WEIGHT in ran.err


@pytest.mark.parametrize("folder", ["bf16", "fp8"])
def test_a_checkpoint_without_codes_has_no_histogram(run: Run, folder: str) -> None:
    ran = run("inspect", str(TINY / folder))
    assert ran.code == 0
    assert "codes" not in ran.out
