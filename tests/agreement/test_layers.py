import math
from collections.abc import Callable

import pytest
import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.layers import Place, compare_layers

WriteRun = Callable[..., Run]


def _noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_run_agrees_bitwise_with_itself(write_run: WriteRun) -> None:
    points = {0: {"hidden": {"p": _noise(5, 8, seed=1)}}}

    (found,) = compare_layers(write_run("a", points), write_run("b", points))

    assert found.bitwise
    assert found.relative_error == 0
    assert found.sqnr_db == math.inf
    assert found.worst is found.first_difference is found.share is None


def test_the_error_is_relative_over_all_prompts_and_the_worst_token_is_named(
    write_run: WriteRun,
) -> None:
    first, second = _noise(4, 8, seed=1), _noise(6, 8, seed=2)
    changed = second.clone()
    changed[3] *= 1.5
    reference = write_run("a", {0: {"hidden": {"p": first, "q": second}}})
    candidate = write_run("b", {0: {"hidden": {"p": first, "q": changed}}})

    (found,) = compare_layers(reference, candidate)

    total = torch.cat((first, second)).norm()
    assert found.relative_error == pytest.approx(float(second[3].norm() / 2 / total), rel=2**-45)
    assert found.worst == found.first_difference == Place(prompt="q", token=3)
    assert found.worst_error == pytest.approx(0.5, rel=2**-45)


def test_a_changed_sign_of_zero_is_a_difference_in_bits_alone(write_run: WriteRun) -> None:
    reference = write_run("a", {0: {"hidden": {"p": torch.zeros(2, 3)}}})
    candidate = write_run("b", {0: {"hidden": {"p": -torch.zeros(2, 3)}}})

    (found,) = compare_layers(reference, candidate)

    assert not found.bitwise
    assert found.relative_error == 0


def test_the_shares_of_a_residual_stream_add_up_to_one(write_run: WriteRun) -> None:
    def run(name: str, attention: torch.Tensor, mlp: torch.Tensor, embed: torch.Tensor) -> Run:
        hidden = embed + _noise(7, 8, seed=3)
        after = hidden + attention + mlp
        return write_run(
            name,
            {
                0: {"hidden": {"p": hidden}},
                1: {
                    "attn_output": {"p": attention},
                    "mlp_output": {"p": mlp},
                    "hidden": {"p": after},
                },
            },
        )

    attention, mlp, embed = (_noise(7, 8, seed=seed) for seed in (4, 5, 6))
    reference = run("a", attention, mlp, embed)
    candidate = run("b", attention + _noise(7, 8, seed=7), mlp * 1.01, embed * 1.001)

    shares = {p.key: p.share for p in compare_layers(reference, candidate) if p.layer == 1}

    assert sum(share or 0 for share in shares.values()) == pytest.approx(1, rel=2**-40)
    assert (shares[1, "attn_output"] or 0) > 0.9


def test_the_block_that_is_wrong_has_the_whole_share(write_run: WriteRun) -> None:
    hidden, mlp = _noise(7, 8, seed=1), _noise(7, 8, seed=2)
    first = {"hidden": {"p": hidden}}
    reference = write_run(
        "a", {0: first, 1: {"mlp_output": {"p": mlp}, "hidden": {"p": hidden + mlp}}}
    )
    candidate = write_run(
        "b", {0: first, 1: {"mlp_output": {"p": 2 * mlp}, "hidden": {"p": hidden + 2 * mlp}}}
    )

    found = {p.key: p for p in compare_layers(reference, candidate)}

    assert found[1, "mlp_output"].share == pytest.approx(1, rel=2**-40)
    assert found[1, "hidden"].share == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_token_is_counted_and_left_out_of_the_error(
    write_run: WriteRun, poison: float
) -> None:
    values = _noise(5, 8, seed=1)
    poisoned = values.clone()
    poisoned[2, 1] = poison
    reference = write_run("a", {0: {"hidden": {"p": values}}})
    candidate = write_run("b", {0: {"hidden": {"p": poisoned}}})

    (found,) = compare_layers(reference, candidate)

    assert (found.nonfinite_reference, found.nonfinite_candidate) == (0, 1)
    assert found.tokens == 4
    assert found.relative_error == 0
    assert found.first_difference == Place(prompt="p", token=2)


def test_points_come_in_the_order_of_the_computation(write_run: WriteRun) -> None:
    points = {
        layer: {point: {"p": torch.ones(2, 2)} for point in ("hidden", "mlp_output", "attn_input")}
        for layer in (1, 0)
    }
    run = write_run("a", points)

    keys = [found.key for found in compare_layers(run, run)]

    assert keys == [
        (layer, point) for layer in (0, 1) for point in ("attn_input", "mlp_output", "hidden")
    ]
