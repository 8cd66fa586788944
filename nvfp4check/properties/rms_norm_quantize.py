"""The laws of `rms_norm_quantize`: codes and block scales of the RMS norm, and the new residual.

The normed value is known to a few units of the last place (`functions.rms_norm`). With a residual,
kernels norm either the sum as they store it or the sum before it is rounded: both are right.
"""

from collections.abc import Iterator
from functools import partial

import torch

from nvfp4check import compare, inputs, tolerance
from nvfp4check.properties import common, functions
from nvfp4check.properties.law import Case, Failure, Property, Runner, Setting, failed
from nvfp4check.properties.quantized import check_values
from nvfp4ref import fused
from nvfp4ref.formats import BLOCK_SIZE, NVFP4

NAME = "rms_norm_quantize"

#: DeepSeek-V3's rms_norm_eps.
EPS = 1e-6


def _case(
    label: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    eps: float = EPS,
) -> Case:
    summed = x if residual is None else fused.add_residual(x, residual)
    normed = fused.rms_norm(summed, weight, eps).abs()
    amax = normed.max() if normed.numel() and normed.max() > 0 else torch.tensor(1.0)
    taken = {
        "x": x,
        "weight": weight,
        "eps": eps,
        "global_decode_scale": (amax / NVFP4.full_scale).float(),
    }
    return Case(label, taken if residual is None else {**taken, "residual": residual})


def _weight(setting: Setting, columns: int, dtype: torch.dtype) -> torch.Tensor:
    spread = torch.rand(columns, generator=setting.generator(1, columns))
    return (0.25 + 1.5 * spread).to(dtype)


def ordinary(setting: Setting) -> Iterator[Case]:
    """One small case of each dtype, without and with a residual."""
    for number, dtype in enumerate(inputs.INPUT_DTYPES):
        x = inputs.gaussian(setting.generator(2, number), 5, 96).to(dtype)
        residual = inputs.gaussian(setting.generator(3, number), 5, 96).to(dtype)
        weight = _weight(setting, 96, dtype)
        yield _case(f"{_short(dtype)} 5 x 96", x, weight)
        yield _case(f"{_short(dtype)} 5 x 96, residual", x, weight, residual)


def _plain(setting: Setting) -> Iterator[Case]:
    return (case for case in ordinary(setting) if "residual" not in case.inputs)


def _with_residual(setting: Setting) -> Iterator[Case]:
    return (case for case in ordinary(setting) if "residual" in case.inputs)


def _shapes(setting: Setting) -> Iterator[Case]:
    for rows, blocks in (*inputs.shapes(), (3, 448), (2, 96)):
        columns = blocks * BLOCK_SIZE
        x = inputs.heavy_tailed(setting.generator(4, rows, blocks), rows, columns)
        yield _case(
            f"{rows} x {columns} bfloat16",
            x.to(torch.bfloat16),
            _weight(setting, columns, torch.bfloat16),
        )


def _sizes(setting: Setting) -> Iterator[Case]:
    for power in (-20, -10, 0, 12):
        x = inputs.gaussian(setting.generator(5, power + 20), 6, 64) * 2.0**power
        yield _case(f"x of size 2**{power}", x, _weight(setting, 64, torch.float32))
    rows = torch.exp2(torch.arange(-16.0, 0.0)).unsqueeze(1)
    x = inputs.gaussian(setting.generator(6), 16, 64) * rows
    for eps in (EPS, 1e-2):
        yield _case(f"rows from 2**-16 to 1, eps {eps}", x, torch.ones(64), eps=eps)
    yield _case("a row of zeros", torch.zeros(2, 32), torch.ones(32))
    one = torch.zeros(2, 64)
    one[0, 17], one[1, 63] = 3.0, -1e-4
    yield _case("one live element in a row", one, torch.ones(64))


def _check(runner: Runner, case: Case) -> Failure | None:
    actual = runner(case.inputs)
    x, residual = case.inputs["x"], case.inputs.get("residual")
    expected = runner.reference(case.inputs)
    if residual is None:
        return _check_codes(runner, case, actual, expected, x)
    if len(actual) != 3:
        return Failure(message="a residual was given and none returned", case=case, actual=actual)
    real = x.double() + residual.double()
    due = real == real.float().double()
    allowed = tolerance.of_roundings(real, 1, x.dtype, due, "one float32 sum")
    comparison = compare.within(actual[2], allowed, what="residual")
    failure = failed(case, comparison, actual, expected)
    if failure:
        return failure
    stored = _check_codes(runner, case, actual, expected, fused.add_residual(x, residual))
    if stored is None or _check_codes(runner, case, actual, expected, real) is None:
        return None
    return stored


def _check_codes(
    runner: Runner,
    case: Case,
    actual: tuple[torch.Tensor, ...],
    expected: tuple[torch.Tensor, ...],
    normed: torch.Tensor,
) -> Failure | None:
    value = fused.rms_norm(normed, case.inputs["weight"], case.inputs["eps"])
    error = functions.rms_norm(value, normed.shape[-1], runner.setting.facts)
    return check_values(runner, case, actual[:2], expected[:2], value, error)


def _homogeneous(runner: Runner, case: Case) -> Failure | None:
    plain = runner(case.inputs)
    scaled = Case(
        f"{case.label}, weight and global scale times 4",
        {
            **case.inputs,
            "weight": case.inputs["weight"] * 4,
            "global_decode_scale": case.inputs["global_decode_scale"] * 4,
        },
    )
    return common.same_outputs(runner, scaled, runner(scaled.inputs), plain)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_law = partial(Property, operation=NAME)

PROPERTIES = (
    _law(
        name="codes-are-within-the-norms-error",
        law="codes and block scales are the convention's, or neighbours where the error of the "
        "float32 norm straddles a boundary; the residual is the sum, rounded once",
        generate=ordinary,
        check=_check,
    ),
    _law(
        name="every-shape",
        law="rows round every tile size, up to DeepSeek-V3's 7168 columns, are normed alike",
        generate=_shapes,
        check=_check,
    ),
    _law(
        name="sizes-and-eps",
        law="eps counts where the row is small and nowhere else; zero rows give zero codes",
        generate=_sizes,
        check=_check,
    ),
    _law(
        name="powers-of-two-move-into-the-global-scale",
        law="weight and global scale times one power of two give the same codes and scales",
        generate=ordinary,
        check=_homogeneous,
    ),
    common.permutes_rows(NAME, _plain, ("x",), truth=_check),
    common.permutes_rows(
        NAME, _with_residual, ("x", "residual"), "rows-with-residual-too", truth=_check
    ),
    common.takes_any_view(NAME, _plain, ("x",), truth=_check),
    common.ignores_poison(NAME, _plain, ("x",)),
    common.repeats(NAME, ordinary),
    common.writes_only_its_outputs(NAME, ordinary),
)
