"""Compile a Triton kernel for a GPU that is not there, and measure what came out.

Contract:
    compile   Triton's own pipeline to PTX and cubin for a named compute capability; no GPU, no
              driver. TRITON_INTERPRET must not be set, for then there is nothing to compile
    measure   from the PTX: tensor-core instructions. From the SASS: accesses of global memory by
              width, conversions of E2M1, TMA, barriers, spills. From the cubin and Triton's
              metadata: registers, stack, shared memory, tensor memory
    Counts are of instructions in the program text, not of executions.

The disassemblers are those inside the triton package, else of the CUDA toolkit on PATH.
"""

import re
import shutil
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError
from triton.runtime.jit import JITFunction

from nvfp4check.findings import CheckError
from nvfp4check.kernels.arch import Architecture

#: Triton specialises an integer argument or pointer that is a multiple of this.
_ALIGNMENT = 16
_WARP = 32

#: What Triton's front end, its passes and ptxas raise.
_COMPILER_ERRORS = (
    TritonError,
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSource:
    """A kernel and how it is specialised."""

    name: str
    function: Any
    #: Triton types of the arguments in order: "*bf16", "i32", "tensordesc<u8[128, 128]>".
    signature: Mapping[str, str]
    #: Values of the arguments that are constants.
    constants: Mapping[str, Any] = field(default_factory=dict)
    #: Arguments that are multiples of 16.
    aligned: frozenset[str] = frozenset()
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of a kernel."""

    ptx: str
    sass: str
    resources: str
    shared_memory: int
    tensor_memory_columns: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What stands in a compiled kernel."""

    instructions: int
    registers: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int
    shared_memory: int
    tensor_memory_columns: int
    #: Tensor-core instructions of the PTX, shortened: "tcgen05.mma.mxf4nvf4.block16".
    matrix_instructions: dict[str, int]
    #: Block-scaled ones on E2M1 with one E4M3 scale for 16.
    nvfp4_matrix_instructions: int
    tma_loads: int
    tma_stores: int
    e2m1_encodes: int
    e2m1_decodes: int
    #: Bytes a thread moves by one instruction → how many such instructions.
    load_widths: dict[int, int]
    store_widths: dict[int, int]
    barriers: int


class CompileError(Exception):
    """The compiler refused a kernel."""


def compile_kernel(source: KernelSource, arch: Architecture) -> Compiled:
    """Compile a kernel for an architecture.

    Raises:
        CheckError: The kernel is no compilable Triton function, or a disassembler is missing.
        CompileError: Triton or ptxas refuses it.
    """
    if not isinstance(source.function, JITFunction):
        raise CheckError(
            f"{source.name}: {type(source.function).__name__} is not a function under @triton.jit"
            " that can be compiled; with TRITON_INTERPRET set there is nothing to compile"
        )
    names = list(source.signature)
    unknown = [name for name in (*source.constants, *source.aligned) if name not in names]
    missing = [name for name in source.function.arg_names if name not in names]
    if unknown or missing:
        raise CheckError(
            f"{source.name}: the signature gives {', '.join(names)}; missing "
            f"{', '.join(missing) or 'none'}, unknown {', '.join(unknown) or 'none'}"
        )
    compiled = ASTSource(
        fn=source.function,
        signature=dict(source.signature),
        constexprs=dict(source.constants),
        attrs={
            (names.index(name),): [["tt.divisibility", _ALIGNMENT]]
            for name in sorted(source.aligned)
        },
    )
    options = {
        "num_warps": source.warps,
        "num_stages": source.stages,
        "enable_fp_fusion": False,
    }
    try:
        with warnings.catch_warnings():
            # Triton 3.7 builds syntax trees in a way that Python 3.13 deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            target = GPUTarget("cuda", arch.capability, _WARP)
            kernel = triton.compile(compiled, target=target, options=options)
    except _COMPILER_ERRORS as error:
        raise CompileError(_first_words(error)) from error
    sass, resources = disassemble(kernel.asm["cubin"])
    return Compiled(
        ptx=kernel.asm["ptx"],
        sass=sass,
        resources=resources,
        shared_memory=int(kernel.metadata.shared),
        tensor_memory_columns=int(getattr(kernel.metadata, "tmem_size", 0) or 0),
        threads=source.warps * _WARP,
    )


def _first_words(error: Exception) -> str:
    lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines()]
    return " ".join(line for line in lines if line)[:400]


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return the SASS and the resource usage of a cubin.

    Raises:
        CheckError: A disassembler is missing or does not know the architecture.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as stream:
        stream.write(cubin)
        stream.flush()
        sass = _run(tool("nvdisasm"), "-c", stream.name)
        resources = _run(tool("cuobjdump"), "-res-usage", stream.name)
    return sass, resources


