"""The laws of `matmul`: alpha times A [M, K] times B [N, K] transposed."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from nvfp4check import compare, inputs, strategies
from nvfp4check.properties import common, products
from nvfp4check.properties.law import (
    Case,
    Failure,
    Property,
    Runner,
    Setting,
    failed,
    nothing_smaller,
)
from nvfp4check.properties.products import (
    LARGEST_BYTE,
    ODD_ALPHA,
    ONE,
    case,
    check_bits,
    check_product,
    constant_scales,
    operand,
)
from nvfp4ref import packing
from nvfp4ref.formats import BLOCK_SIZE

NAME = "matmul"

#: M, N and blocks: more than two tiles of 128 down and one across, and square operands.
SEVERAL_TILES = ((257, 130, 5), (48, 48, 3))


def ordinary(setting: Setting) -> Iterator[Case]:
    """One small certified case a dtype."""
    for number, dtype in enumerate(inputs.OUTPUT_DTYPES):
        generator = setting.generator(1, number)
        a = operand(generator, 9, 6, certified=True)
        b = operand(generator, 24, 6, certified=True)
        yield case(f"9 x 24 x 96 {_short(dtype)}", a, b, ONE, dtype)


def _certified(setting: Setting) -> Iterator[Case]:
    for number, (rows, blocks) in enumerate(inputs.shapes()):
        generator = setting.generator(2, number)
        columns = inputs.ROWS[-1 - number % len(inputs.ROWS)]
        a = operand(generator, rows, blocks, certified=True)
        b = operand(generator, columns, blocks, certified=True)
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{rows} x {columns} x {blocks * BLOCK_SIZE} {_short(dtype)}"
            yield case(label, a, b, ONE, dtype)
    for rows, columns, blocks in SEVERAL_TILES:
        generator = setting.generator(21, rows)
        a = operand(generator, rows, blocks, certified=True)
        b = operand(generator, columns, blocks, certified=True)
        yield case(f"{rows} x {columns} x {blocks * BLOCK_SIZE}", a, b)


def _every_k(setting: Setting) -> Iterator[Case]:
    for blocks in range(1, 33):
        generator = setting.generator(3, blocks)
        a = operand(generator, 3, blocks, certified=True)
        b = operand(generator, 8, blocks, certified=True)
        yield case(f"3 x 8 x {blocks * BLOCK_SIZE}", a, b)


def _wide(setting: Setting) -> Iterator[Case]:
    shapes = ((64, 48, 16), (33, 40, 40), (16, 32, 128))
    for number, (rows, columns, blocks) in enumerate(shapes):
        for dtype in inputs.OUTPUT_DTYPES:
            generator = setting.generator(4, number)
            a = operand(generator, rows, blocks, certified=False)
            b = operand(generator, columns, blocks, certified=False)
            alpha = ODD_ALPHA * 2.0**-12 if dtype == torch.float16 else ODD_ALPHA
            label = f"{rows} x {columns} x {blocks * BLOCK_SIZE} {_short(dtype)}, all scales"
            yield case(label, a, b, alpha, dtype)


def _one_block(setting: Setting) -> Iterator[Case]:
    blocks = 19
    generator = setting.generator(5)
    a_codes, a_scales = operand(generator, blocks, blocks, certified=True)
    live = torch.eye(blocks, dtype=torch.bool).repeat_interleave(BLOCK_SIZE, dim=1)
    a_codes = packing.pack(torch.where(live, packing.unpack(a_codes), 0))
    b = operand(generator, 16, blocks, certified=True)
    yield case("row i of A live in block i only", (a_codes, a_scales), b)
    yield case("row i of B live in block i only", b, (a_codes, a_scales))


def _one_element(setting: Setting) -> Iterator[Case]:
    blocks = 4
    places = torch.arange(blocks * BLOCK_SIZE)
    single = products.codes_at(len(places), blocks, places), constant_scales(len(places), blocks)
    other = operand(setting.generator(6), 32, blocks, certified=True)
    yield case("row k of A live in element k only", single, other)
    yield case("row k of B live in element k only", other, single)


def _every_code(setting: Setting) -> Iterator[Case]:
    rows = torch.zeros(16, BLOCK_SIZE, dtype=torch.uint8)
    rows[:, 3] = torch.arange(16, dtype=torch.uint8)
    packed = packing.pack(rows), constant_scales(16, 1)
    yield case("every code times every code", packed, packed)


def _every_scale(setting: Setting) -> Iterator[Case]:
    count = len(inputs.SCALE_BYTES)
    scales = inputs.scales_from_bytes(torch.tensor(inputs.SCALE_BYTES).view(-1, 1))
    single = products.codes_at(count, 1, torch.zeros(count, dtype=torch.long)), scales
    one = products.codes_at(8, 1, torch.zeros(8, dtype=torch.long)), constant_scales(8, 1)
    yield case("every scale of A, times one", single, one)
    yield case("every scale of B, times one", one, single)
    yield case("every scale times every scale", single, single)


def _scale_places(setting: Setting) -> Iterator[Case]:
    for rows, blocks in ((257, 9), (129, 5), (40, 12)):
        every = torch.arange(blocks)
        reader = (
            products.codes_at(blocks, blocks, every * BLOCK_SIZE),
            constant_scales(blocks, blocks),
        )
        filled = packing.pack(torch.full((rows, blocks * BLOCK_SIZE), 2, dtype=torch.uint8))
        for plane in (0, 1):
            ids = filled, inputs.scale_ids(rows, blocks, plane)
            label = f"{rows} x {blocks} scales, plane {plane}"
            yield case(f"{label}, read back through A", ids, reader)
            yield case(f"{label}, read back through B", reader, ids)


def _nan_scales(setting: Setting) -> Iterator[Case]:
    generator = setting.generator(7)
    for byte in (0x7F, 0xFF):
        a_codes, a_scales = operand(generator, 40, 6, certified=True)
        b_codes, b_scales = operand(generator, 24, 6, certified=True)
        a_scales.view(torch.uint8)[17, 4] = byte
        a_scales.view(torch.uint8)[3, 2] = byte
        b_scales.view(torch.uint8)[5, 0] = byte
        a_codes[17, 32:40] = 0  # zero codes under a NaN scale are NaN too
        yield case(
            f"scale {byte:#x} in two blocks of A and one of B",
            (a_codes, a_scales),
            (b_codes, b_scales),
        )


def _large_sums(setting: Setting) -> Iterator[Case]:
    generator = setting.generator(8)
    codes = inputs.random_codes(generator, 32, 128)
    scales = constant_scales(32, 16, LARGEST_BYTE)
    for dtype in inputs.OUTPUT_DTYPES:
        label = f"scales of 448, alpha 2**-20, {_short(dtype)}"
        yield case(label, (codes, scales), (codes, scales), torch.tensor(2.0**-20), dtype)
    full = packing.pack(torch.full((4, 256), 7, dtype=torch.uint8)), constant_scales(4, 16)
    for dtype in (torch.float16, torch.bfloat16):
        yield case(f"overflow of {_short(dtype)}", full, full, torch.tensor(2.0**120), dtype)


def _alphas(setting: Setting) -> Iterator[Case]:
    generator = setting.generator(9)
    a = operand(generator, 8, 4, certified=True)
    b = operand(generator, 16, 4, certified=True)
    for alpha in (ODD_ALPHA, ODD_ALPHA * 2.0**-24, torch.tensor(-3.1e-5), torch.tensor(12345.678)):
        for dtype in (torch.float32, torch.bfloat16):
            yield case(f"alpha {alpha.item():.6g}, {_short(dtype)}", a, b, alpha, dtype)


def _empty(setting: Setting) -> Iterator[Case]:
    generator = setting.generator(10)
    none = operand(generator, 0, 4, certified=True)
    some = operand(generator, 16, 4, certified=True)
    yield case("no rows", none, some)


def _homogeneous(runner: Runner, tried: Case) -> Failure | None:
    plain = runner(tried.inputs)[0]
    for power in (-6, 3):
        scaled = Case(
            f"{tried.label}, alpha times 2**{power}",
            {**tried.inputs, "alpha": tried.inputs["alpha"] * 2.0**power},
        )
        actual = runner(scaled.inputs)
        comparison = compare.bits(
            actual[0], plain * 2.0**power, what="product", zeros=compare.Zeros.UNSIGNED
        )
        failure = failed(scaled, comparison, actual, (plain * 2.0**power,))
        if failure:
            return failure
    return None


def _transposes(runner: Runner, tried: Case) -> Failure | None:
    taken = tried.inputs
    plain = runner(taken)[0]
    swapped = case(
        f"{tried.label}, A and B exchanged",
        (taken["b_codes"], taken["b_scales"]),
        (taken["a_codes"], taken["a_scales"]),
        taken["alpha"],
        taken["dtype"],
    )
    actual = runner(swapped.inputs)
    comparison = compare.bits(
        actual[0], plain.mT.contiguous(), what="product", zeros=compare.Zeros.UNSIGNED
    )
    return failed(swapped, comparison, actual, (plain.mT,))


def _any_operands(runner: Runner, tried: Case) -> Failure | None:
    def broken(pair: tuple[strategies.Operand, strategies.Operand]) -> Failure | None:
        a, b = pair
        blocks = min(a.block_scales.shape[1], b.block_scales.shape[1])
        return check_product(
            runner,
            case(
                "drawn by hypothesis",
                (a.packed_codes[:, : blocks * 8].contiguous(), _first(a.block_scales, blocks)),
                (b.packed_codes[:, : blocks * 8].contiguous(), _first(b.block_scales, blocks)),
            ),
        )

    pairs = strategies.pairs(strategies.operands())
    return strategies.find(pairs, broken, runner.setting.max_examples, runner.setting.seed)


def _first(scales: torch.Tensor, blocks: int) -> torch.Tensor:
    return inputs.scales_from_bytes(scales.view(torch.uint8)[:, :blocks])


def _examples(setting: Setting) -> Iterator[Case]:
    yield Case(f"{setting.max_examples} examples, seed {setting.seed}", {})


def shrink(tried: Case, failure: Failure) -> Iterable[Case]:
    """Yield one row of each operand, then single blocks of K, then fewer of them."""
    taken = tried.inputs
    worst = failure.worst
    if worst is None or len(worst.index) != 2:
        return
    row, column = worst.index
    blocks = taken["a_scales"].shape[1]
    single = taken["a_codes"].shape[0] == 1 and taken["b_codes"].shape[0] == 1
    if single and blocks == 1:
        return
    kept = [range(block, block + 1) for block in range(min(blocks, 64))] if blocks > 1 else []
    kept += [range(blocks // 2), range(blocks // 2, blocks)] if blocks > 2 else []
    if not single:
        kept.append(range(blocks))
    for span in kept:
        if len(span) == blocks and single:
            continue
        parts = {}
        for side, place in (("a", row), ("b", column)):
            codes = taken[f"{side}_codes"][place : place + 1, span.start * 8 : span.stop * 8]
            raw = taken[f"{side}_scales"].view(torch.uint8)[
                place : place + 1, span.start : span.stop
            ]
            parts[f"{side}_codes"] = codes.contiguous()
            parts[f"{side}_scales"] = inputs.scales_from_bytes(raw)
        label = f"{tried.label}, row {row}, column {column}, blocks {span.start} to {span.stop - 1}"
        yield Case(label, {**taken, **parts})


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_law = partial(Property, operation=NAME, shrink=shrink)
_OPERANDS = ("a_codes", "a_scales", "b_codes", "b_scales")

PROPERTIES = (
    _law(
        name="exact-sums-are-exact",
        law="where every order of float32 sums is exact the product is too, whatever M and N are",
        generate=_certified,
        check=check_bits,
    ),
    _law(
        name="every-k",
        law="every multiple of 16 up to 512 is contracted to its end",
        generate=_every_k,
        check=check_bits,
    ),
    _law(
        name="all-scales-within-the-bound",
        law="under block scales from 2**-9 to 448 and an odd alpha, every element lies within the "
        "bound that the declared accumulator gives",
        generate=_wide,
        check=check_product,
    ),
    _law(
        name="every-code",
        law="each of the 16 codes times each of the 16 is exact",
        generate=_every_code,
        check=check_bits,
    ),
    _law(
        name="every-scale",
        law="each of the 126 positive block scales decodes exactly, in A and in B",
        generate=_every_scale,
        check=check_product,
    ),
    _law(
        name="scales-read-back",
        law="a scale that names its place is read from that place, in A and in B",
        generate=_scale_places,
        check=check_bits,
    ),
    _law(
        name="one-live-block",
        law="a single live 16-block counts once, with its own scale, wherever it lies along K",
        generate=_one_block,
        check=check_bits,
    ),
    _law(
        name="one-live-element",
        law="a single live element meets its own partner, wherever it lies in its bytes",
        generate=_one_element,
        check=check_bits,
    ),
    _law(
        name="nan-scales",
        law="a NaN block scale makes its row of the product NaN, zero codes included, and no other",
        generate=_nan_scales,
        check=check_bits,
    ),
    _law(
        name="large-sums",
        law="sums beyond the range of float16 are held, and only the result overflows",
        generate=_large_sums,
        check=check_product,
    ),
    _law(
        name="alpha-is-applied-once",
        law="the product scales with alpha, however far from one and of either sign",
        generate=_alphas,
        check=check_product,
    ),
    _law(
        name="powers-of-two-in-alpha",
        law="alpha times a power of two gives the product times that power, bit for bit",
        generate=ordinary,
        check=_homogeneous,
    ),
    _law(
        name="transposes",
        law="A and B exchanged give the transpose",
        generate=ordinary,
        check=_transposes,
    ),
    _law(
        name="any-operands",
        law="no small operands that hypothesis can think of leave the bound",
        generate=_examples,
        check=_any_operands,
        shrink=nothing_smaller,
    ),
    _law(
        name="no-rows",
        law="no rows give an empty product",
        generate=_empty,
        check=check_bits,
    ),
    common.permutes_rows(NAME, ordinary, ("a_codes", "a_scales")),
    common.takes_any_view(NAME, ordinary, _OPERANDS),
    common.ignores_poison(NAME, ordinary, _OPERANDS),
    common.repeats(NAME, ordinary),
    common.writes_only_its_outputs(NAME, ordinary),
)
