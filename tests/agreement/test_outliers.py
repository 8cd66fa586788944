"""Single tokens, and logits, that no noise explains; tokens at other experts explain themselves."""

from collections.abc import Callable, Mapping

import pytest
import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import AgreeOptions, agree
from nvfp4check.agreement.divergence import HeldPoint, hold
from nvfp4check.agreement.layers import Place, compare_layers
from nvfp4check.agreement.outliers import Kept
from nvfp4check.agreement.routing import compare_routing
from nvfp4check.agreement.statistics import Decision

WriteRun = Callable[..., Run]
TOKENS, WIDTH, LAYER = 60, 16, 1
PROMPTS = ("p", "q", "r")
UNIT = 2**-24


def normal(seed: int) -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def noisy(size: float, seed: int, prompt: str) -> torch.Tensor:
    base = normal(ord(prompt))
    return base + size * base.norm(dim=-1, keepdim=True) * normal(1000 * seed + ord(prompt)) / 4


@pytest.fixture
def held(write_run: WriteRun) -> Callable[..., HeldPoint]:
    """Hold hidden of layer 1 against one noise run, each run with the experts it is given."""

    def hold_it(
        change: Callable[[dict[str, torch.Tensor]], None] = lambda rows: None,
        experts: Mapping[str, torch.Tensor] | None = None,
        config: Mapping[str, object] | None = None,
        seed: int = 2,
    ) -> HeldPoint:
        def run(name: str, size: float, seed: int, chosen: Mapping[str, torch.Tensor]) -> Run:
            rows = {prompt: noisy(size, seed, prompt) for prompt in PROMPTS}
            if name == "c":
                change(rows)
            points: dict[int, dict[str, Mapping[str, torch.Tensor]]] = {
                layer: {"hidden": rows} for layer in range(2)
            }
            if chosen:
                points[0]["router_experts"] = points[1]["router_experts"] = chosen
            written = write_run(name, points)
            written.info.config.update(config if config is not None else {"hidden_size": WIDTH})
            return written

        own = {p: torch.zeros(TOKENS, 1, dtype=torch.int32) for p in PROMPTS}
        reference = run("a", 0.0, 1, own if experts else {})
        noise = run("n", 0.01, 1, own if experts else {})
        candidate = run("c", 0.01, seed, experts or {})
        runs = (candidate, noise)
        compared = [list(compare_layers(reference, each)) for each in runs]
        points = compared[0]
        kept = [Kept.of(reference, list(compare_routing(reference, each))) for each in runs]
        floor = {point.key: point for point in compared[1]}
        units = {point.key: UNIT for point in points}
        (found,) = [
            each
            for each in hold(points, [floor], units, 0.05, kept=kept)
            if each.agreement.layer == LAYER
        ]
        return found

    return hold_it


def wrong_token(rows: dict[str, torch.Tensor]) -> None:
    rows["q"][40] = noisy(0.5, 7, "q")[40]


def other_experts(prompt: str, token: int) -> dict[str, torch.Tensor]:
    chosen = {p: torch.zeros(TOKENS, 1, dtype=torch.int32) for p in PROMPTS}
    chosen[prompt][token] = 1
    return chosen


def test_one_token_that_no_noise_explains_is_named(held: Callable[..., HeldPoint]) -> None:
    found = held(wrong_token)

    assert found.diverges is True
    assert found.place == Place(prompt="q", token=40)
    assert found.outlier is not None
    assert found.outlier.tokens == 1
    assert found.outlier.error > 10 * found.outlier.noise
    # The means of all tokens do not see it.
    assert found.log_ratio_low is not None
    assert found.log_ratio_low < 0
    assert found.excess_low is not None
    assert found.excess_low < 0


@pytest.mark.parametrize("seed", range(2, 12))
def test_noise_of_the_same_size_makes_no_outlier(held: Callable[..., HeldPoint], seed: int) -> None:
    assert held(seed=seed).outlier is None


@pytest.mark.parametrize(("prompt", "token"), [("q", 40), ("q", 3)])
def test_a_token_at_other_experts_and_those_after_it_explain_themselves(
    held: Callable[..., HeldPoint], prompt: str, token: int
) -> None:
    assert held(wrong_token, other_experts(prompt, token)).diverges is False


@pytest.mark.parametrize(("prompt", "token"), [("q", 41), ("p", 0)])
def test_other_experts_later_or_in_another_prompt_explain_nothing(
    held: Callable[..., HeldPoint], prompt: str, token: int
) -> None:
    found = held(wrong_token, other_experts(prompt, token))

    assert found.place == Place(prompt="q", token=40)


