"""What a launcher would ask of a GPU: compiled as it is specialised there, on a machine without."""

from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import nvfp4check.kernels
from nvfp4check.faults.power import cases_of
from nvfp4check.kernels.arch import SM90, SM100, missing
from nvfp4check.kernels.registry import LAUNCHERS
from nvfp4check.ops import OPERATIONS, resolve
from nvfp4check.properties.law import Setting

# Triton 3.7 builds syntax trees in a way that Python 3.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:AnnAssign:DeprecationWarning")

#: Programs that the second and the third dimension of a grid hold.
MOST = 65535


class PretendedDriver:
    """As much of a driver as it takes to compile for a GPU that is not there."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return f"pretended sm{self.capability}"  # the key of what was compiled before

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture
def on_gpu(monkeypatch):
    """Return a function that lets kernels be launched by another on some architecture."""

    def launches(arch, launch):
        monkeypatch.setattr(driver, "_active", PretendedDriver(arch.capability))
        pretended = {
            "architecture_of": lambda tensor: arch,
            "launch": launch,
            "multiprocessors": lambda device: 132,
        }
        for found in iter_modules(nvfp4check.kernels.__path__):
            module = import_module(f"nvfp4check.kernels.{found.name}")
            for name, stand_in in pretended.items():
                if hasattr(module, name) and found.name not in ("arch", "launch"):
                    monkeypatch.setattr(module, name, stand_in)

    return launches


def few_cases(operation):
    """A row alone, and views that are neither contiguous nor aligned."""
    setting = Setting(convention="engine" if OPERATIONS[operation].has_convention else None)
    yield from list(cases_of(operation, setting, lambda case: "row" in case.label, 1))[:2]
    yield from list(cases_of(operation, setting, lambda case: "plain" in case.facts, 2))[:3]


def compiled_on(on_gpu, operation, arch):
    compiled = {}

    def launch(kernel, grid, *args, on, **kwargs):
        if 0 not in grid:
            made = kernel.warmup(*args, grid=grid, enable_fp_fusion=False, **kwargs)
            compiled[kernel.__name__, made.hash] = made.metadata

    on_gpu(arch, launch)
    for case in few_cases(operation):
        OPERATIONS[operation].call(resolve(LAUNCHERS[operation]), case.inputs)
    return compiled


@pytest.mark.parametrize("operation", LAUNCHERS)
def test_launches_of_odd_inputs_compile_for_hopper(on_gpu, operation):
    compiled = compiled_on(on_gpu, operation, SM90)

    assert compiled
    assert all(made.shared <= SM90.shared_memory for made in compiled.values())
    assert not {name for name, _ in compiled} & {"_matmul_tma_kernel", "_matmul_few_kernel"}


@pytest.mark.parametrize("operation", ["matmul", "grouped_matmul"])
def test_launches_of_products_compile_for_blackwell(on_gpu, operation):
    compiled = compiled_on(on_gpu, operation, SM100)

    assert {name for name, _ in compiled} & {"_matmul_few_kernel", "_grouped_matmul_kernel"}
    assert all(made.shared <= SM100.shared_memory for made in compiled.values())


def rows(count, columns, dtype=torch.bfloat16):
    """So many rows that are one and the same in memory."""
    return torch.zeros(1, columns, dtype=torch.uint8).to(dtype).expand(count, columns)


E4M3 = torch.float8_e4m3fn
ONE = torch.tensor(1.0)

#: More rows than 65535 tiles hold.
LARGE = {
    "quantize": lambda: (rows(300_000, 1024), ONE),
    "silu_mul_quantize": lambda: (rows(300_000, 1024), rows(300_000, 1024), ONE),
    "dequantize": lambda: (rows(300_000, 512, torch.uint8), rows(300_000, 64, E4M3), ONE),
    "swizzle": lambda: (rows(8_400_000, 4, E4M3),),
    "unswizzle": lambda: (rows(65_600, 512, E4M3).reshape(-1), 8_396_800, 4),
    "dequantize_fp8_block": lambda: (rows(2_100_000, 16, E4M3), torch.ones(16407, 1)),
    "rms_norm_quantize": lambda: (rows(100_000, 4096), torch.ones(4096), 1e-6, ONE),
    "route": lambda: (rows(70_000, 8, torch.float32), torch.ones(8), 1, 1, 2, 1.0),
    "rope": lambda: (
        rows(300_000, 64).unsqueeze(1).expand(-1, 16, -1),
        torch.zeros(300_000, dtype=torch.int64),
        {"qk_rope_head_dim": 64},
    ),
}


@pytest.mark.parametrize("operation", LARGE)
def test_no_number_of_rows_is_too_large_for_a_grid(on_gpu, operation):
    grids = []
    on_gpu(SM100, lambda kernel, grid, *args, on, **kwargs: grids.append(grid))

    resolve(LAUNCHERS[operation])(*LARGE[operation]())

    assert grids
    assert all(max(grid[1:], default=0) <= MOST for grid in grids)
    assert max(grid[0] for grid in grids) > MOST


@pytest.mark.parametrize(
    ("device", "capability", "why"),
    [
        ("cpu", None, None),
        ("cuda", None, "torch finds no CUDA GPU"),
        ("cuda:0", (8, 9), "compute capability 8.9: the kernels know sm90, sm100, sm103, sm120"),
        ("cuda", (12, 1), None),
        ("meta", None, "the kernels run on a CUDA GPU or a CPU, not on meta"),
        ("gpu", None, "Expected one of cpu"),
    ],
)
def test_it_is_said_why_the_kernels_do_not_run_on_a_device(monkeypatch, device, capability, why):
    from nvfp4check.kernels import arch

    arch._architecture_of_gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)

    found = missing(device)
    arch._architecture_of_gpu.cache_clear()

    assert found is why or (why is not None and found is not None and found.startswith(why))
