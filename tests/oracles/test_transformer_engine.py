"""The `transformer-engine` convention against TransformerEngine's own reference quantiser.

Its reference is plain torch inside a package that loads a GPU library when imported. The reference
is imported without that: of the package only the folders are real, and the two base classes that
it derives from are empty.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nvfp4check import inputs
from nvfp4ref import nvfp4
from nvfp4ref.conventions import Convention

ROOT = "transformer_engine"
FOLDERS = ("", ".pytorch", ".pytorch.custom_recipes", ".pytorch.tensor")
#: Modules that only a GPU build can import, with the names that are asked of them.
BASES = {
    ".pytorch.quantized_tensor": ("QuantizedTensorStorage", "Quantizer"),
    ".pytorch.tensor.utils": ("is_custom",),
}


@pytest.fixture(scope="module")
def quantizer() -> Any:
    spec = importlib.util.find_spec(ROOT)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs transformer_engine (pip install --no-deps transformer_engine)")
    root = Path(spec.submodule_search_locations[0])
    before = dict(sys.modules)
    for name in FOLDERS:
        folder = ModuleType(ROOT + name)
        folder.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[folder.__name__] = folder
    for name, classes in BASES.items():
        module = ModuleType(ROOT + name)
        for class_ in classes:
            setattr(module, class_, type(class_, (), {}))
        sys.modules[module.__name__] = module
    reference = importlib.import_module(f"{ROOT}.pytorch.custom_recipes.reference_nvfp4")
    yield reference.NVFP4QuantizerRef
    for name in sys.modules.keys() - before.keys():
        if name.partition(".")[0] == ROOT:
            del sys.modules[name]


def theirs(quantizer: Any, x: torch.Tensor, amax: torch.Tensor) -> tuple[Any, Any]:
    codes, scales = quantizer._quantize_blockwise_reference(
        x, amax.view(1), 16, 1, pow_2_scales=False, eps=0.0
    )
    return codes, scales


def given_back(amax: torch.Tensor) -> torch.Tensor:
    """Return the first float32 from amax on whose encode scale 1 / (1 / E) gives back.

    TransformerEngine keeps E = 2688 / amax; who is given D = 1 / E may find a neighbour of E.
    """
    while amax > 0:
        encode = 2688.0 / amax
        if 1.0 / (1.0 / encode) == encode:
            break
        amax = torch.nextafter(amax, torch.tensor(torch.inf))
    return amax


def held(quantizer: Any, x: torch.Tensor, amax: torch.Tensor) -> None:
    """Quantise by both and compare every byte."""
    amax = given_back(amax)
    decode = nvfp4.global_decode_scale(amax, Convention.TRANSFORMER_ENGINE)
    codes, scales = nvfp4.quantize(x, decode, Convention.TRANSFORMER_ENGINE)
    their_codes, their_scales = theirs(quantizer, x, amax)

    assert torch.equal(scales.view(torch.uint8), their_scales.view(torch.uint8))
    assert torch.equal(codes, their_codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", inputs.FAMILIES)
def test_random_blocks_are_quantised_alike(quantizer: Any, family: str, dtype: torch.dtype) -> None:
    x = inputs.FAMILIES[family](torch.Generator().manual_seed(0), 256, 512).to(dtype)

    held(quantizer, x, x.abs().max().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 2.0**-12, 0.7123456, 3.3e-5])
def test_boundaries_are_quantised_alike(quantizer: Any, scale: float, dtype: torch.dtype) -> None:
    """Under a power of two the boundaries are met exactly, else as near as the dtype comes."""
    tables = (
        inputs.element_boundaries(dtype),
        inputs.scale_boundaries(dtype),
        inputs.zero_blocks(dtype),
        inputs.small_blocks(dtype),
    )
    for table in tables:
        held(quantizer, (table.double() * scale).to(dtype), torch.tensor(2688 * scale))


def test_an_encode_scale_that_is_not_given_back_moves_a_scale_by_one_step_at_most(
    quantizer: Any,
) -> None:
    amax = torch.tensor(2688 * 3.3e-5)
    x = (inputs.scale_boundaries(torch.float32).double() * 3.3e-5).float()
    decode = nvfp4.global_decode_scale(amax, Convention.TRANSFORMER_ENGINE)
    _, scales = nvfp4.quantize(x, decode, Convention.TRANSFORMER_ENGINE)
    _, their_scales = theirs(quantizer, x, amax)
    steps = scales.view(torch.uint8).int() - their_scales.view(torch.uint8).int()

    assert 1.0 / decode != 2688.0 / amax
    assert 0 < int(steps.abs().sum()) < len(x)
    assert int(steps.abs().max()) == 1


def test_a_tensor_of_zeros_is_quantised_alike(quantizer: Any) -> None:
    held(quantizer, torch.zeros(2, 32), torch.tensor(0.0))
