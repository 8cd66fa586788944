"""Hooks that write a run: on a module made for it, and each way in which a hook can lie."""

from pathlib import Path

import pytest
import torch
from torch import nn

from nvfp4check.activations import Run
from nvfp4check.capture import LOGITS, VLLM, VLLM_GATE, Tap, capture, first_output, sum_of_outputs
from nvfp4check.findings import CheckError
from nvfp4check.layer_inputs import LayerInputs


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


class TwoPartLayer(Layer):
    """A layer as vLLM's: the stream travels as (hidden_states, residual)."""

    def forward(  # type: ignore[override]
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = hidden_states if residual is None else hidden_states + residual
        return self.self_attn(self.input_layernorm(total)), total


class OnePartLayer(Layer):
    """A layer as transformers': the stream travels as hidden_states."""

    def forward(self, hidden_states: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:  # type: ignore[override]
        return scale * super().forward(hidden_states)


class Given(Model):
    """A model of three such layers, the second of which may be wrong."""

    def __init__(self, kind: type[Layer], *, wrong: bool = False) -> None:
        super().__init__()
        self.model.layers = nn.ModuleList([kind(8) for _ in range(3)])
        self.kind = kind
        if wrong:
            with torch.no_grad():
                self.model.layers[1].self_attn.bias += 1

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, residual = self.model.embed_tokens(tokens), None
        for layer in self.model.layers:
            if self.kind is TwoPartLayer:
                x, residual = layer(torch.arange(tokens.numel()), x, residual)
            else:
                x = layer(x, scale=1.0)
        logits: torch.Tensor = self.lm_head(x if residual is None else x + residual)
        return logits


@pytest.mark.parametrize("kind", [OnePartLayer, TwoPartLayer])
def test_a_layer_that_is_given_its_states_is_judged_on_its_own(
    kind: type[Layer], tmp_path: Path
) -> None:
    stream = first_output("hidden") if kind is OnePartLayer else sum_of_outputs("hidden")
    taps = (TAPS[0], TAPS[1], Tap("model.layers.{layer}", stream))
    prompts = {"p": [1, 2, 3, 4], "q": [5, 6]}

    def captured(name: str, *, wrong: bool, inputs: Run | None) -> Run:
        model = Given(kind, wrong=wrong).eval().requires_grad_(False)
        with capture(model, tmp_path / name, taps, inputs=inputs) as session:
            for prompt, tokens in prompts.items():
                with session.prompt(prompt, tokens):
                    model(torch.tensor([tokens]))
        return Run.open(tmp_path / name)

    golden = captured("golden", wrong=False, inputs=None)
    alone = captured("alone", wrong=True, inputs=golden)
    through = captured("through", wrong=True, inputs=None)

    def equal(run: Run, layer: int, prompt: str) -> bool:
        return torch.equal(*(side.point(layer, prompt, "hidden") for side in (run, golden)))

    for prompt in prompts:
        assert [equal(alone, layer, prompt) for layer in range(3)] == [True, False, True]
        assert [equal(through, layer, prompt) for layer in range(3)] == [True, False, False]
    assert alone.info.inputs == dict(LayerInputs(golden).digests)
    assert through.info.inputs is None


def test_a_prompt_in_pieces_is_given_its_states_piece_by_piece(tmp_path: Path) -> None:
    class PerToken(OnePartLayer):
        pass

    model = Given(PerToken).eval().requires_grad_(False)
    with capture(model, tmp_path / "golden", TAPS) as session, session.prompt("p", [1, 2, 3]):
        model(torch.tensor([[1, 2, 3]]))
    with (
        capture(model, tmp_path / "pieces", TAPS, inputs=tmp_path / "golden") as session,
        session.prompt("p", [1, 2, 3]),
    ):
        model(torch.tensor([[1, 2]]))
        model(torch.tensor([[3]]))

    golden, pieces = (Run.open(tmp_path / name) for name in ("golden", "pieces"))
    assert torch.allclose(golden.point(2, "p", "hidden"), pieces.point(2, "p", "hidden"))


def test_inputs_of_other_tokens_or_of_a_run_without_states_are_refused(tmp_path: Path) -> None:
    model = Given(OnePartLayer).eval().requires_grad_(False)
    with capture(model, tmp_path / "golden", TAPS) as session, session.prompt("p", [1, 2, 3]):
        model(torch.tensor([[1, 2, 3]]))
    with (
        pytest.raises(CheckError, match="has not the same tokens for prompt 'p'"),
        capture(model, tmp_path / "other", TAPS, inputs=tmp_path / "golden") as session,
        session.prompt("p", [1, 2, 4]),
    ):
        model(torch.tensor([[1, 2, 4]]))
    with (
        pytest.raises(CheckError, match="layer 1 is called with rows 0 to 5"),
        capture(model, tmp_path / "twice", TAPS, inputs=tmp_path / "golden") as session,
        session.prompt("p", [1, 2, 3]),
    ):
        model(torch.tensor([[1, 2, 3, 1, 2, 3]]))
    head = (Tap("lm_head", first_output(LOGITS)),)
    with capture(model, tmp_path / "bare", head) as session, session.prompt("p", [1]):
        model(torch.tensor([[1]]))
    with (
        pytest.raises(CheckError, match="recorded no hidden"),
        capture(model, tmp_path / "bare2", TAPS, inputs=tmp_path / "bare"),
    ):
        pass


def test_layers_that_cannot_be_given_states_are_refused(model: Model, tmp_path: Path) -> None:
    with capture(model, tmp_path / "golden", TAPS) as session, session.prompt("p", [1, 2]):
        model(torch.tensor([[1, 2]]))

    with (
        pytest.raises(CheckError, match=r"model\.layers\.1 takes x, expected hidden_states"),
        capture(model, tmp_path / "run", TAPS, inputs=tmp_path / "golden"),
    ):
        pass
    with (
        pytest.raises(CheckError, match="no tap names the decoder layers"),
        capture(model, tmp_path / "run", TAPS[:2], inputs=tmp_path / "golden"),
    ):
        pass


@pytest.mark.parametrize("form", ["alone", "with-a-bias"])
def test_a_gate_that_chooses_nothing_gives_the_scores(form: str) -> None:
    gate = nn.Linear(2, 3, bias=False)
    gate.e_score_correction_bias = nn.Parameter(torch.tensor([0.5, 0.0, -0.5]))
    logits = torch.tensor([[0.0, 100.0, -100.0]], dtype=torch.bfloat16)

    values = VLLM_GATE.extract(gate, (), logits if form == "alone" else (logits, None))

    assert values["router_scores"].tolist() == [[1.0, 1.0, pytest.approx(-0.5)]]
    assert values["router_scores"].dtype == torch.float32


@pytest.mark.parametrize(
    "output",
    [
        torch.ones(1, 2),
        (torch.ones(1, 2), None),
        # SGLang 0.5.23: the residual stream lies elsewhere, and the second is the experts chosen
        (torch.ones(1, 2), torch.ones(1, 8, dtype=torch.int32)),
    ],
    ids=["one", "none", "experts"],
)
def test_a_layer_that_returns_no_residual_is_refused(output: object) -> None:
    with pytest.raises(CheckError, match=r"Identity returns no \(hidden_states, residual\)"):
        VLLM[-1].extract(nn.Identity(), (), output)
