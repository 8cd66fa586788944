"""The pytest plugin: options and markers for tests of NVFP4 kernels.

pytest loads it in every project where nvfp4check is installed, so it imports neither torch nor
triton: whatever needs them waits until a test uses it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nvfp4check.agreement.agree import AgreeResult

#: The markers that a test may carry, with what they say.
MARKERS = (
    "nvfp4_gpu: the test needs an NVIDIA GPU",
    "nvfp4_blackwell: the test needs a GPU with FP4 tensor cores (compute capability 10.0 or more)",
)

#: The least compute capability that a marker asks for.
_CAPABILITIES = {"nvfp4_gpu": (0, 0), "nvfp4_blackwell": (10, 0)}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of kernel tests."""
    group = parser.getgroup("nvfp4", "NVFP4 kernels")
    group.addoption(
        "--nvfp4-device",
        metavar="DEVICE",
        default="cpu",
        help="the device that kernels are tested on: cpu (default), cuda, cuda:1",
    )
    group.addoption(
        "--nvfp4-max-examples",
        metavar="N",
        type=int,
        default=None,
        help="how many generated inputs a property is tried on (default: the suite's own number)",
    )
    group.addoption(
        "--nvfp4-seed",
        metavar="N",
        type=int,
        default=0,
        help="where generated inputs start from (default 0); the same seed gives the same inputs",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what generated inputs depend on, where it is not the default."""
    seed, device = config.getoption("--nvfp4-seed"), config.getoption("--nvfp4-device")
    return f"nvfp4: seed {seed}, device {device}" if (seed, device) != (0, "cpu") else None


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, which a strict configuration requires."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose marker asks for a GPU that is not there, and say which."""
    for name, least in _CAPABILITIES.items():
        if item.get_closest_marker(name) is not None:
            missing = _missing_gpu(item.config.getoption("--nvfp4-device"), least)
            if missing:
                pytest.skip(missing)


def _missing_gpu(device: str, least: tuple[int, int]) -> str | None:
    import torch

    if not device.startswith("cuda"):
        return f"needs an NVIDIA GPU: --nvfp4-device is {device}, give cuda"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU: torch finds none"
    found = torch.cuda.get_device_capability(device)
    if found < least:
        return f"needs compute capability {least[0]}.{least[1]}, {device} has {found[0]}.{found[1]}"
    return None


@pytest.fixture(scope="session")
def nvfp4_device(request: pytest.FixtureRequest) -> str:
    """The device that kernels are tested on."""
    device: str = request.config.getoption("--nvfp4-device")
    return device


@pytest.fixture
def nvfp4_agrees() -> "Callable[..., AgreeResult]":
    """Assert that a run agrees with a golden: `nvfp4_agrees(run, golden, max_kl=0.02)`."""
    from nvfp4check.agreement import assert_agrees

    return assert_agrees
