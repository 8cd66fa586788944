import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as upstream
from triton.runtime.jit import JITFunction

from nvfp4check.kernels import interpreter
from nvfp4ref import e2m1, e4m3, e8m0

REPAIRS = {repair.name: repair for repair in interpreter.REPAIRS}


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def _largest(x):
    return tl.max(x, axis=0)


@triton.jit
def _largest_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, _largest(tl.load(x_ptr + tl.arange(0, N))))


@triton.jit
def _dot_scaled_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    out_ptr,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    offs = tl.arange(0, SIZE)
    offs_k = tl.arange(0, K // 2)
    offs_s = tl.arange(0, K // GROUP)
    a = tl.load(a_ptr + offs[:, None] * (K // 2) + offs_k[None, :])
    b = tl.load(b_ptr + offs[None, :] * (K // 2) + offs_k[:, None])
    a_scale = tl.load(a_scale_ptr + offs[:, None] * (K // GROUP) + offs_s[None, :])
    b_scale = tl.load(b_scale_ptr + offs[:, None] * (K // GROUP) + offs_s[None, :])
    out = tl.dot_scaled(a, a_scale, "e2m1", b, b_scale, "e2m1")
    tl.store(out_ptr + offs[:, None] * SIZE + offs[None, :], out)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    interpreter.run(_cast_kernel, (1,), x, y, N=x.numel())
    return y


def edges() -> torch.Tensor:
    """Every E4M3 midpoint and byte with its float32 neighbours, both signs, and the specials."""
    sharp = torch.tensor([*e4m3.MIDPOINTS, *e4m3.MAGNITUDES, 1e-40, 2.0**-10, 3.4e38, float("inf")])
    near = torch.cat([sharp, sharp.nextafter(torch.tensor(0.0)), sharp.nextafter(sharp * 2)])
    values = torch.cat([near, -near, torch.tensor([float("nan")])])
    padded = torch.zeros(1 << (values.numel() - 1).bit_length())
    padded[: values.numel()] = values
    return padded


@pytest.mark.parametrize("name", REPAIRS)
def test_the_repaired_interpreter_is_right(name):
    assert REPAIRS[name].is_right()


@pytest.mark.parametrize("name", REPAIRS)
def test_the_released_interpreter_needs_the_repairs_that_apply_and_no_others(name):
    repair = REPAIRS[name]
    with interpreter.unrepaired():
        right = repair.is_right()

    assert right or repair.applies, f"Triton {triton.__version__} needs {name!r}: raise `until`"
    assert not (right and repair.applies), (
        f"Triton {triton.__version__} does {name} right: remove the repair {name!r} from "
        "nvfp4check.kernels.interpreter, or lower its `until`"
    )


def test_a_cast_to_e4m3_is_bitwise_the_reference_at_every_boundary():
    x = edges()

    found = cast(x, torch.float8_e4m3fn).view(torch.uint8)

    assert torch.equal(found, e4m3.encode(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_from_a_sixteen_bit_type_to_e4m3_is_bitwise_the_reference(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)

    found = cast(every, torch.float8_e4m3fn).view(torch.uint8)

    assert torch.equal(found, e4m3.encode(every))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cast_from_e4m3_is_exact_for_every_byte(dtype):
    every = torch.arange(256, dtype=torch.uint8)

    found = cast(every.view(torch.float8_e4m3fn), dtype)

    expected = e4m3.decode(every)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0).float(), expected.nan_to_num(7.0))


def test_a_cast_to_bf16_rounds_to_even_and_keeps_nan_and_infinity():
    bits = torch.randint(-(2**31), 2**31, (1 << 14,), generator=torch.Generator().manual_seed(1))
    bits[:6] = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800001, 1, 0x7F800000])
    x = bits.to(torch.int32).view(torch.float32)

    found = cast(x, torch.bfloat16)

    expected = x.bfloat16()
    assert torch.equal(found.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(found[finite].view(torch.int16), expected[finite].view(torch.int16))


def test_a_cast_from_bf16_is_exact_for_every_bit_pattern():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)

    found = cast(every, torch.float32)

    number = ~every.isnan()
    assert torch.equal(found[number], every[number].float())
    assert bool(found[~number].isnan().all())


@pytest.mark.parametrize(("group", "scale"), [(16, "e4m3"), (32, "e8m0")])
def test_dot_scaled_decodes_each_scale_by_its_own_format(group, scale):
    generator = torch.Generator().manual_seed(2)
    size, k = 16, 64
    codes = torch.randint(0, 256, (2, size, k // 2), generator=generator).to(torch.uint8)
    low, high = (0, 0x7F) if scale == "e4m3" else (120, 134)
    raw = torch.randint(low, high, (2, size, k // group), generator=generator).to(torch.uint8)
    scales = raw.view(torch.float8_e4m3fn) if scale == "e4m3" else raw
    out = torch.empty(size, size)

    interpreter.run(
        _dot_scaled_kernel,
        (1,),
        codes[0],
        scales[0],
        codes[1],
        scales[1],
        out,
        SIZE=size,
        K=k,
        GROUP=group,
    )

    decode = e4m3.decode if scale == "e4m3" else e8m0.decode
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    values = e2m1.decode(pairs).double()
    values = values * decode(raw).double().repeat_interleave(group, dim=-1)
    assert torch.equal(out, (values[0] @ values[1].T).float())


def test_the_released_dot_scaled_is_wrong_for_e4m3_scales_or_is_not_there():
    ones = torch.full((16, 32), 0x22, dtype=torch.uint8)
    scales = torch.ones(16, 4).to(torch.float8_e4m3fn)
    out = torch.zeros(16, 16)
    arguments = (_dot_scaled_kernel, (1,), ones, scales, ones, scales, out)

    with interpreter.unrepaired():
        if hasattr(upstream.InterpreterBuilder, "create_dot_scaled"):
            interpreter.run(*arguments, SIZE=16, K=64, GROUP=16)
            # 0x38, which is 1.0 in E4M3, was read as the E8M0 scale 2**(0x38 - 127).
            assert np.all(out.numpy() == np.float32(64 * 2.0 ** (2 * (0x38 - 127))))
        else:
            with pytest.raises(upstream.InterpreterError):
                interpreter.run(*arguments, SIZE=16, K=64, GROUP=16)


def test_a_jitted_helper_and_the_standard_library_are_interpreted_too():
    x = torch.tensor([1.0, 5.0, -7.0, float("nan")])
    y = torch.zeros(())

    interpreter.run(_largest_kernel, (1,), x, y, N=4)

    assert y == 5.0


def test_nothing_of_triton_stays_patched_after_a_launch():
    def state():
        return (
            JITFunction.__call__,
            upstream._convert_float,
            getattr(upstream.InterpreterBuilder, "create_dot_scaled", None),
            upstream.TritonSemantic.dot_scaled,
            tl.core.reduce,
            tl.load,
            tl.core.where,
            tl.math.exp,
        )

    before = state()
    interpreter.run(_largest_kernel, (1,), torch.ones(4), torch.zeros(()), N=4)

    assert state() == before


def test_an_empty_grid_runs_nothing():
    y = torch.full((), 3.0)

    interpreter.run(_largest_kernel, (0,), torch.ones(4), y, N=4)

    assert y == 3.0


def test_triton_interpret_set_by_the_user_changes_nothing():
    program = (
        "from nvfp4check.kernels.interpreter import REPAIRS\n"
        "print([repair.is_right() for repair in REPAIRS])\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == str([True] * len(REPAIRS))
