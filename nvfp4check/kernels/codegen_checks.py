"""What a compiled kernel must have, and the verdict on one that was compiled.

Every kernel must do something (a compiler that runs out of tensor memory has been seen to leave an
empty one), spill nothing, and fit the chip. What more it needs, its `Needs` say.
"""

from dataclasses import asdict, dataclass
from typing import Any

from nvfp4check.kernels.arch import Architecture
from nvfp4check.kernels.codegen import (
    CompileError,
    KernelSource,
    Measurement,
    compile_kernel,
    measure,
    median_width,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a kernel must be made of on an architecture."""

    #: Tensor-core instructions on E2M1 with one E4M3 scale for 16.
    nvfp4_matrix: bool = False
    #: Tensor-core instructions of any kind.
    matrix: bool = False
    tma_loads: bool = False
    e2m1_encodes: bool = False
    e2m1_decodes: bool = False
    #: Half the bytes are loaded, or stored, by accesses at least this wide.
    load_width: int = 0
    store_width: int = 0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    holds: bool
    found: str
    expected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CodegenResult:
    """A kernel on an architecture: what was measured, and what holds."""

    kernel: str
    arch: str
    measurement: Measurement | None
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {
            "kernel": self.kernel,
            "arch": self.arch,
            "verdict": "pass" if self.holds else "fail",
            "measurement": None if self.measurement is None else _jsonable(self.measurement),
            "checks": [asdict(check) for check in self.checks],
        }


def _jsonable(measurement: Measurement) -> dict[str, Any]:
    fields = asdict(measurement)
    for name in ("load_widths", "store_widths"):
        fields[name] = {str(width): n for width, n in fields[name].items()}
    return fields


def check_kernel(source: KernelSource, arch: Architecture, needs: Needs) -> CodegenResult:
    """Compile a kernel for an architecture and check what came out.

    Raises:
        CheckError: It cannot be compiled or disassembled here at all.
    """
    try:
        measurement = measure(compile_kernel(source, arch))
    except CompileError as error:
        refused = Check("compiles", False, str(error), "compiles")
        return CodegenResult(
            kernel=source.name, arch=arch.name, measurement=None, checks=(refused,)
        )
    checks = (Check("compiles", True, "compiles", "compiles"), *judge(measurement, arch, needs))
    return CodegenResult(kernel=source.name, arch=arch.name, measurement=measurement, checks=checks)


def judge(measurement: Measurement, arch: Architecture, needs: Needs) -> tuple[Check, ...]:
    """Return the checks of a measured kernel."""
    m = measurement
    stores = sum(m.store_widths.values()) + m.tma_stores
    spills = m.spill_stores + m.spill_loads
    checks = [
        _at_least("stores something", stores, 1, "stores"),
        _at_most("no spills", spills, 0, "spilling instructions"),
        _at_most("stack", m.stack_bytes, 0, "bytes of stack"),
        _at_most("shared memory", m.shared_memory, arch.shared_memory, "bytes"),
        _at_most("tensor memory", m.tensor_memory_columns, arch.tensor_memory_columns, "columns"),
    ]
    if needs.nvfp4_matrix:
        checks.append(
            _at_least("native NVFP4 MMA", m.nvfp4_matrix_instructions, 1, "block-scaled MMA")
        )
        others = sum(m.matrix_instructions.values()) - m.nvfp4_matrix_instructions
        checks.append(_at_most("no other MMA", others, 0, "other MMA"))
    if needs.matrix:
        total = sum(m.matrix_instructions.values())
        checks.append(_at_least("tensor cores", total, 1, "MMA"))
    if needs.tma_loads:
        checks.append(_at_least("TMA loads", m.tma_loads, 1, "TMA loads"))
    if needs.e2m1_encodes:
        checks.append(_at_least("native E2M1 encode", m.e2m1_encodes, 1, "conversions"))
    if needs.e2m1_decodes:
        checks.append(_at_least("native E2M1 decode", m.e2m1_decodes, 1, "conversions"))
    if needs.load_width:
        width = median_width(m.load_widths)
        checks.append(_at_least("load width", width, needs.load_width, "bytes"))
    if needs.store_width:
        width = median_width(m.store_widths)
        checks.append(_at_least("store width", width, needs.store_width, "bytes"))
    return tuple(checks)


def _at_least(name: str, found: int, least: int, unit: str) -> Check:
    return Check(name, found >= least, f"{found} {unit}", f"at least {least} {unit}")


def _at_most(name: str, found: int, most: int, unit: str) -> Check:
    return Check(name, found <= most, f"{found} {unit}", f"at most {most} {unit}")
