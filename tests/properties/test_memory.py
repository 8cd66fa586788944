"""The laws about memory, layout and repetition: each sees a kernel that breaks it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nvfp4check.properties.memory import CANARY, GUARD_BYTES, POISON, GuardedAllocations
from nvfp4ref import layout

Failing = Callable[..., set[str]]


def swizzled(block_scales: torch.Tensor) -> torch.Tensor:
    return layout.swizzle(block_scales).view(torch.uint8)


def beyond_the_end(block_scales: torch.Tensor) -> torch.Tensor:
    made = swizzled(block_scales)
    flat = torch.empty(made.numel(), dtype=torch.uint8)
    flat.copy_(made)
    if flat.untyped_storage().nbytes() > flat.numel() + 8:  # only where there is room behind it
        behind = flat.storage_offset() + flat.numel()
        torch.empty(0, dtype=torch.uint8).set_(flat.untyped_storage(), behind, (4,)).fill_(1)
    return flat


def last_byte_unwritten(block_scales: torch.Tensor) -> torch.Tensor:
    made = swizzled(block_scales)
    flat = torch.empty(made.numel(), dtype=torch.uint8)
    flat[:-1] = made[:-1]
    return flat


def changes_its_input(block_scales: torch.Tensor) -> torch.Tensor:
    made = swizzled(block_scales)
    block_scales.view(torch.uint8)[0, 0] ^= 1
    return made


@pytest.mark.parametrize("kernel", [beyond_the_end, last_byte_unwritten, changes_its_input])
def test_memory_that_is_written_wrongly_is_seen(
    failing: Failing, kernel: Callable[..., Any]
) -> None:
    law = "writes-only-its-outputs"

    assert failing("swizzle", kernel, only=law) == {law}


def test_strides_that_are_ignored_are_seen(failing: Failing) -> None:
    def kernel(block_scales: torch.Tensor) -> torch.Tensor:
        raw = block_scales.view(torch.uint8)
        straight = raw.as_strided(raw.shape, (raw.shape[1], 1), raw.storage_offset())
        return swizzled(straight.contiguous().view(block_scales.dtype))

    law = "strides-do-not-matter"

    assert failing("swizzle", kernel, only=law) == {law}


def test_rows_read_from_beside_the_input_are_seen(failing: Failing) -> None:
    def kernel(block_scales: torch.Tensor) -> torch.Tensor:
        raw = block_scales.view(torch.uint8)
        room = raw.untyped_storage().nbytes() - raw.storage_offset() - raw.numel()
        rows = raw.shape[0] + (1 if room >= raw.shape[1] else 0)
        longer = raw.as_strided((rows, raw.shape[1]), (raw.shape[1], 1), raw.storage_offset())
        if layout.swizzled_size(*longer.shape) != layout.swizzled_size(*raw.shape):
            longer = raw
        return swizzled(longer.contiguous().view(block_scales.dtype))

    law = "poison-beside-the-rows-changes-nothing"

    assert failing("swizzle", kernel, only=law) == {law}


def test_a_race_is_seen(failing: Failing) -> None:
    calls = 0

    def kernel(block_scales: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        made = swizzled(block_scales)
        made[0] ^= calls % 3 == 0
        return made

    assert failing("swizzle", kernel, only="repeat-runs-agree") == {"repeat-runs-agree"}


def test_every_way_to_allocate_is_guarded_and_keeps_its_values() -> None:
    like = torch.ones(3, 5, dtype=torch.float32)
    with GuardedAllocations() as guarded:
        made = [
            torch.zeros(3, 5),
            torch.full((3, 5), 7.0),
            torch.ones_like(like),
            like.new_zeros(3, 5),
            torch.empty(3, 5),
            torch.empty_like(like),
            like.new_empty(3, 5),
        ]

    expected = [0.0, 7.0, 1.0, 0.0]
    for tensor, value in zip(made[:4], expected, strict=True):
        assert (tensor == value).all()
    for tensor in made[4:]:
        assert (tensor.view(torch.uint8) == POISON).all()
    assert all(tensor.storage_offset() * 4 == GUARD_BYTES for tensor in made)
    assert guarded.violations() == []
    whole = torch.empty(0, dtype=torch.uint8).set_(made[1].untyped_storage())
    assert whole[0] == CANARY
    whole[GUARD_BYTES - 2] = 0
    assert guarded.violations() == [
        "torch.float32 (3, 5): 1 bytes written, up to 2 before its start"
    ]
