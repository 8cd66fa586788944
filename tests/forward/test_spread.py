"""Experts computed by an engine's workers: the bits of a run without one, workers lost or not."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4check.engine.local import LocalEngine
from nvfp4check.engine.ray import RayEngine
from nvfp4check.findings import CheckError
from nvfp4check.forward import spread
from nvfp4check.forward.options import Arithmetic, ForwardOptions
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt

Bytes = Callable[[Path], dict[str, str]]


@pytest.fixture(autouse=True)
def _few_experts_an_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "_ITEM_BYTES", 100_000)


@pytest.mark.parametrize("dtype", Arithmetic)
@pytest.mark.parametrize("checkpoint", ["bf16", "fp8", "nvfp4"])
def test_a_run_of_work_items_has_the_bytes_of_a_plain_one(
    checkpoint: str,
    dtype: Arithmetic,
    tiny: Path,
    prompts: list[Prompt],
    keep_all: ForwardOptions,
    bytes_of: Bytes,
    tmp_path: Path,
) -> None:
    options = replace(keep_all, arithmetic=dtype)
    plain = run_forward(tiny / checkpoint, prompts, tmp_path / "plain", options)

    options = replace(options, engine=LocalEngine())
    items = run_forward(tiny / checkpoint, prompts, tmp_path / "items", options)

    assert bytes_of(items.run.path) == bytes_of(plain.run.path)
    assert items.meter.bytes_read == plain.meter.bytes_read


def test_experts_are_grouped_by_their_bytes_in_their_order() -> None:
    sizes = {1: 60_000, 4: 60_000, 5: 10, 9: 300_000, 11: 5}

    assert spread._grouped(sizes) == [(1, 4), (5, 9), (11,)]


def test_workers_and_another_device_do_not_go_together(
    tiny: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    options = ForwardOptions(device="meta", engine=LocalEngine())

    with pytest.raises(CheckError, match="give --device cpu, or --engine local"):
        run_forward(tiny / "nvfp4", prompts, tmp_path / "run", options)


class Failing(LocalEngine):
    """Gives up at the experts of the third layer that has any."""

    maps = 0

    def map(self, *arguments: Any, **more: Any) -> Iterator[Any]:
        Failing.maps += 1
        if Failing.maps == 3:
            raise CheckError("a worker is gone")
        return super().map(*arguments, **more)


def test_a_run_whose_workers_are_gone_goes_on_without_them_to_the_same_bytes(
    tiny: Path, prompts: list[Prompt], keep_all: ForwardOptions, bytes_of: Bytes, tmp_path: Path
) -> None:
    whole = run_forward(tiny / "bf16", prompts, tmp_path / "whole", keep_all).run
    out = tmp_path / "run"

    with pytest.raises(CheckError, match="a worker is gone"):
        run_forward(tiny / "bf16", prompts, out, replace(keep_all, engine=Failing()))
    rest = run_forward(tiny / "bf16", prompts, out, replace(keep_all, resume=True))

    assert rest.layers == 2
    assert bytes_of(out) == bytes_of(whole.path)


class Killing:
    """An engine whose items kill the worker that takes them first, while told to."""

    def __init__(self, folder: Path, deaths: int) -> None:
        self._markers = [folder / f"death{n}" for n in range(deaths)]
        self._engine = RayEngine(threads=torch.get_num_threads())

    def kept(self) -> AbstractContextManager[None]:
        return self._engine.kept()

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], **more: Any
    ) -> Iterator[Any]:
        return self._engine.map(partial(_killed, function, self._markers), items, **more)

    @property
    def deaths(self) -> int:
        return sum(marker.exists() for marker in self._markers)


def _killed(function: Callable[[Any], Any], markers: list[Path], item: Any) -> Any:
    for marker in markers:
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)
    return function(item)


@pytest.mark.filterwarnings("ignore")  # Ray's own, in this process
class TestRay:
    """A real cluster of two workers on this machine."""

    @pytest.fixture(scope="class", autouse=True)
    def cluster(self) -> Iterator[None]:
        ray = pytest.importorskip("ray")
        root = str(Path(__file__).parents[2])
        ray.init(
            address="local",
            num_cpus=2 * torch.get_num_threads(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([*sys.path, root])}},
        )
        yield
        ray.shutdown()

    def test_a_run_has_the_bytes_of_a_local_one_though_workers_are_killed(
        self,
        tiny: Path,
        prompts: list[Prompt],
        keep_all: ForwardOptions,
        bytes_of: Bytes,
        tmp_path: Path,
    ) -> None:
        local = run_forward(tiny / "nvfp4", prompts, tmp_path / "local", keep_all)
        engine = Killing(tmp_path, deaths=2)

        options = replace(keep_all, engine=engine)
        lost = run_forward(tiny / "nvfp4", prompts, tmp_path / "lost", options)

        assert engine.deaths == 2
        assert bytes_of(lost.run.path) == bytes_of(local.run.path)
        assert lost.meter.bytes_read == local.meter.bytes_read

    def test_what_a_worker_cannot_read_is_reported_with_the_tensor(
        self,
        edited: Callable[..., Path],
        prompts: list[Prompt],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        checkpoint = edited(lambda tensors, config: None)
        opened = spread.SpreadExperts._outputs

        def vanishing(*arguments: Any) -> Any:
            (checkpoint / "model.safetensors").unlink(missing_ok=True)
            return opened(*arguments)

        monkeypatch.setattr(spread.SpreadExperts, "_outputs", vanishing)

        options = ForwardOptions(engine=RayEngine(threads=torch.get_num_threads()))
        with pytest.raises(CheckError, match=r"model\.layers\.1\.mlp\.experts\..*safetensors"):
            run_forward(checkpoint, prompts, tmp_path / "run", options)
