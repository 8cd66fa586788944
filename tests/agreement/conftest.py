"""Small runs written by hand, and runs of the tiny trained model."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from nvfp4check.activations import (
    LOGITS_FILE,
    TOKENS_FILE,
    PromptInfo,
    Run,
    RunInfo,
    layer_file,
    write_info,
    write_tensors,
)
from nvfp4check.forward.options import (
    Activations,
    Arithmetic,
    ForwardOptions,
    KvCache,
    Perturbation,
)
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt

GOLDENS = Path(__file__).parents[2] / "goldens"
TINY = GOLDENS / "tiny-deepseek-v3"

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


@pytest.fixture
def write_logits(tmp_path: Path) -> Callable[..., Run]:
    """Write a run that holds the given logits by prompt, over any tokens."""

    def write(name: str, logits: Mapping[str, torch.Tensor], **info: object) -> Run:
        folder = tmp_path / name
        lengths = {prompt: info_tokens(rows) for prompt, rows in logits.items()}
        write_tensors(folder / LOGITS_FILE, dict(logits))
        write_tensors(
            folder / TOKENS_FILE,
            {prompt: torch.arange(length) % 7 for prompt, length in lengths.items()},
        )
        infos = tuple(PromptInfo(id=prompt, tokens=n) for prompt, n in lengths.items())
        write_info(folder, RunInfo(prompts=infos, complete=True, **info))  # type: ignore[arg-type]
        return Run.open(folder)

    def info_tokens(rows: torch.Tensor) -> int:
        return rows.shape[0]

    return write


@pytest.fixture(scope="session")
def tiny_prompts() -> list[Prompt]:
    """The model card's prompts and the first part of a passage, as tokens."""
    golden = Run.open(TINY / "activations" / "transformers-float32")
    ids = ("prompt0", "prompt1", "prompt2", "prompt3")
    tokens = {prompt: golden.tokens(prompt) for prompt in ids}
    tokens["passage0"] = golden.tokens("passage0")[:100]
    return [Prompt(id=name, tokens=tuple(row.tolist())) for name, row in tokens.items()]


@pytest.fixture(scope="session")
def tiny_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_prompts: list[Prompt]
) -> Callable[..., Run]:
    """Compute the tiny model in one of its formats, once a session for each set of options."""
    done: dict[str, Run] = {}

    def run(checkpoint: str, seed: int | None = None) -> Run:
        key = f"{checkpoint}-{seed}"
        if key not in done:
            options = ForwardOptions(
                activations=Activations.ALL,
                kv_cache=KvCache.NONE,
                perturbation=None if seed is None else Perturbation("bfloat16"),
                seed=seed or 0,
            )
            out = tmp_path_factory.mktemp("runs") / key
            done[key] = run_forward(TINY / checkpoint, tiny_prompts, out, options).run
        return done[key]

    return run


@pytest.fixture(scope="session")
def bounded_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_prompts: list[Prompt]
) -> Callable[[str], Run]:
    """Compute the tiny model in one of its formats with bounds, once a session."""
    done: dict[str, Run] = {}

    def run(checkpoint: str) -> Run:
        if checkpoint not in done:
            names = ("float32", "bfloat16", "bfloat16/tp4")
            options = ForwardOptions(activations=Activations.ALL, bounds=names)
            out = tmp_path_factory.mktemp("bounded") / checkpoint
            done[checkpoint] = run_forward(TINY / checkpoint, tiny_prompts, out, options).run
        return done[checkpoint]

    return run


@pytest.fixture(scope="session")
def candidate_run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_prompts: list[Prompt],
    bounded_run: Callable[[str], Run],
) -> Callable[..., Run]:
    """Compute it in another arithmetic, given the states of the bounded run or not."""
    done: dict[str, Run] = {}

    def run(
        checkpoint: str, arithmetic: str, *, given: bool = True, bounds: tuple[str, ...] = ()
    ) -> Run:
        key = f"{checkpoint}-{arithmetic}-{given}-{','.join(bounds)}"
        if key not in done:
            options = ForwardOptions(
                activations=Activations.ALL,
                arithmetic=Arithmetic(arithmetic),
                inputs=bounded_run(checkpoint).path if given else None,
                bounds=bounds,
            )
            out = tmp_path_factory.mktemp("candidates") / key
            done[key] = run_forward(TINY / checkpoint, tiny_prompts, out, options).run
        return done[key]

    return run


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors: more threads only wait for one another."""
    torch.set_num_threads(1)
