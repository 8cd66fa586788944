from collections.abc import Callable

import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.layers import Place
from nvfp4check.agreement.routing import compare_routing

WriteRun = Callable[..., Run]


def _run(write_run: WriteRun, name: str, experts: list[list[int]], scores: torch.Tensor) -> Run:
    return write_run(
        name,
        {
            1: {
                "router_experts": {"p": torch.tensor(experts, dtype=torch.int32)},
                "router_scores": {"p": scores},
            }
        },
    )


SCORES = torch.tensor([[0.9, 0.5, 0.4, 0.1], [0.8, 0.7, 0.2, 0.1]])


def test_the_order_of_experts_is_no_difference(write_run: WriteRun) -> None:
    reference = _run(write_run, "a", [[0, 1], [0, 1]], SCORES)
    candidate = _run(write_run, "b", [[1, 0], [0, 1]], SCORES)

    (found,) = compare_routing(reference, candidate)

    assert found.flips == ()
    assert found.load_reference == found.load_candidate == (2, 2, 0, 0)
    assert found.exercised == 2


def test_a_flip_within_the_error_of_the_scores_is_legal(write_run: WriteRun) -> None:
    moved = SCORES.clone()
    moved[0, 1], moved[0, 2] = 0.44, 0.46
    reference = _run(write_run, "a", [[0, 1], [0, 1]], SCORES)
    candidate = _run(write_run, "b", [[0, 2], [0, 1]], moved)

    (found,) = compare_routing(reference, candidate)
    (flip,) = found.flips

    assert flip.place == Place(prompt="p", token=0)
    assert (flip.dropped, flip.taken) == ((1,), (2,))
    assert flip.legal is True


def test_a_flip_beyond_the_error_of_the_scores_is_not_legal(write_run: WriteRun) -> None:
    reference = _run(write_run, "a", [[0, 1], [0, 1]], SCORES)
    candidate = _run(write_run, "b", [[0, 3], [0, 1]], SCORES + 1e-3)

    (found,) = compare_routing(reference, candidate)

    assert found.flips[0].legal is False


def test_without_scores_no_flip_is_judged(write_run: WriteRun) -> None:
    points = [
        {1: {"router_experts": {"p": torch.tensor([[0, last]], dtype=torch.int32)}}}
        for last in (1, 2)
    ]

    (found,) = compare_routing(write_run("a", points[0]), write_run("b", points[1]))

    assert found.flips[0].legal is None
    assert found.score_error is None


def test_another_number_of_experts_is_a_flip_of_every_token(write_run: WriteRun) -> None:
    reference = _run(write_run, "a", [[0, 1], [0, 1]], SCORES)
    candidate = _run(write_run, "b", [[0], [0]], SCORES)

    (found,) = compare_routing(reference, candidate)

    assert [flip.place.token for flip in found.flips] == [0, 1]
