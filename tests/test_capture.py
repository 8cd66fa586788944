"""Hooks that write a run: on a module made for it, and each way in which a hook can lie."""

from pathlib import Path

import pytest
import torch
from torch import nn

from nvfp4check.activations import Run
from nvfp4check.capture import LOGITS, VLLM, Tap, capture, first_output
from nvfp4check.findings import CheckError


class Layer(nn.Module):
    """One part that reads the stream and adds to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width)
        self.self_attn = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.self_attn(self.input_layernorm(x))
        return x + y


class Model(nn.Module):
    """Two layers and a head, with the names of a decoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(11, 8)
        self.model.layers = nn.ModuleList([Layer(8), Layer(8)])
        self.lm_head = nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        logits: torch.Tensor = self.lm_head(x)
        return logits


TAPS = (
    Tap("model.layers.{layer}.input_layernorm", first_output("attn_input")),
    Tap("model.layers.{layer}.self_attn", first_output("attn_output")),
    Tap("model.layers.{layer}", first_output("hidden")),
    Tap("lm_head", first_output(LOGITS)),
)


def run_prompts(model: Model, run: Path, calls: list[tuple[str, list[list[int]]]]) -> None:
    """Capture each prompt, running the model on each of its lists of tokens."""
    with capture(model, run, TAPS) as session:
        for name, parts in calls:
            with session.prompt(name, parts[0]):
                for tokens in parts:
                    model(torch.tensor([tokens]))


@pytest.fixture
def model() -> Model:
    return Model().eval().requires_grad_(False)


def test_a_capture_is_a_run_with_what_the_modules_gave(model: Model, tmp_path: Path) -> None:
    tokens = torch.tensor([1, 2, 3])

    with capture(model, tmp_path / "run", TAPS) as session, session.prompt("p", tokens):
        logits = model(tokens[None])

    run = Run.open(tmp_path / "run")
    x = model.model.embed_tokens(tokens)
    first = model.model.layers[0](x)
    assert run.prompts == ("p",)
    assert torch.equal(run.tokens("p"), tokens)
    assert torch.equal(run.logits("p"), logits[0])
    assert run.layers == (0, 1)
    assert torch.equal(run.point(0, "p", "hidden"), first)
    expected = model.model.layers[1].input_layernorm(first)
    assert torch.equal(run.point(1, "p", "attn_input"), expected)


def test_calls_token_by_token_are_joined(model: Model, tmp_path: Path) -> None:
    tokens = torch.tensor([4, 5, 6, 7])
    with capture(model, tmp_path / "run", TAPS) as session, session.prompt("p", tokens):
        for token in tokens:
            model(token[None, None])

    whole = model(tokens[None])[0]
    joined = Run.open(tmp_path / "run").logits("p")
    assert joined.shape == whole.shape
    # Every row is computed from its own token; only the sums of 8 products may be in another order.
    assert ((joined - whole).abs() <= 16 * 2**-24 * whole.abs().max()).all()


def test_hooks_are_gone_afterwards_and_calls_outside_a_prompt_are_left_aside(
    model: Model, tmp_path: Path
) -> None:
    with capture(model, tmp_path / "run", TAPS) as session:
        model(torch.tensor([[9, 9]]))  # a warm-up
        with session.prompt("p", [1, 2]):
            model(torch.tensor([[1, 2]]))

    assert Run.open(tmp_path / "run").logits("p").shape == (2, 11)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_module_that_never_ran_is_named(model: Model, tmp_path: Path) -> None:
    with (
        pytest.raises(CheckError, match=r"saw nothing, first model\.layers\.1\.input_layernorm"),
        capture(model, tmp_path / "run", TAPS) as session,
        session.prompt("p", [1]),
    ):
        model.lm_head(model.model.layers[0](model.model.embed_tokens(torch.tensor([1]))))
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_ran_twice_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="has 4 rows in 2 calls, expected one for each of 2"):
        run_prompts(model, tmp_path / "run", [("p", [[1, 2], [1, 2]])])


def test_a_buffer_that_was_read_again_under_another_prompt_is_named(
    model: Model, tmp_path: Path
) -> None:
    stale = model(torch.tensor([[1, 2]]))
    model.lm_head.forward = lambda x: stale  # type: ignore[method-assign]

    with pytest.raises(CheckError, match="is bit for bit the logits, prompt 'one'"):
        run_prompts(model, tmp_path / "run", [("one", [[1, 2]]), ("two", [[3, 4]])])


def test_a_layer_that_gives_the_values_of_the_one_before_is_named(
    model: Model, tmp_path: Path
) -> None:
    model.model.layers[1].forward = lambda x: (
        model.model.layers[1].self_attn(model.model.layers[1].input_layernorm(x)) * 0 + x
    )

    with (
        pytest.raises(CheckError, match="hidden of layer 1, prompt 'p', is bit for bit"),
        capture(model, tmp_path / "run", TAPS) as session,
        session.prompt("p", [1, 2]),
    ):
        model(torch.tensor([[1, 2]]))


def test_a_value_is_copied_before_the_engine_writes_into_its_buffer_again(
    model: Model, tmp_path: Path
) -> None:
    with capture(model, tmp_path / "run", TAPS) as session, session.prompt("p", [1, 2]):
        logits = model(torch.tensor([[1, 2]]))
        expected = logits.clone()
        logits.zero_()

    assert torch.equal(Run.open(tmp_path / "run").logits("p"), expected[0])


def test_taps_that_fit_no_module_are_refused(model: Model, tmp_path: Path) -> None:
    with (
        pytest.raises(CheckError, match=r"no module is called transformer\.h\."),
        capture(model, tmp_path / "run", [Tap("transformer.h.{layer}", first_output("hidden"))]),
    ):
        pass


def test_nothing_is_written_when_the_model_raises(model: Model, tmp_path: Path) -> None:
    with (
        pytest.raises(IndexError),
        capture(model, tmp_path / "run", TAPS) as session,
        session.prompt("p", [99]),
    ):
        model(torch.tensor([[99]]))
    assert not (tmp_path / "run").exists()


def test_the_residual_in_two_parts_is_summed() -> None:
    layer_tap = VLLM[-1]
    hidden, residual = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])

    values = layer_tap.extract(nn.Identity(), (), (hidden, residual))

    assert values["hidden"].tolist() == [[11.0, 22.0]]
