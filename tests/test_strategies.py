"""Hypothesis strategies: what they draw and what failures shrink to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4check import strategies
from nvfp4check.ops import UnsupportedError
from nvfp4ref import e4m3


@settings(max_examples=30, deadline=None, database=None)
@given(strategies.examples())
def test_an_example_is_whole_finite_blocks_with_a_positive_scale(
    example: strategies.Example,
) -> None:
    assert example.x.shape[0] == 1
    assert example.x.shape[1] % 16 == 0
    assert example.x.isfinite().all()
    assert example.global_decode_scale.item() > 0


@settings(max_examples=30, deadline=None, database=None)
@given(strategies.operands(nan=True))
def test_an_operand_has_one_scale_a_block(operand: strategies.Operand) -> None:
    rows, columns = operand.block_scales.shape

    assert operand.packed_codes.shape == (rows, columns * 8)
    assert (
        (e4m3.decode(operand.block_scales) > 0)
        .logical_or(e4m3.decode(operand.block_scales).isnan())
        .all()
    )


def test_a_failure_shrinks_to_one_block() -> None:
    """A fault that any negative element shows comes down to a block with few of them."""

    def negative(example: strategies.Example) -> torch.Tensor | None:
        return example.x if bool((example.x < 0).any()) else None

    found = strategies.find(strategies.examples(), negative, 200, 0)

    assert found is not None
    assert found.shape == (1, 16)


def test_the_same_seed_finds_the_same_example() -> None:
    def large(example: strategies.Example) -> float | None:
        return float(example.x.abs().max()) if example.x.abs().max() > 1 else None

    first, again = (strategies.find(strategies.examples(), large, 50, 3) for _ in range(2))

    assert first == again
    assert first is not None


def test_nothing_is_found_where_nothing_answers() -> None:
    assert strategies.find(strategies.examples(), lambda example: None, 10, 0) is None


def test_a_kernel_that_refuses_every_example_is_not_passed() -> None:
    def refuse(example: int) -> None:
        raise UnsupportedError("no")

    with pytest.raises(UnsupportedError):
        strategies.find(st.integers(), refuse, 10, 0)
