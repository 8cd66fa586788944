"""Broken copies of the kernels, each by one change of its source, break a law."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

import nvfp4check.kernels
from nvfp4check.faults import fault
from nvfp4check.kernels import interpreter, matmul
from nvfp4check.properties import properties_of
from nvfp4check.properties.law import Setting, Verdict
from nvfp4check.tolerance import Facts, Reciprocal

SOURCES = Path(nvfp4check.kernels.__file__).parent
_numbers = itertools.count()


def copy_of(tmp_path, module: str, changed: str, old: str, new: str):
    """Return a copy of a kernel's module; `changed` is the file where old becomes new."""
    prefix = f"copy{next(_numbers)}"
    for name in {module, changed}:
        text = (SOURCES / f"{name}.py").read_text()
        if name == changed:
            assert old in text
            text = text.replace(old, new)
        if changed != module:
            text = text.replace(f"nvfp4check.kernels.{changed}", f"{prefix}_{changed}")
        (tmp_path / f"{prefix}_{name}.py").write_text(text)
    for name in sorted({module, changed}, key=lambda name: name == module):
        spec = importlib.util.spec_from_file_location(
            f"{prefix}_{name}", tmp_path / f"{prefix}_{name}.py"
        )
        sys.modules[spec.name] = loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    return loaded


def first_broken_law(operation: str, kernel, convention: str | None = None) -> str | None:
    setting = Setting(convention=convention, facts=Facts(reciprocal=Reciprocal.IEEE))
    for law in properties_of(operation):
        if law.run(kernel, setting).verdict is Verdict.FAIL:
            return law.name
    return None


MUTANTS = {
    "ties away from zero": (
        ("quantize", "quantize", "numeric"),
        ("+ 0x1FFFFF + ((steps >> 22) & 1)) >> 22", "+ 0x200000) >> 22"),
    ),
    "scale of a block rounded down": (
        ("quantize", "quantize", "numeric"),
        ("+ 0x7FFFF + ((steps >> 20) & 1)) >> 20", ") >> 20"),
    ),
    "odd element in the low nibble": (
        ("dequantize", "dequantize", "dequantize"),
        ("tl.join(even, odd)", "tl.join(odd, even)"),
    ),
    "rows and groups of a tile exchanged": (
        ("swizzle", "swizzle", "swizzle"),
        ("(4, 32, TILES, 4)), (2, 1, 0, 3)", "(4, 32, TILES, 4)), (2, 0, 1, 3)"),
    ),
    "the neighbour's scale": (
        ("_matmul_pointer", "matmul", "matmul_kernels"),
        ("scale_ptr + offs_scales + offs_c, ", "scale_ptr + offs_scales + (offs_c ^ 1), "),
    ),
    "the last tile of K dropped": (
        ("_matmul_pointer", "matmul", "matmul_kernels"),
        ("tl.cdiv(K, BLOCK_K), num_stages", "K // BLOCK_K, num_stages"),
    ),
    "the bias weighs": (
        ("route", "route", "route"),
        ("tl.where(index == best, scores, 0.0)", "tl.where(index == best, scores + 0.1, 0.0)"),
    ),
    "positions past the length": (
        ("mla_decode", "mla_decode", "mla_decode"),
        ("alive = token < last", "alive = token < last + 1"),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_breaks_a_law_that_the_original_keeps(name, tmp_path):
    (function, module, changed), (old, new) = MUTANTS[name]
    operation = function.removeprefix("_").removesuffix("_pointer")
    convention = "engine" if operation == "quantize" else None
    mutant = getattr(copy_of(tmp_path, module, changed, old, new), function)

    assert first_broken_law(operation, mutant, convention), f"no law sees {name}"


def test_an_unchanged_copy_keeps_every_law(tmp_path):
    copied = copy_of(tmp_path, "swizzle", "swizzle", "import torch", "import torch")

    assert first_broken_law("swizzle", copied.swizzle) is None


def unrepaired_matmul(*arguments):
    with interpreter.unrepaired():
        return matmul.matmul(*arguments)


needs_the_repair = pytest.mark.skipif(
    not interpreter.REPAIRS[0].applies, reason="this Triton decodes E4M3 scales"
)


@needs_the_repair
def test_the_released_dot_scaled_breaks_a_law_of_matmul():
    assert first_broken_law("matmul", unrepaired_matmul)


@needs_the_repair
@pytest.mark.skipif(interpreter.RELEASE < (3, 9), reason="this Triton interprets no dot_scaled")
def test_the_released_dot_scaled_is_the_fault_of_scales_read_as_e8m0(generator):
    a_codes, b_codes = (
        torch.randint(0, 256, (rows, 32), generator=generator).to(torch.uint8) for rows in (70, 20)
    )
    scales = torch.randint(0x38, 0x40, (70, 4), generator=generator).to(torch.uint8)
    scales = scales.view(torch.float8_e4m3fn)
    given = (a_codes, scales, b_codes, scales[:20], torch.tensor(1.0), torch.float32)
    forms = {form.label: form for form in fault("F3e").forms_of("matmul")}

    wrong = forms["as E8M0, of both operands"].apply()

    assert torch.equal(unrepaired_matmul(*given), wrong(*given))
