"""Small runs written by hand."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from nvfp4check.activations import (
    TOKENS_FILE,
    PromptInfo,
    Run,
    RunInfo,
    layer_file,
    write_info,
    write_tensors,
)

#: Layer -> point -> prompt -> tensor.
Points = Mapping[int, Mapping[str, Mapping[str, torch.Tensor]]]


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[[str, Points], Run]:
    """Write a run that holds the given points: `write_run("a", {0: {"hidden": {"p": x}}})`."""

    def write(name: str, points: Points) -> Run:
        folder = tmp_path / name
        prompts: dict[str, int] = {}
        for layer, by_point in points.items():
            tensors = {}
            for point, by_prompt in by_point.items():
                for prompt, tensor in by_prompt.items():
                    prompts[prompt] = tensor.shape[0]
                    tensors[f"{prompt}/{point}"] = tensor
            write_tensors(layer_file(folder, layer), tensors)
        write_tensors(
            folder / TOKENS_FILE,
            {prompt: torch.arange(tokens) for prompt, tokens in prompts.items()},
        )
        infos = tuple(PromptInfo(id=prompt, tokens=tokens) for prompt, tokens in prompts.items())
        write_info(folder, RunInfo(prompts=infos, complete=True))
        return Run.open(folder)

    return write
