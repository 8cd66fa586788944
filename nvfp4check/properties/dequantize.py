"""The laws of `dequantize`: packed codes, block scales and the global scale back to values.

Contract:
    value    code * block scale * global scale; 6 + 24 significant bits, so exact in float64
    allowed  two float32 roundings, for one may form (code * scale) * global or code * (scale *
             global); none where the global scale is a power of two: there bits are due
    zero     of either sign, for producers decode code 8 to 0.0 and to -0.0
"""

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from nvfp4check import compare, inputs, strategies, tolerance
from nvfp4check.properties import common
from nvfp4check.properties.law import (
    Case,
    Failure,
    Property,
    Runner,
    Setting,
    failed,
    nothing_smaller,
)
from nvfp4ref import packing
from nvfp4ref.formats import BLOCK_SIZE
from nvfp4ref.matmul import operand

NAME = "dequantize"

#: A global scale that no float32 product with it leaves unrounded.
ODD_SCALE = 0.000412345


def _case(
    label: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    global_scale: float,
    dtype: torch.dtype,
) -> Case:
    return Case(
        label,
        {
            "packed_codes": codes,
            "block_scales": scales,
            "global_decode_scale": torch.tensor(global_scale),
            "dtype": dtype,
        },
    )


def ordinary(setting: Setting) -> Iterator[Case]:
    """One small case of each dtype."""
    for number, dtype in enumerate(inputs.OUTPUT_DTYPES):
        generator = setting.generator(1, number)
        codes, scales = inputs.random_codes(generator, 9, 40), inputs.random_scales(generator, 9, 5)
        yield _case(f"9 x 80 {_short(dtype)}", codes, scales, 2.0**-9, dtype)


def _every_pair(setting: Setting) -> Iterator[Case]:
    row = packing.pack(torch.arange(16, dtype=torch.uint8))
    raw = torch.tensor([0, *inputs.SCALE_BYTES, 0x7F, 0xFF]).view(-1, 1)
    codes = row.expand(len(raw), -1).contiguous()
    for global_scale in (1.0, 2.0**-12, ODD_SCALE):
        for dtype in inputs.OUTPUT_DTYPES:
            label = f"every code under every scale, global scale {global_scale}, {_short(dtype)}"
            yield _case(label, codes, inputs.scales_from_bytes(raw), global_scale, dtype)


def _shapes(setting: Setting) -> Iterator[Case]:
    for rows, blocks in inputs.shapes():
        generator = setting.generator(2, rows, blocks)
        codes = inputs.random_codes(generator, rows, blocks * 8)
        scales = inputs.random_scales(generator, rows, blocks)
        yield _case(f"{rows} x {blocks * BLOCK_SIZE}", codes, scales, 0.5, torch.bfloat16)
    generator = setting.generator(21)
    square = inputs.random_codes(generator, 48, 24), inputs.random_scales(generator, 48, 3)
    yield _case("48 x 48, square", *square, 2.0**-9, torch.float32)


def _no_rows(setting: Setting) -> Iterator[Case]:
    empty = torch.empty(0, 32, dtype=torch.uint8)
    none = inputs.scales_from_bytes(torch.empty(0, 4))
    yield _case("0 x 64", empty, none, 1.0, torch.bfloat16)


def _places(setting: Setting) -> Iterator[Case]:
    for rows, blocks in ((257, 9), (129, 5), (40, 12)):
        codes = packing.pack(torch.full((rows, blocks * BLOCK_SIZE), 2, dtype=torch.uint8))
        for plane in (0, 1):
            label = f"{rows} x {blocks} scales that name their place, plane {plane}"
            yield _case(label, codes, inputs.scale_ids(rows, blocks, plane), 1.0, torch.float32)


def _nibbles(setting: Setting) -> Iterator[Case]:
    k = 4 * BLOCK_SIZE
    codes = packing.pack(torch.eye(k, dtype=torch.uint8) * 7)
    scales = inputs.scales_from_bytes(torch.full((k, 4), 0x38))
    yield _case("element k of row k alone", codes, scales, 1.0, torch.float32)


