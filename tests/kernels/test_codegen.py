import dataclasses
import json

import pytest
import triton
import triton.language as tl

from nvfp4check.cli.kernels_codegen import codegen, parse_needs, parse_signature
from nvfp4check.findings import CheckError
from nvfp4check.kernels import arch as architectures
from nvfp4check.kernels import matmul, quantize
from nvfp4check.kernels.codegen import (
    CompileError,
    KernelSource,
    Measurement,
    compile_kernel,
    measure,
    median_width,
    tool,
)
from nvfp4check.kernels.codegen_cases import CASES
from nvfp4check.kernels.codegen_checks import Needs, check_kernel, judge
from nvfp4check.kernels.codegen_products import matmul_tma_source
from nvfp4check.kernels.interpreter import RELEASE

SM90, SM100, SM120 = architectures.SM90, architectures.SM100, architectures.SM120

#: What Triton 3.6 does not manage: it spills or narrows these, or refuses to specialise warps.
NOT_BEFORE_3_7 = {
    ("matmul (many rows)", "sm120"),
    ("matmul (warp-specialised)", "sm100"),
    ("matmul (few rows)", "sm100"),
    ("matmul (few rows)", "sm120"),
}

#: Compiling takes a second or two a kernel, so the siblings sm_103 and sm_120 are sampled.
COMPILED = [
    (name, arch)
    for name, case in CASES.items()
    for arch in (SM90, SM100, SM120)
    if case.runs_on(arch) and (arch is not SM120 or name.startswith("matmul"))
]


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def _normalize_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x / tl.sum(x))


