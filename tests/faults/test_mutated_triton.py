"""Broken copies of the project's Triton kernels fail, and are told what is wrong with them."""

import importlib.util
import sys
from pathlib import Path

import pytest

import nvfp4check.kernels
from nvfp4check.faults.diagnosis import with_diagnosis
from nvfp4check.kernels import interpreter, matmul
from nvfp4check.properties import properties_of
from nvfp4check.properties.law import Setting, Verdict
from nvfp4check.tolerance import Facts, Reciprocal

SOURCES = Path(nvfp4check.kernels.__file__).parent


def broken_copy(directory: Path, module: str, changed: str, old: str, new: str):
    """Return a copy of a kernel's module that uses a copy of `changed` in which old is new."""
    loaded = None
    for name in dict.fromkeys((changed, module)):
        text = (SOURCES / f"{name}.py").read_text()
        if name == changed:
            assert text.count(old) >= 1
            text = text.replace(old, new)
        else:
            text = text.replace(f"nvfp4check.kernels.{changed}", f"broken_{changed}")
        path = directory / f"broken_{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = loaded
        spec.loader.exec_module(loaded)
    return loaded


def diagnosis(operation: str, kernel, convention: str | None = None) -> str:
    setting = Setting(convention=convention, facts=Facts(reciprocal=Reciprocal.IEEE))
    for law in properties_of(operation):
        outcome = law.run(kernel, setting)
        if outcome.verdict is Verdict.FAIL:
            return with_diagnosis(outcome, kernel, setting).diagnosis or "no diagnosis"
    return "no law is broken"


def test_ties_away_from_zero_are_named(tmp_path):
    old, new = "+ 0x1FFFFF + ((steps >> 22) & 1)) >> 22", "+ 0x200000) >> 22"
    copy = broken_copy(tmp_path, "quantize", "numeric", old, new)

    assert "F2a: ties away from zero" in diagnosis("quantize", copy.quantize, "engine")


def test_the_neighbours_scale_is_named(tmp_path):
    old = "scale_ptr + offs_scales + offs_c, "
    new = "scale_ptr + offs_scales + tl.minimum(offs_c ^ 1, K // 16 - 1), "
    copy = broken_copy(tmp_path, "matmul", "matmul_kernels", old, new)

    named = diagnosis("matmul", copy._matmul_pointer)

    assert named.endswith("F6b: the neighbour's scale (the other of a pair, of both operands)")


def test_a_dropped_tail_of_k_is_named(tmp_path):
    old, new = "tl.cdiv(K, BLOCK_K), num_stages", "K // BLOCK_K, num_stages"
    copy = broken_copy(tmp_path, "matmul", "matmul_kernels", old, new)

    named = diagnosis("matmul", copy._matmul_pointer)

    assert named.startswith("equals F12c: tail of K dropped (tiles of ")


@pytest.mark.skipif(interpreter.RELEASE < (3, 9), reason="this Triton interprets no dot_scaled")
def test_the_released_interpreters_dot_scaled_is_named():
    """Triton 3.9 on a CPU decodes E4M3 block scales as E8M0."""
    if not interpreter.REPAIRS[0].applies:
        pytest.skip("this Triton decodes E4M3 scales")

    def unrepaired(*arguments):
        with interpreter.unrepaired():
            return matmul.matmul(*arguments)

    named = diagnosis("matmul", unrepaired)

    assert "F3e: scale read in another 8-bit format (as E8M0, of both operands)" in named