def tool(name: str) -> str:
    """Return the path of a CUDA tool: the triton package's, else the one on PATH.

    Raises:
        CheckError: There is none.
    """
    packaged = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(packaged) if packaged.is_file() else shutil.which(name)
    if found is None:
        raise CheckError(
            f"{name} is neither in the triton package nor on PATH: install the CUDA toolkit, or a "
            "triton wheel that brings it"
        )
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:300]}")
    return done.stdout


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_MATRIX = re.compile(r"\b(tcgen05\.mma|mma\.sync|wgmma\.mma_async)([\w.:]*)")
_GLOBAL_LOAD = re.compile(r"(?:LDG|LDGSTS)\.E(?:\.|$)")
_GLOBAL_STORE = re.compile(r"STG\.E(?:\.|$)")
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)(?:\.|$)")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def measure(compiled: Compiled) -> Measurement:
    """Count what stands in a compiled kernel."""
    opcodes = Counter(_INSTRUCTION.findall(compiled.sass))

    def count(pattern: str) -> int:
        return sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))

    matrix = Counter(
        _shorten(found.group(1), found.group(2)) for found in _MATRIX.finditer(compiled.ptx)
    )
    nvfp4 = sum(n for name, n in matrix.items() if re.search(r"mxf4nvf4\.(block16|4X)", name))
    return Measurement(
        instructions=sum(opcodes.values()),
        registers=_resource(compiled.resources, "REG"),
        stack_bytes=_resource(compiled.resources, "STACK"),
        spill_stores=count(r"STL"),
        spill_loads=count(r"LDL"),
        shared_memory=compiled.shared_memory,
        tensor_memory_columns=compiled.tensor_memory_columns,
        matrix_instructions=dict(sorted(matrix.items())),
        nvfp4_matrix_instructions=nvfp4,
        tma_loads=count(r"UTMALDG|UBLKCP"),
        tma_stores=count(r"UTMASTG|UTMAREDG"),
        e2m1_encodes=count(r"F2FP\.SATFINITE\.E2M1"),
        e2m1_decodes=count(r"F2FP\.F16\.E2M1\.UNPACK"),
        load_widths=_widths(opcodes, _GLOBAL_LOAD),
        store_widths=_widths(opcodes, _GLOBAL_STORE),
        barriers=count(r"BAR\."),
    )


def _shorten(instruction: str, qualifiers: str) -> str:
    """Return "tcgen05.mma.mxf4nvf4.block16" of the whole instruction."""
    kind = re.search(r"kind::(\w+)", qualifiers)
    scale = re.search(r"\.(block\d+)|scale_vec::(\dX)", qualifiers)
    types = re.findall(r"\.(e2m1|e4m3|e5m2|bf16|f16|tf32|s8)(?=\.|$)", qualifiers)
    parts = [instruction]
    parts += [kind.group(1)] if kind else sorted(set(types))
    parts += [scale.group(1) or scale.group(2)] if scale else []
    return ".".join(parts)


def _resource(resources: str, name: str) -> int:
    values = [int(value) for value in re.findall(rf"\b{name}:(\d+)", resources)]
    return max(values, default=0)


def _widths(opcodes: Counter[str], access: re.Pattern[str]) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for opcode, n in opcodes.items():
        if access.match(opcode):
            width = _WIDTH.search(opcode)
            widths[_BYTES[width.group(1)] if width else 4] += n
    return dict(sorted(widths.items()))


def median_width(widths: Mapping[int, int]) -> int:
    """Return the width of access that moves the middle byte: half move in ones at least as wide."""
    total = sum(width * n for width, n in widths.items())
    moved = 0
    for width in sorted(widths, reverse=True):
        moved += width * widths[width]
        if 2 * moved >= total:
            return width
    return 0
