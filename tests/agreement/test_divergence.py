"""Points held against a floor: noise stays inside, a larger error leaves it, order decides."""

from collections.abc import Callable

import pytest
import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.divergence import HeldPoint, first_divergence, hold
from nvfp4check.agreement.layers import Place, PointAgreement, compare_layers
from nvfp4check.agreement.routing import Groups, compare_routing, required_movement

WriteRun = Callable[..., Run]
TOKENS, WIDTH = 200, 16


def values(seed: int) -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def noisy(size: float, seed: int) -> torch.Tensor:
    base = values(0)
    return base + size * base.norm(dim=-1, keepdim=True) * values(seed) / WIDTH**0.5


def held(
    write_run: WriteRun,
    candidate: torch.Tensor,
    floors: list[torch.Tensor],
    unit: float = 2**-24,
) -> list[HeldPoint]:
    def run(name: str, rows: torch.Tensor) -> Run:
        return write_run(name, {0: {"hidden": {"p": rows}}})

    reference = run("r", values(0))
    points = list(compare_layers(reference, run("c", candidate)))
    noise: list[dict[tuple[int, str], PointAgreement]] = [
        {p.key: p for p in compare_layers(reference, run(f"n{i}", rows))}
        for i, rows in enumerate(floors)
    ]
    return hold(points, noise, {(0, "hidden"): unit}, alpha=0.05)


@pytest.mark.parametrize("floors", [1, 3])
def test_noise_of_the_same_size_stays_within_the_floor(write_run: WriteRun, floors: int) -> None:
    rows = [noisy(0.01, seed) for seed in range(1, floors + 1)]

    diverging = [held(write_run, noisy(0.01, seed), rows)[0].diverges for seed in range(10, 30)]

    # Each is called divergent with probability 0.05 at most; four of twenty would be beyond that.
    assert sum(map(bool, diverging)) <= 3


def test_an_error_half_as_large_again_leaves_the_floor(write_run: WriteRun) -> None:
    (point,) = held(write_run, noisy(0.015, 10), [noisy(0.01, 1), noisy(0.01, 2)])

    assert point.diverges is True
    assert point.log_ratio_low is not None
    assert 0 < point.log_ratio_low < 0.405  # log 1.5


def test_a_smaller_error_never_diverges(write_run: WriteRun) -> None:
    (point,) = held(write_run, noisy(0.001, 10), [noisy(0.01, 1)])

    assert point.diverges is False


def test_a_fault_of_a_tenth_of_the_tokens_is_seen_among_equal_ones(write_run: WriteRun) -> None:
    rows = values(0)
    rows[5::10] = noisy(0.2, 10)[5::10]

    (point,) = held(write_run, rows, [noisy(0.01, 1)])

    assert point.diverges is True
    assert point.log_ratio is not None
    assert point.log_ratio < 0
    assert point.place == Place(prompt="p", token=5)


def test_one_token_alone_is_no_proof(write_run: WriteRun) -> None:
    rows = noisy(0.01, 10)
    rows[50] = noisy(0.5, 11)[50]

    (point,) = held(write_run, rows, [noisy(0.01, 1), noisy(0.01, 2)])

    assert point.diverges is False


def test_a_value_that_is_not_finite_diverges_at_its_token(write_run: WriteRun) -> None:
    rows = noisy(0.001, 10)
    rows[77, 3] = torch.nan

    (point,) = held(write_run, rows, [noisy(0.01, 1)])

    assert point.diverges is True
    assert point.place == Place(prompt="p", token=77)


@pytest.mark.parametrize("unit", [2**-8, 2**-11, 2**-24, 2**-53])
@pytest.mark.parametrize("floors", [1, 3, 7])
def test_equal_rows_are_within_a_floor_of_zero(
    write_run: WriteRun, unit: float, floors: int
) -> None:
    (point,) = held(write_run, values(0), [values(0)] * floors, unit)

    assert point.diverges is False
    assert point.log_ratio == 0


def test_without_a_floor_the_first_difference_in_bits_is_named(write_run: WriteRun) -> None:
    rows = values(0)
    rows[9, 0] = torch.nextafter(rows[9, 0], torch.tensor(9.0))

    points = held(write_run, rows, [])
    found = first_divergence(points, [], [])

    assert points[0].diverges is None
    assert found is not None
    assert (found.place, found.held_against) == (Place(prompt="p", token=9), "nothing")


def test_the_first_in_the_order_of_the_computation_is_named(write_run: WriteRun) -> None:
    wrong = noisy(0.5, 1)
    everything = {
        layer: {point: {"p": values(0)} for point in ("attn_input", "mlp_output", "hidden")}
        for layer in range(3)
    }
    reference = write_run("r", everything)
    everything[2]["attn_input"] = everything[1]["hidden"] = {"p": wrong}
    everything[1]["mlp_output"] = {"p": wrong.clone()}
    candidate = write_run("c", everything)
    points = list(compare_layers(reference, candidate))

    found = first_divergence(hold(points, [], {}, 0.05), [], [])

    assert found is not None
    assert (found.layer, found.point) == (1, "mlp_output")


def test_the_choice_that_scores_make_needs_no_movement() -> None:
    scores = torch.tensor([0.9, 0.1, 0.5, 0.4, 0.8, 0.7, 0.2, 0.3])

    assert required_movement(scores, {0, 4}, Groups()) == 0
    # Groups of two: 1.0, 0.9, 1.5, 0.5; the best two are 2 and 0.
    assert required_movement(scores, {0, 4, 5}, Groups(4, 2)) == 0


def test_the_movement_is_half_the_gap_of_two_experts() -> None:
    scores = torch.tensor([0.9, 0.5, 0.4, 0.1], dtype=torch.float64)

    assert required_movement(scores, {0, 2}, Groups()) == pytest.approx(0.05, rel=1e-12)


def test_a_closed_group_must_pass_an_open_one_by_a_quarter_of_the_gap() -> None:
    scores = torch.tensor([0.9, 0.1, 0.5, 0.4, 0.8, 0.7, 0.2, 0.3], dtype=torch.float64)

    # Group 1 (0.9) takes the place of group 0 (1.0).
    needed = required_movement(scores, {2, 4, 5}, Groups(4, 2))

    assert needed == pytest.approx(0.025, rel=1e-12)


def test_experts_of_more_groups_than_are_open_have_no_excuse() -> None:
    scores = torch.tensor([0.9, 0.1, 0.5, 0.4, 0.8, 0.7, 0.2, 0.3])

    assert required_movement(scores, {0, 2, 4}, Groups(4, 2)) == float("inf")


def test_no_choice_that_noise_makes_is_called_unexplained(write_run: WriteRun) -> None:
    from nvfp4ref.deepseek_v3.routing import choose

    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(500, 16, generator=generator)
    moved = scores + (torch.rand(500, 16, generator=generator) - 0.5) * 0.1

    def run(name: str, of: torch.Tensor) -> Run:
        experts = choose(of, 4, 2, 4)
        points = {"router_scores": {"p": of}, "router_experts": {"p": experts}}
        written = write_run(name, {1: points})
        written.info.config.update(n_group=4, topk_group=2)
        return written

    (found,) = compare_routing(run("a", scores), run("b", moved))

    assert len(found.flips) > 50
    assert all(flip.legal for flip in found.flips)
