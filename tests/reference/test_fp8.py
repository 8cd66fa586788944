"""FP8 with one scale a weight or a row, against a plain emulation and torch's own conversions."""

import pytest
import torch

from nvfp4ref import fp8
from nvfp4ref.deepseek_v3.linear import Fp8Linear, LinearMode, PlainLinear
from nvfp4ref.deepseek_v3.weights import StateDict
from nvfp4ref.e4m3 import MIDPOINTS
from nvfp4ref.fp8 import Fp8Activations


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def e4m3(values: torch.Tensor) -> torch.Tensor:
    """Torch's cast of values within the range."""
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def weight_of(scale: torch.Tensor, rows: int = 6, columns: int = 48) -> torch.Tensor:
    return e4m3(random(rows, columns) * 100 / scale.reshape(-1, 1))


SCALES = {
    "scalar": torch.tensor(0.7),
    "one": torch.tensor([0.7]),
    "rows": torch.linspace(0.1, 3, 6),
    "column": torch.linspace(0.1, 3, 6).unsqueeze(1),
    "bf16": torch.linspace(0.1, 3, 6).bfloat16().unsqueeze(1),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_row_is_multiplied_by_its_scale_once(scale: torch.Tensor, dtype: torch.dtype) -> None:
    weight = weight_of(scale.float())

    values = fp8.dequantize(weight, scale, dtype)

    for row in range(6):
        its = scale.float().flatten()[row if scale.numel() > 1 else 0]
        assert torch.equal(values[row], (weight[row].float() * its).to(dtype))


@pytest.mark.parametrize("shape", [(5,), (1, 6), (2, 3), (6, 2)])
def test_scales_that_are_no_rows_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="for 6 rows: expected one or each"):
        fp8.dequantize(weight_of(torch.ones(())), torch.ones(shape))


def test_a_stored_input_scale_multiplies_by_its_reciprocal_and_saturates() -> None:
    x = torch.cat((random(4, 64) * 50, torch.tensor([[1e6, -1e6, 0.0, -0.0] * 16])))
    scale = torch.tensor(0.3)

    found = fp8.quantize_static(x, scale)

    assert torch.equal(found, e4m3(x * (torch.ones(()) / scale)).float())
    assert found[4, :2].tolist() == [448.0, -448.0]
    # At a tie dividing gives another element for some scales, so the order is a convention.
    ties = torch.tensor(MIDPOINTS[8:]) * scale
    near = torch.cat([(ties.view(torch.int32) + step).view(torch.float32) for step in (-1, 0, 1)])
    divided = e4m3(near / scale).float()
    assert not torch.equal(fp8.quantize_static(near.unsqueeze(0), scale)[0], divided)
    multiplied = e4m3(near * (torch.ones(()) / scale)).float()
    assert torch.equal(fp8.quantize_static(near.unsqueeze(0), scale)[0], multiplied)


def test_each_token_has_a_scale_of_its_own_and_none_below_the_smallest() -> None:
    x = random(5, 64) * torch.tensor([1e-9, 1e-3, 1.0, 1e3, 0.0]).unsqueeze(1)

    values, scales = fp8.quantize_per_token(x)

    smallest = torch.tensor(1 / (448 * 512), dtype=torch.float32)
    for token in range(5):
        scale = torch.maximum(x[token].abs().max() / 448, smallest)
        assert torch.equal(scales[token], scale.unsqueeze(0))
        assert torch.equal(values[token], e4m3(x[token] / scale).float())
    assert float(values[2].abs().max()) == 448.0
    assert scales[0] == scales[4] == smallest


def test_a_token_with_a_nan_has_nothing_but_nan_and_its_neighbour_none() -> None:
    x = random(2, 16)
    x[0, 3] = float("nan")

    values, _ = fp8.quantize_per_token(x)

    assert values[0].isnan().all()
    assert values[1].isfinite().all()


@pytest.mark.parametrize("activations", [Fp8Activations.STATIC, Fp8Activations.PER_TOKEN])
@pytest.mark.parametrize("scale", [SCALES["scalar"], SCALES["column"]], ids=["tensor", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_stored_product_is_rounded_once(
    dtype: torch.dtype, scale: torch.Tensor, activations: Fp8Activations
) -> None:
    weight, x = weight_of(scale), random(7, 48, seed=3).to(dtype)
    input_scale = torch.tensor(0.01)
    linear = Fp8Linear(
        weight=weight, weight_scale=scale, activations=activations, input_scale=input_scale
    )

    y = linear(x)

    assert y.dtype == dtype
    for m in range(7):
        row = x[m].float()
        its = (
            input_scale
            if activations is Fp8Activations.STATIC
            else torch.maximum(row.abs().max() / 448, torch.tensor(1 / (448 * 512)))
        )
        static = activations is Fp8Activations.STATIC
        codes = e4m3(row * (1 / its) if static else row / its).double()
        for n in range(6):
            exact = sum(
                a * b for a, b in zip(codes.tolist(), weight[n].double().tolist(), strict=True)
            )
            of_row = float(scale.flatten()[n if scale.numel() > 1 else 0])
            expected = torch.tensor(exact * float(its) * of_row, dtype=torch.float64)
            assert y[m, n] == expected.to(dtype)


@pytest.mark.parametrize(
    "linear",
    [
        Fp8Linear(
            weight=weight_of(torch.ones(())),
            weight_scale=torch.tensor(0.5),
            activations=Fp8Activations.STATIC,
            input_scale=torch.tensor(0.1),
            mode=LinearMode.WEIGHT_ONLY,
        ),
        Fp8Linear(weight=weight_of(torch.ones(())), weight_scale=torch.tensor(0.5)),
    ],
    ids=["weight-only", "no-activations"],
)
def test_an_input_that_is_not_quantised_meets_the_dequantised_weight(linear: Fp8Linear) -> None:
    x = random(3, 48)

    assert torch.equal(linear(x), PlainLinear(linear.dequantized(torch.float32))(x))


def test_static_activations_without_a_scale_are_refused() -> None:
    linear = Fp8Linear(
        weight=weight_of(torch.ones(())),
        weight_scale=torch.ones(()),
        activations=Fp8Activations.STATIC,
    )
    with pytest.raises(ValueError, match="need an input_scale"):
        linear(random(1, 48))


def test_a_state_dict_tells_fp8_by_its_scale_and_static_by_the_input_scale() -> None:
    tensors = {
        "a.weight": weight_of(torch.ones(())),
        "a.weight_scale": torch.tensor(0.5),
        "a.input_scale": torch.tensor(0.1),
        "b.weight": weight_of(torch.ones(())),
        "b.weight_scale": SCALES["column"],
    }
    source = StateDict(tensors, fp8_activations=Fp8Activations.PER_TOKEN)

    found = [source.linear(name) for name in ("a", "b")]

    assert [linear.activations for linear in found if isinstance(linear, Fp8Linear)] == [
        Fp8Activations.STATIC,
        Fp8Activations.PER_TOKEN,
    ]
