"""Every tensor lies where its neighbours do: shown on a pretended device, without a GPU."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nvfp4check.faults.power import cases_of
from nvfp4check.forward.options import Activations, ForwardOptions, Logits
from nvfp4check.forward.streaming import run_forward
from nvfp4check.ops import OPERATIONS
from nvfp4check.properties import properties_of
from nvfp4check.properties.law import Runner, Setting, Verdict
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3.linear import LinearMode

TINY = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3"

Pretended = Callable[[], Any]


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    raw = (actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
    return actual.dtype == expected.dtype and torch.equal(*raw)


def test_the_pretended_device_computes_and_keeps_its_tensors(pretended: Pretended) -> None:
    with pretended() as device:
        x = torch.arange(6, device=device).view(2, 3)
        x[0] += 1
        total = x @ torch.tensor([1, 2, 3], device=device)

        assert {str(value.device) for value in (x, x.T, total, torch.zeros_like(x))} == {device}
        assert total.cpu().tolist() == [14, 26]
        assert int(x.sum()) == 18
        assert bool((x == x.clone()).all())


MIXES: dict[str, Callable[[torch.Tensor], object]] = {
    "add": lambda x: x + torch.ones(3),
    "add in place": lambda x: x.add_(torch.ones(3)),
    "cat": lambda x: torch.cat([x, torch.ones(3)]),
    "where": lambda x: torch.where(x > 1, x, torch.zeros(3)),
    "matrix product": lambda x: x @ torch.ones(3),
    "searchsorted": lambda x: torch.searchsorted(torch.tensor([1.0, 2.0]), x),
    "stack of numbers": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
}


@pytest.mark.parametrize("mix", MIXES)
def test_the_pretended_device_refuses_what_a_gpu_refuses(pretended: Pretended, mix: str) -> None:
    with pretended() as device, pytest.raises(RuntimeError, match="not all tensors lie on one"):
        MIXES[mix](torch.ones(3, device=device))


def test_the_pretended_device_takes_what_a_gpu_takes(pretended: Pretended) -> None:
    with pretended() as device:
        x = torch.ones(3, device=device)

        assert (x * torch.tensor(2.0)).cpu().tolist() == [2, 2, 2]
        assert x[torch.tensor([0, 2])].cpu().tolist() == [1, 1]
        assert x.copy_(torch.zeros(3)).cpu().tolist() == [0, 0, 0]
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()


def few_cases(operation: str, setting: Setting) -> Iterator[dict[str, Any]]:
    for case in itertools.islice(cases_of(operation, setting, of_each=2), 24):
        yield dict(case.inputs)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_reference_computes_where_its_inputs_lie(pretended: Pretended, operation: str) -> None:
    convention = "engine" if OPERATIONS[operation].has_convention else None
    kernel = OPERATIONS[operation].reference(convention)
    setting = Setting(convention=convention, max_examples=2)
    placed: list[str] = []

    def watched(*arguments: Any) -> Any:
        made = kernel(*arguments)
        placed.extend(str(one.device) for one in (made if isinstance(made, tuple) else (made,)))
        return made

    with pretended() as device:
        there = Runner(
            OPERATIONS[operation], watched, Setting(convention=convention, device=device)
        )
        for inputs in few_cases(operation, setting):
            for found, wanted in zip(there(inputs), there.reference(inputs), strict=True):
                assert same(found, wanted)

    assert set(placed) == {device}


def test_a_kernel_that_makes_a_tensor_on_the_cpu_is_seen(pretended: Pretended) -> None:
    right = OPERATIONS["dequantize"].reference()

    def wrong(*arguments: Any) -> torch.Tensor:
        values = right(*arguments)
        return values * torch.ones(values.shape[-1], dtype=values.dtype)

    with pretended() as device:
        outcomes = [
            law.run(wrong, Setting(device=device, max_examples=2)).verdict
            for law in properties_of("dequantize")
        ]

    assert set(outcomes) == {Verdict.FAIL}


@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        ("bf16", {"logits": Logits.parse("topk:5"), "mtp": True}),
        ("fp8", {"mode": LinearMode.STORED, "mtp": True, "bounds": ("bfloat16",)}),
        ("fp8", {"mode": LinearMode.WEIGHT_ONLY}),
        ("nvfp4", {"mode": LinearMode.STORED, "mtp": True}),
        ("nvfp4", {"mode": LinearMode.WEIGHT_ONLY}),
    ],
)
def test_a_forward_run_on_another_device_has_the_bits_of_one_on_the_cpu(
    pretended: Pretended, tmp_path: Path, checkpoint: str, options: dict[str, Any]
) -> None:
    prompts = [Prompt(id="a", tokens=tuple(range(3, 30))), Prompt(id="b", tokens=(5,))]
    keep = {"activations": Activations.ALL, **options}
    run_forward(TINY / checkpoint, prompts, tmp_path / "here", ForwardOptions(**keep))

    with pretended() as device:
        run_forward(
            TINY / checkpoint, prompts, tmp_path / "there", ForwardOptions(device=device, **keep)
        )

    files = sorted((tmp_path / "here").rglob("*.safetensors"))
    assert len(files) > 5
    for file in files:
        here, there = (
            load_file(file),
            load_file(tmp_path / "there" / file.relative_to(tmp_path / "here")),
        )
        assert here.keys() == there.keys()
        assert all(same(there[name], values) for name, values in here.items()), file.name
