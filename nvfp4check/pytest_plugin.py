"""The pytest plugin: options and markers for tests of NVFP4 kernels.

pytest loads it in every project where nvfp4check is installed, so it imports neither torch nor
triton: whatever needs them waits until a test uses it.
"""

import pytest

#: The markers that a test may carry, with what they say.
MARKERS = (
    "nvfp4_gpu: the test needs an NVIDIA GPU",
    "nvfp4_blackwell: the test needs a GPU with FP4 tensor cores (compute capability 10.0 or more)",
)


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


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, which a strict configuration requires."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
