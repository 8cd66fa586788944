"""The plugin: its markers, and that it loads nothing heavy."""

import subprocess
import sys

import pytest

pytest_plugins = ("pytester",)


def test_the_plugin_loads_neither_torch_nor_hypothesis_nor_triton() -> None:
    code = (
        "import sys, nvfp4check.pytest_plugin; "
        "sys.exit(bool({'torch', 'triton', 'hypothesis', 'numpy'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_that_check_can_fail() -> None:
    code = "import sys, torch, nvfp4check.pytest_plugin; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1


@pytest.mark.parametrize("marker", ["nvfp4_gpu", "nvfp4_blackwell"])
def test_a_test_that_needs_a_gpu_is_skipped_on_the_cpu(
    pytester: pytest.Pytester, marker: str
) -> None:
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.{marker}
        def test_on_a_gpu():
            raise AssertionError("this must not run")
        """
    )

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--strict-markers", "-rs")

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*needs an NVIDIA GPU: --nvfp4-device is cpu, give cuda"])


def test_the_device_is_a_fixture(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_device(nvfp4_device): assert nvfp4_device == 'cpu'")

    result = pytester.runpytest_subprocess()

    result.assert_outcomes(passed=1)