def check(runner: Runner, case: Case) -> Failure | None:
    """Hold the values against the real ones."""
    actual = runner(case.inputs)
    taken = case.inputs
    global_scale = taken["global_decode_scale"]
    real = operand(taken["packed_codes"], taken["block_scales"]) * global_scale.double()
    mantissa, _ = torch.frexp(global_scale.double())
    unrounded = torch.full_like(real, bool(mantissa.abs() == 0.5), dtype=torch.bool)
    allowed = tolerance.of_roundings(
        real, 2, taken["dtype"], unrounded & ~real.isnan(), "two float32 products"
    )
    comparison = compare.within(actual[0], allowed, what="values")
    return failed(case, comparison, actual, (allowed.rounded,))


def shrink(case: Case, failure: Failure) -> Iterable[Case]:
    """Yield the block of the worst mismatch."""
    taken = case.inputs
    if failure.worst is None or len(failure.worst.index) != 2:
        return
    row, column = failure.worst.index
    block = column // BLOCK_SIZE
    if taken["block_scales"].numel() > 1:
        codes = taken["packed_codes"][row : row + 1, block * 8 : block * 8 + 8].contiguous()
        raw = taken["block_scales"].view(torch.uint8)[row : row + 1, block : block + 1]
        scales = inputs.scales_from_bytes(raw)
        one = {**taken, "packed_codes": codes, "block_scales": scales}
        yield Case(f"{case.label}, row {row}, block {block}", one)


def _homogeneous(runner: Runner, case: Case) -> Failure | None:
    plain = runner(case.inputs)[0]
    for power in (-3, 4):
        scale = case.inputs["global_decode_scale"] * 2.0**power
        scaled = Case(
            f"{case.label}, global scale times 2**{power}",
            {**case.inputs, "global_decode_scale": scale},
        )
        actual = runner(scaled.inputs)
        expected = plain * 2.0**power
        failure = failed(
            scaled, compare.bits(actual[0], expected, what="values"), actual, (expected,)
        )
        if failure:
            return failure
    return None


def _examples(setting: Setting) -> Iterator[Case]:
    yield Case(f"{setting.max_examples} examples, seed {setting.seed}", {})


def _any_operand(runner: Runner, case: Case) -> Failure | None:
    def broken(example: strategies.Operand) -> Failure | None:
        codes, scales = example.packed_codes, example.block_scales
        return check(runner, _case("drawn by hypothesis", codes, scales, 1.0, torch.float32))

    found = strategies.operands(nan=True)
    return strategies.find(found, broken, runner.setting.max_examples, runner.setting.seed)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_law = partial(Property, operation=NAME, shrink=shrink)
_OPERAND = ("packed_codes", "block_scales")

PROPERTIES = (
    _law(
        name="every-code-under-every-scale",
        law="each of the 16 codes under each of the 126 scales, zero and NaN is the real value",
        generate=_every_pair,
        check=check,
    ),
    _law(
        name="every-shape",
        law="rows round every tile size, with 1 to 17 blocks in a row, are decoded alike",
        generate=_shapes,
        check=check,
    ),
    _law(
        name="no-rows",
        law="no rows give no values",
        generate=_no_rows,
        check=check,
    ),
    _law(
        name="scales-read-back",
        law="a scale that names its place is read from that place",
        generate=_places,
        check=check,
    ),
    _law(
        name="one-hot-elements",
        law="a single live code decodes at its own place: even elements from low nibbles",
        generate=_nibbles,
        check=check,
    ),
    _law(
        name="any-operand",
        law="no codes and scales that hypothesis can think of decode otherwise",
        generate=_examples,
        check=_any_operand,
        shrink=nothing_smaller,
    ),
    _law(
        name="powers-of-two-in-the-global-scale",
        law="the global scale times a power of two gives the values times that power",
        generate=ordinary,
        check=_homogeneous,
    ),
    common.permutes_rows(NAME, ordinary, _OPERAND),
    common.takes_any_view(NAME, ordinary, _OPERAND),
    common.ignores_poison(NAME, ordinary, _OPERAND),
    common.repeats(NAME, ordinary),
    common.writes_only_its_outputs(NAME, ordinary),
)
