"""A validation spread over a real Ray cluster of two workers on this machine."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.validation import ValidationOptions, ValidationResult, validate
from nvfp4check.engine import Engine
from nvfp4check.engine.ray import RayEngine

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, in this process


def _killed_once(function: Callable[[Any], Any], marker: str, item: Any) -> Any:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return function(item)
    os.kill(os.getpid(), signal.SIGKILL)
    return None


class LosesAWorker:
    """A Ray engine whose first item kills the worker that takes it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], **more: Any
    ) -> Iterator[Any]:
        killing = partial(_killed_once, function, str(self.marker))
        return RayEngine().map(killing, items, **more)


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    root = str(Path(__file__).parents[2])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([*sys.path, root])}},
    )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _an_item_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvfp4check.checkpoint.byte_pass._ITEM_BYTES", 1)


def _document(path: Path, engine: Engine | None) -> dict[str, Any]:
    result: ValidationResult = validate(open_checkpoint(path), ValidationOptions(engine=engine))
    document = result.to_json()
    del document["seconds"]
    return document


def test_findings_are_those_of_the_local_engine_though_a_worker_is_killed(
    clone: CheckpointEditor, tmp_path: Path
) -> None:
    for expert in (3, 7):
        clone.raw(f"model.layers.2.mlp.experts.{expert}.up_proj.weight_scale")[0, 0] = 0x7F
    local = _document(clone.path, None)
    marker = tmp_path / "killed"

    spread = _document(clone.path, LosesAWorker(marker))

    assert marker.exists()
    assert [finding["rule"] for finding in local["findings"]] == ["NV201", "NV201"]
    assert spread == local


def test_a_sound_checkpoint_passes_on_ray(golden: SimpleNamespace) -> None:
    assert _document(golden.nvfp4, RayEngine())["verdict"] == "pass"
