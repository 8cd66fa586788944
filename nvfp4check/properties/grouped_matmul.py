"""The laws of `grouped_matmul`: the rows of group e times expert e."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from nvfp4check import compare, inputs
from nvfp4check.properties import common, products
from nvfp4check.properties.law import Case, Failure, Property, Runner, Setting, failed
from nvfp4check.properties.products import ODD_ALPHA, constant_scales
from nvfp4ref import packing
from nvfp4ref.formats import BLOCK_SIZE
from nvfp4ref.matmul import group_rows

NAME = "grouped_matmul"

#: Rows of each group: none, one, round a tile of 8 and of 32, all in one, and a last group alone.
GROUPS = (
    (5, 0, 3, 8),
    (0, 0, 1),
    (33, 31, 32),
    (0, 40, 0, 0),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (0, 0, 0, 0),
)

#: Groups, N and blocks: more rows and columns than a tile of 128, and square operands.
SEVERAL_TILES = (((70, 0, 61), 130, 5), ((20, 0, 28), 48, 3))


def _case(
    label: str,
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    groups: tuple[int, ...],
    alpha: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> Case:
    offsets = torch.tensor([0, *groups]).cumsum(0).to(torch.int32)
    return Case(
        label,
        {
            "a_codes": a[0],
            "a_scales": a[1],
            "b_codes": b[0],
            "b_scales": b[1],
            "alpha": alpha,
            "expert_offsets": offsets,
            "dtype": dtype,
        },
    )


def _experts(
    generator: torch.Generator, experts: int, columns: int, blocks: int, *, certified: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = products.operand(generator, experts * columns, blocks, certified=certified)
    return codes.view(experts, columns, -1), scales.view(experts, columns, -1)


def _powers(experts: int) -> torch.Tensor:
    return torch.exp2(torch.arange(experts) % 5 - 2.0)


def ordinary(setting: Setting) -> Iterator[Case]:
    """One small certified case."""
    generator = setting.generator(1)
    a = products.operand(generator, 16, 5, certified=True)
    b = _experts(generator, 4, 24, 5, certified=True)
    yield _case("groups of 5, 0, 3, 8 rows", a, b, GROUPS[0], _powers(4))


def _certified(setting: Setting) -> Iterator[Case]:
    for number, groups in enumerate(GROUPS):
        for blocks, columns in ((3, 24), (9, 33)):
            generator = setting.generator(2, number, blocks)
            a = products.operand(generator, sum(groups), blocks, certified=True)
            b = _experts(generator, len(groups), columns, blocks, certified=True)
            for dtype in (torch.float32, torch.bfloat16):
                label = f"groups {groups}, {columns} x {blocks * BLOCK_SIZE}"
                yield _case(label, a, b, groups, _powers(len(groups)), dtype)
    for groups, columns, blocks in SEVERAL_TILES:
        generator = setting.generator(21, blocks)
        a = products.operand(generator, sum(groups), blocks, certified=True)
        b = _experts(generator, len(groups), columns, blocks, certified=True)
        label = f"groups {groups}, {columns} x {blocks * BLOCK_SIZE}"
        yield _case(label, a, b, groups, _powers(len(groups)))


def _nan_scales(setting: Setting) -> Iterator[Case]:
    groups, blocks, columns = (5, 0, 3, 8), 5, 24
    for byte in (0x7F, 0xFF):
        generator = setting.generator(22, byte)
        a = products.operand(generator, sum(groups), blocks, certified=True)
        b = _experts(generator, len(groups), columns, blocks, certified=True)
        a[1].view(torch.uint8)[6, 4] = byte
        b[1].view(torch.uint8)[3, 17, 0] = byte
        label = f"scale {byte:#x} in one block of A and of the last expert"
        yield _case(label, a, b, groups, _powers(len(groups)))


def _wide(setting: Setting) -> Iterator[Case]:
    groups = (7, 0, 20, 5)
    generator = setting.generator(3)
    a = products.operand(generator, sum(groups), 40, certified=False)
    b = _experts(generator, len(groups), 32, 40, certified=False)
    alpha = ODD_ALPHA * torch.tensor([1.0, 3.1, 0.013, 0.37])
    for dtype in (torch.float32, torch.bfloat16):
        yield _case("all scales, odd alphas", a, b, groups, alpha, dtype)


def _scale_places(setting: Setting) -> Iterator[Case]:
    groups, blocks, columns = (3, 4, 2), 6, 33
    every = torch.arange(sum(groups)) % blocks
    reader = (
        products.codes_at(sum(groups), blocks, every * BLOCK_SIZE),
        constant_scales(sum(groups), blocks),
    )
    filled = torch.full((len(groups), columns, blocks * BLOCK_SIZE), 2, dtype=torch.uint8)
    ids = inputs.scale_ids(len(groups) * columns, blocks, 0).view(len(groups), columns, blocks)
    experts = packing.pack(filled), ids
    yield _case("scales of B that name their place", reader, experts, groups, torch.ones(3))
    b = _experts(setting.generator(4), len(groups), 16, blocks, certified=True)
    a = (
        packing.pack(torch.full((sum(groups), blocks * BLOCK_SIZE), 2, dtype=torch.uint8)),
        inputs.random_scales(setting.generator(5), sum(groups), blocks, lowest=0x38, highest=0x3F),
    )
    yield _case("scales of A that differ by row", a, b, groups, torch.ones(3))


def _check_bits(runner: Runner, case: Case) -> Failure | None:
    actual, expected = runner(case.inputs), runner.reference(case.inputs)
    comparison = compare.bits(actual[0], expected[0], what="product", zeros=compare.Zeros.UNSIGNED)
    return failed(case, comparison, actual, expected)


def _check_bound(runner: Runner, case: Case) -> Failure | None:
    actual = runner(case.inputs)
    taken: dict[str, Any] = dict(case.inputs)
    groups = group_rows(taken["expert_offsets"], len(taken["b_codes"]), len(taken["a_codes"]))
    for expert, rows in enumerate(groups):
        one = {
            "a_codes": taken["a_codes"][rows],
            "a_scales": taken["a_scales"][rows],
            "b_codes": taken["b_codes"][expert],
            "b_scales": taken["b_scales"][expert],
            "alpha": taken["alpha"][expert],
            "dtype": taken["dtype"],
        }
        allowed = products.truth(runner, one)
        comparison = compare.within(actual[0][rows], allowed, what=f"product of expert {expert}")
        failure = failed(case, comparison, actual, (allowed.rounded,))
        if failure:
            return failure
    return None


def _permuted_experts(runner: Runner, case: Case) -> Failure | None:
    taken = case.inputs
    plain = runner(taken)[0]
    groups = group_rows(taken["expert_offsets"], len(taken["b_codes"]), len(taken["a_codes"]))
    order = torch.arange(len(groups)).roll(1)
    rows = torch.cat([torch.arange(groups[e].start, groups[e].stop) for e in order.tolist()])
    sizes = tuple(groups[e].stop - groups[e].start for e in order.tolist())
    moved = _case(
        f"{case.label}, experts and their rows rolled by one",
        (taken["a_codes"][rows], common.take_rows(taken["a_scales"], rows)),
        (taken["b_codes"][order], common.take_rows(taken["b_scales"], order)),
        sizes,
        taken["alpha"][order],
        taken["dtype"],
    )
    actual = runner(moved.inputs)
    comparison = compare.bits(actual[0], plain[rows], what="product", zeros=compare.Zeros.UNSIGNED)
    return failed(moved, comparison, actual, (plain[rows],))


_law = partial(Property, operation=NAME)
_OPERANDS = ("a_codes", "a_scales", "b_codes", "b_scales")

PROPERTIES = (
    _law(
        name="exact-sums-are-exact",
        law="where every order of float32 sums is exact each group's product is too, empty groups, "
        "groups of one row and the last expert included",
        generate=_certified,
        check=_check_bits,
    ),
    _law(
        name="all-scales-within-the-bound",
        law="under all block scales and an odd alpha an expert, each element is within the bound",
        generate=_wide,
        check=_check_bound,
    ),
    _law(
        name="scales-read-back",
        law="a scale that names its expert, row and block is read from there",
        generate=_scale_places,
        check=_check_bits,
    ),
    _law(
        name="nan-scales",
        law="a NaN block scale makes its row or its expert's column NaN, and nothing else",
        generate=_nan_scales,
        check=_check_bits,
    ),
    _law(
        name="experts-are-exchangeable",
        law="experts in another order, with their rows and alphas, give the same rows",
        generate=ordinary,
        check=_permuted_experts,
    ),
    common.takes_any_view(NAME, ordinary, _OPERANDS),
    common.ignores_poison(NAME, ordinary, _OPERANDS),
    common.repeats(NAME, ordinary),
    common.writes_only_its_outputs(NAME, ordinary),
)
