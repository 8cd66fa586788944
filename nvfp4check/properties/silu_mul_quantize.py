"""The laws of `silu_mul_quantize`: codes and block scales of silu(gate) * up.

A kernel forms the values in float32, so each is known to a few units of the last place
(`functions.silu_mul`); a code or a scale may be a neighbour only where that straddles a boundary.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from nvfp4check import compare, inputs
from nvfp4check.properties import common, functions
from nvfp4check.properties.law import Case, Failure, Property, Runner, Setting, failed
from nvfp4check.properties.quantized import check_values
from nvfp4ref import fused
from nvfp4ref.formats import BLOCK_SIZE, NVFP4

NAME = "silu_mul_quantize"


def _case(label: str, gate: torch.Tensor, up: torch.Tensor, factor: float = 1.0) -> Case:
    product = fused.silu_mul(gate, up).abs()
    amax = product.max() if product.numel() and product.max() > 0 else torch.tensor(1.0)
    scale = (amax / NVFP4.full_scale * factor).float()
    return Case(label, {"gate": gate, "up": up, "global_decode_scale": scale})


def ordinary(setting: Setting) -> Iterator[Case]:
    """One small case of each dtype."""
    for number, dtype in enumerate(inputs.INPUT_DTYPES):
        gate = 2 * inputs.gaussian(setting.generator(1, number), 5, 96)
        up = inputs.heavy_tailed(setting.generator(2, number), 5, 96)
        yield _case(f"{_short(dtype)} 5 x 96", gate.to(dtype), up.to(dtype))


def _families(setting: Setting) -> Iterator[Case]:
    for number, (name, family) in enumerate(inputs.FAMILIES.items()):
        for dtype in inputs.INPUT_DTYPES:
            gate = 3 * inputs.gaussian(setting.generator(3, number), 17, 272)
            up = family(setting.generator(4, number), 17, 272)
            yield _case(f"up {name}, {_short(dtype)}", gate.to(dtype), up.to(dtype))
            yield _case(
                f"up {name}, {_short(dtype)}, scale off", gate.to(dtype), up.to(dtype), 1.37
            )


def _shapes(setting: Setting) -> Iterator[Case]:
    for rows, blocks in inputs.shapes():
        columns = blocks * BLOCK_SIZE
        gate = inputs.gaussian(setting.generator(5, rows, blocks), rows, columns)
        up = inputs.gaussian(setting.generator(6, rows, blocks), rows, columns)
        label = f"{rows} x {columns} bfloat16"
        yield _case(label, gate.to(torch.bfloat16), up.to(torch.bfloat16))


def _no_rows(setting: Setting) -> Iterator[Case]:
    none = torch.empty(0, 64, dtype=torch.bfloat16)
    yield _case("0 x 64 bfloat16", none, none)


def _ends(setting: Setting) -> Iterator[Case]:
    gate = torch.linspace(-120, 120, 16 * 32).view(16, 32)
    up = inputs.gaussian(setting.generator(7), 16, 32)
    for dtype in inputs.INPUT_DTYPES:
        yield _case(f"gate from -120 to 120, {_short(dtype)}", gate.to(dtype), up.to(dtype))
    zero = torch.zeros(4, 32)
    yield _case("gate of zeros", zero, up[:4])
    yield _case("up of zeros", up[:4], zero)


def _check(runner: Runner, case: Case) -> Failure | None:
    actual, expected = runner(case.inputs), runner.reference(case.inputs)
    gate, up = case.inputs["gate"], case.inputs["up"]
    value = fused.silu_mul(gate, up)
    error = functions.silu_mul(gate.double(), up.double(), runner.setting.facts)
    return check_values(runner, case, actual, expected, value, error)


def _shrink(case: Case, failure: Failure) -> Iterable[Case]:
    gate, up = case.inputs["gate"], case.inputs["up"]
    if gate.numel() == BLOCK_SIZE:
        return
    for row in range(min(gate.shape[0], 8)):
        for first in range(0, min(gate.shape[1], 8 * BLOCK_SIZE), BLOCK_SIZE):
            span = (slice(row, row + 1), slice(first, first + BLOCK_SIZE))
            one = {"gate": gate[span].contiguous(), "up": up[span].contiguous()}
            label = f"{case.label}, row {row}, block {first // BLOCK_SIZE}"
            yield Case(label, {**case.inputs, **one})


def _odd_in_up(runner: Runner, case: Case) -> Failure | None:
    plain = runner(case.inputs)
    negated = Case(f"{case.label}, up negated", {**case.inputs, "up": -case.inputs["up"]})
    mirrored = runner(negated.inputs)
    scales = failed(negated, compare.bits(mirrored[1], plain[1], what="block scales"))
    if scales:
        return scales
    both = [codes & 0x77 for codes in (mirrored[0], plain[0])]
    return failed(negated, compare.bits(both[0], both[1], what="magnitudes of codes"))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_law = partial(Property, operation=NAME, shrink=_shrink)

PROPERTIES = (
    _law(
        name="codes-are-within-the-activations-error",
        law="codes and block scales are the convention's, or neighbours where the error of the "
        "float32 activation straddles a boundary",
        generate=_families,
        check=_check,
    ),
    _law(
        name="every-shape",
        law="rows round every tile size, with 1 to 17 blocks in a row, are quantised alike",
        generate=_shapes,
        check=_check,
    ),
    _law(
        name="no-rows",
        law="no rows give no codes and no block scales",
        generate=_no_rows,
        check=_check,
    ),
    _law(
        name="ends-of-the-sigmoid",
        law="gates from -120 to 120 and zeros give finite values, saturated or zero as they are",
        generate=_ends,
        check=_check,
    ),
    _law(
        name="odd-in-up",
        law="a negated up has the same block scales and the same magnitudes of codes",
        generate=ordinary,
        check=_odd_in_up,
    ),
    common.permutes_rows(NAME, ordinary, ("gate", "up")),
    common.takes_any_view(NAME, ordinary, ("gate", "up")),
    common.ignores_poison(NAME, ordinary, ("gate", "up")),
    common.repeats(NAME, ordinary),
    common.writes_only_its_outputs(NAME, ordinary),
)
