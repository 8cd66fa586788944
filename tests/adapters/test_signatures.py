"""The calls of adapters that no CPU can run, held to the signatures in the installed source.

The library is read, not imported: its modules may load a GPU library.
"""

import ast
import importlib.util
from pathlib import Path

import pytest

import nvfp4check.adapters

ADAPTERS = Path(nvfp4check.adapters.__file__).parent

#: Adapter, the function as the adapter calls it, and the file and name that define it.
CALLS = [
    ("flashinfer", "nvfp4_quantize", "flashinfer", "quantization/fp4_quantization.py"),
    (
        "flashinfer",
        "nvfp4_block_scale_interleave",
        "flashinfer",
        "quantization/fp4_quantization.py",
    ),
    ("flashinfer", "mm_fp4", "flashinfer", "gemm/gemm_base.py"),
    ("vllm", "scaled_fp4_quant", "vllm", "_custom_ops.py"),
    ("vllm", "cutlass_scaled_fp4_mm", "vllm", "_custom_ops.py"),
    (
        "transformer_engine",
        "NVFP4Quantizer",
        "transformer_engine",
        "pytorch/tensor/nvfp4_tensor.py",
    ),
]


def called_in(adapter: str, function: str) -> tuple[int, set[str]]:
    """Return how many arguments an adapter passes by position, and those it names."""
    tree = ast.parse((ADAPTERS / f"{adapter}.py").read_text())
    (call,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == function
    )
    return len(call.args), {str(keyword.arg) for keyword in call.keywords}


def taken_by(source: str, function: str) -> tuple[list[str], set[str], int]:
    """Return the parameters of a function or of a class, by position and all, and how many must be.

    A name that is assigned another function stands for it.
    """
    tree = ast.parse(source)
    alias = {
        target.id: node.value.id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    name = alias.get(function, function)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            (found,) = (
                one
                for one in node.body
                if isinstance(one, ast.FunctionDef) and one.name == "__init__"
            )
            return _parameters(found, skip=1)
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _parameters(node, skip=0)
    raise LookupError(f"no {name} in the source")


def _parameters(node: ast.FunctionDef, skip: int) -> tuple[list[str], set[str], int]:
    positional = [one.arg for one in node.args.posonlyargs + node.args.args][skip:]
    named = {*positional, *(one.arg for one in node.args.kwonlyargs)}
    return positional, named, len(positional) - len(node.args.defaults)


def fits(call: tuple[int, set[str]], source: str, function: str) -> bool:
    given, keywords = call
    positional, named, required = taken_by(source, function)
    passed = {*positional[:given], *keywords}
    return given <= len(positional) and keywords <= named and set(positional[:required]) <= passed


@pytest.mark.parametrize(("adapter", "function", "package", "file"), CALLS)
def test_an_adapter_calls_with_arguments_that_the_library_takes(
    adapter: str, function: str, package: str, file: str
) -> None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    source = Path(spec.submodule_search_locations[0]) / file

    assert fits(called_in(adapter, function), source.read_text(), function)


@pytest.mark.parametrize(
    ("source", "right"),
    [
        ("def scaled_fp4_quant(input, scale, is_sf_swizzled_layout=True): ...", True),
        ("def scaled_fp4_quant(input, scale, swizzled=True): ...", False),
        ("def scaled_fp4_quant(input, scale, third, is_sf_swizzled_layout=True): ...", False),
        ("def scaled_fp4_quant(input, *, is_sf_swizzled_layout): ...", False),
        ("def other(a, b, is_sf_swizzled_layout): ...\nscaled_fp4_quant = other", True),
    ],
)
def test_a_renamed_a_new_or_a_lost_parameter_is_seen(source: str, right: bool) -> None:
    assert fits(called_in("vllm", "scaled_fp4_quant"), source, "scaled_fp4_quant") == right