@pytest.mark.parametrize("config", [{}, {"n_routed_experts": 16}])
def test_where_experts_may_be_and_were_not_recorded_no_token_is_judged_alone(
    held: Callable[..., HeldPoint], config: Mapping[str, object]
) -> None:
    assert held(wrong_token, config=config).diverges is False


def test_before_the_router_only_the_layers_before_count() -> None:
    kept = Kept({(1, "p"): frozenset({2})})

    assert kept.tokens(1, "attn_output", "p", 4).tolist() == [True] * 4
    assert kept.tokens(1, "mlp_output", "p", 4).tolist() == [True, True, False, True]
    assert kept.tokens(2, "attn_output", "p", 4).tolist() == [True, True, False, False]
    assert kept.tokens(2, "attn_output", "q", 4).tolist() == [True] * 4


def logits(seed: int, size: float, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(ord(prompt))
    base = 4 * torch.randn(TOKENS, 50, generator=generator)
    generator.manual_seed(1000 * seed + ord(prompt))
    return base + size * torch.randn(TOKENS, 50, generator=generator)


def heated(rows: torch.Tensor) -> torch.Tensor:
    return rows * 1.05


def one_flat(rows: torch.Tensor) -> torch.Tensor:
    return rows.index_fill(0, torch.tensor([30]), 0.0)


def unchanged(rows: torch.Tensor) -> torch.Tensor:
    return rows


@pytest.mark.parametrize(
    ("change", "decision"),
    [(unchanged, Decision.PASS), (heated, Decision.FAIL), (one_flat, Decision.FAIL)],
)
def test_logits_are_held_against_those_of_the_noise(
    write_logits: WriteRun, change: Callable[[torch.Tensor], torch.Tensor], decision: Decision
) -> None:
    def run(name: str, seed: int, size: float) -> Run:
        rows = {prompt: logits(seed, size, prompt) for prompt in PROMPTS}
        if name == "c":
            rows = {prompt: change(each) for prompt, each in rows.items()}
        return write_logits(name, rows, config={"hidden_size": WIDTH})

    noise = (run("n1", 1, 0.01), run("n2", 2, 0.01))
    result = agree(run("a", 0, 0.0), run("c", 3, 0.01), AgreeOptions(noise=noise))

    assert [criterion.what for criterion in result.criteria] == ["logits within the noise floor"]
    assert result.verdict is decision


def test_logits_of_another_dtype_than_the_noise_are_not_held_against_it(
    write_logits: WriteRun,
) -> None:
    def run(name: str, seed: int, size: float, dtype: torch.dtype = torch.float32) -> Run:
        return write_logits(name, {p: logits(seed, size, p).to(dtype) for p in PROMPTS})

    noise = (run("n", 1, 0.01),)
    candidate = run("c", 2, 0.01, torch.bfloat16)

    result = agree(run("a", 0, 0.0), candidate, AgreeOptions(noise=noise))

    assert result.logits_held is None
    assert result.criteria == ()


@pytest.mark.parametrize("shift", [1, -1])
def test_logits_of_the_neighbouring_token_are_a_broken_dump(
    write_logits: WriteRun, shift: int
) -> None:
    rows = {prompt: logits(0, 0.0, prompt) for prompt in PROMPTS}
    moved = {prompt: each.roll(shift, 0) for prompt, each in rows.items()}

    result = agree(write_logits("a", rows), write_logits("c", moved))

    (problem,) = [problem for problem in result.problems if problem.kind == "shifted"]
    assert problem.fatal
    assert f"that of t {'-' if shift > 0 else '+'} 1 of the reference" in problem.message
    assert result.verdict is Decision.FAIL


def test_logits_of_another_model_or_of_one_text_token_are_not_called_shifted(
    write_logits: WriteRun,
) -> None:
    rows = {prompt: logits(0, 0.0, prompt) for prompt in PROMPTS}
    other = {prompt: logits(5, 9.0, prompt) for prompt in PROMPTS}
    same = {prompt: each[:1].repeat(TOKENS, 1) for prompt, each in rows.items()}

    for candidate in (other, same):
        result = agree(write_logits("a", rows), write_logits("c", candidate))
        assert not [problem for problem in result.problems if problem.kind == "shifted"]


def test_positions_that_are_equal_are_none_of_the_worst(write_logits: WriteRun) -> None:
    rows = {prompt: logits(0, 0.0, prompt) for prompt in PROMPTS}
    changed = {**rows, "q": rows["q"].index_fill(0, torch.tensor([30]), 0.0)}

    result = agree(write_logits("a", rows), write_logits("c", changed))

    assert result.logits is not None
    assert [(worst.prompt, worst.position) for worst in result.logits.worst()] == [("q", 30)]