@triton.jit
def _square_kernel(x_ptr, y_ptr, out_ptr, n, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for i in tl.range(n, num_stages=4):
        x = tl.load(x_ptr + row * SIZE + column + i * SIZE * SIZE)
        acc = tl.dot(x, tl.load(y_ptr + row * SIZE + column + i * SIZE * SIZE), acc)
    tl.store(out_ptr + row * SIZE + column, acc)


@triton.jit
def _empty_kernel(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    tl.device_assert(x == x)


def copy_source(aligned: bool) -> KernelSource:
    return KernelSource(
        name="copy",
        function=_copy_kernel,
        signature={"x_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32", "BLOCK": "constexpr"},
        constants={"BLOCK": 2048},
        aligned=frozenset({"x_ptr", "out_ptr", "n"}) if aligned else frozenset(),
    )


def failing(result) -> list[str]:
    return [check.name for check in result.checks if not check.holds]


@pytest.mark.parametrize(
    ("name", "arch"), COMPILED, ids=lambda value: getattr(value, "name", value)
)
def test_each_kernel_is_made_of_what_it_needs(name, arch):
    if RELEASE < (3, 7) and (name, arch.name) in NOT_BEFORE_3_7:
        pytest.skip("Triton 3.6 does not manage this one")
    case = CASES[name]

    result = check_kernel(case.source(arch), arch, case.needs(arch))

    assert failing(result) == [], [check for check in result.checks if not check.holds]


def test_an_unaligned_copy_moves_narrow_words():
    needs = Needs(load_width=16, store_width=16)

    assert failing(check_kernel(copy_source(True), SM100, needs)) == []
    assert failing(check_kernel(copy_source(False), SM100, needs)) == ["load width", "store width"]


def test_a_tile_too_large_for_the_registers_spills():
    source = KernelSource(
        name="spill",
        function=_normalize_kernel,
        signature={"x_ptr": "*fp32", "out_ptr": "*fp32", "BLOCK": "constexpr"},
        constants={"BLOCK": 16384},
        warps=1,
    )

    assert set(failing(check_kernel(source, SM100, Needs()))) >= {"no spills", "stack"}


def test_a_dot_too_large_for_shared_memory_is_seen():
    source = KernelSource(
        name="large",
        function=_square_kernel,
        signature={
            "x_ptr": "*fp16",
            "y_ptr": "*fp16",
            "out_ptr": "*fp32",
            "n": "i32",
            "SIZE": "constexpr",
        },
        constants={"SIZE": 128},
        aligned=frozenset({"x_ptr", "y_ptr", "out_ptr"}),
        warps=8,
        stages=4,
    )

    on_sm120 = check_kernel(source, SM120, Needs(matrix=True))

    assert "shared memory" in failing(on_sm120)
    assert "tensor cores" not in failing(on_sm120)


def test_tensor_memory_beyond_the_chip_leaves_an_empty_kernel_and_is_seen():
    wide = dataclasses.replace(matmul.TMA_CONFIG, block_n=256, stages=3)

    result = check_kernel(matmul_tma_source("wide", wide), SM100, Needs())

    assert "tensor memory" in failing(result)
    assert "stores something" in failing(result)


def test_a_kernel_that_stores_nothing_is_seen():
    source = KernelSource(
        name="empty", function=_empty_kernel, signature={"x_ptr": "*fp32", "out_ptr": "*fp32"}
    )

    assert failing(check_kernel(source, SM100, Needs())) == ["stores something"]


def test_a_matmul_without_native_nvfp4_is_seen():
    case = CASES["matmul (float16)"]
    needs = Needs(nvfp4_matrix=True, tma_loads=True)

    result = check_kernel(case.source(SM90), SM90, needs)

    assert failing(result) == ["native NVFP4 MMA", "no other MMA", "TMA loads"]


def test_a_quantiser_without_the_native_conversion_is_seen():
    source = CASES["quantize (linear)"].source(SM100)
    portable = dataclasses.replace(source, constants={**source.constants, "NATIVE": False})

    assert failing(check_kernel(portable, SM100, Needs(e2m1_encodes=True))) == [
        "native E2M1 encode"
    ]


def test_a_dequantiser_without_the_native_conversion_is_seen():
    source = CASES["dequantize"].source(SM100)
    portable = dataclasses.replace(source, constants={**source.constants, "NATIVE": False})

    assert failing(check_kernel(portable, SM100, Needs(e2m1_decodes=True))) == [
        "native E2M1 decode"
    ]


def test_a_conversion_the_architecture_has_not_does_not_compile():
    source = CASES["quantize (linear)"].source(SM100)

    result = check_kernel(source, SM90, Needs())

    assert failing(result) == ["compiles"]
    assert result.measurement is None
    with pytest.raises(CompileError):
        compile_kernel(source, SM90)


def measurement(**changes) -> Measurement:
    sound = Measurement(
        instructions=100,
        registers=32,
        stack_bytes=0,
        spill_stores=0,
        spill_loads=0,
        shared_memory=0,
        tensor_memory_columns=0,
        matrix_instructions={},
        nvfp4_matrix_instructions=0,
        tma_loads=0,
        tma_stores=0,
        e2m1_encodes=0,
        e2m1_decodes=0,
        load_widths={16: 1},
        store_widths={16: 1},
        barriers=0,
    )
    return dataclasses.replace(sound, **changes)


@pytest.mark.parametrize(
    ("changes", "needs", "expected"),
    [
        ({}, {}, []),
        ({"store_widths": {}}, {}, ["stores something"]),
        ({"store_widths": {}, "tma_stores": 1}, {}, []),
        ({"spill_loads": 1}, {}, ["no spills"]),
        ({"stack_bytes": 8}, {}, ["stack"]),
        ({"shared_memory": 232449}, {}, ["shared memory"]),
        ({"tensor_memory_columns": 513}, {}, ["tensor memory"]),
        ({"store_widths": {2: 1}}, {"store_width": 16}, ["store width"]),
    ],
)
def test_each_check_fails_on_what_it_looks_at_and_on_nothing_else(changes, needs, expected):
    checks = judge(measurement(**changes), SM100, Needs(**needs))

    assert [check.name for check in checks if not check.holds] == expected


def test_the_median_width_is_that_of_the_middle_byte():
    assert median_width({16: 4, 1: 2}) == 16
    assert median_width({16: 1, 1: 17}) == 1
    assert median_width({16: 1, 4: 1, 1: 13}) == 4
    assert median_width({}) == 0


def test_the_measured_resources_are_those_of_the_disassembly():
    compiled = compile_kernel(copy_source(True), SM100)

    found = measure(compiled)

    assert found.load_widths == {16: 2}  # 2048 elements of 2 bytes by 128 threads
    assert found.store_widths == {16: 2}
    assert found.registers > 0
    assert ".target sm_100a" in compiled.ptx


def test_a_signature_is_read_type_by_type():
    types, constants, aligned = parse_signature(
        "x_ptr=*bf16:16, d=tensordesc<u8[128, 64]>, n=i32, BLOCK=1024, NAME='engine', FLAG=True"
    )

    assert types["x_ptr"] == "*bf16"
    assert types["d"] == "tensordesc<u8[128, 64]>"
    assert types["BLOCK"] == types["FLAG"] == "constexpr"
    assert constants == {"BLOCK": 1024, "NAME": "engine", "FLAG": True}
    assert aligned == {"x_ptr"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x_ptr", "is not name=TYPE"),
        ("x_ptr=*bf16:8", "only a multiple of 16"),
        ("x_ptr=bfloat", "neither a Triton type nor a Python literal"),
    ],
)
def test_a_signature_that_cannot_be_read_says_where(text, message):
    with pytest.raises(CheckError, match=message):
        parse_signature(text)


def test_needs_are_read_by_name():
    assert parse_needs(["nvfp4-matrix", "load-width=16"]) == Needs(nvfp4_matrix=True, load_width=16)
    for wrong in ("fast", "load-width", "matrix=3", "load-width=wide"):
        with pytest.raises(CheckError, match="unknown need"):
            parse_needs([wrong])


def test_a_missing_argument_of_a_kernel_is_named():
    source = dataclasses.replace(copy_source(True), signature={"x_ptr": "*bf16"}, constants={})
    with pytest.raises(CheckError, match="missing out_ptr, n, BLOCK"):
        check_kernel(dataclasses.replace(source, aligned=frozenset()), SM100, Needs())


def test_a_missing_disassembler_is_named():
    with pytest.raises(CheckError, match="no-such-tool is neither in the triton package"):
        tool("no-such-tool")


def test_the_command_compiles_a_foreign_kernel_and_its_exit_code_is_the_verdict(
    capsys, tmp_path, keeps_to_schema
):
    path = "nvfp4check.kernels.swizzle:_unswizzle_kernel"
    unaligned = "flat_ptr=*u8, linear_ptr=*u8, M=i32, C=i32, tiles_across=i32, TILES=8"
    report = tmp_path / "report.json"

    assert codegen(kernel=path, signature=unaligned, output=report) == 0
    document = json.loads(report.read_text())
    keeps_to_schema(document)
    assert document["schema"] == "nvfp4check/codegen/1"
    assert document["verdict"] == "pass"
    assert document["results"][0]["measurement"]["load_widths"] == {"1": 32}

    assert codegen(kernel=path, signature=unaligned, need=["load-width=16"]) == 1
    assert "load width: found 1 bytes, expected at least 16 bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": ["sm80"]}, "unknown architecture 'sm80'"),
        ({"kernel": "fast"}, "no kernel begins with 'fast'"),
        ({"kernel": "matmul (warp", "arch": ["sm90"]}, "not launched on sm90"),
        ({"kernel": "os:getcwd"}, "say how it is specialised"),
        ({"kernel": "os:getcwd", "signature": "x=i32"}, "not a function under @triton.jit"),
        ({"signature": "x=i32"}, "go with --kernel MODULE:FUNCTION"),
    ],
)
def test_what_cannot_be_checked_is_an_error_in_words(arguments, message):
    with pytest.raises(CheckError, match=message):
        codegen(**arguments)


def test_the_cases_are_specialised_as_the_launcher_does_it():
    source = CASES["quantize (linear)"].source(SM100)

    block_m, block_k = quantize.tile_shape(SM100, 4096, 7168)
    assert (source.constants["BLOCK_M"], source.constants["BLOCK_K"]) == (block_m, block_k)
