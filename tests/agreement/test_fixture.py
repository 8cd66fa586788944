"""The fixture for an engine's own tests, in a project of its own."""

from pathlib import Path

import pytest

pytest_plugins = ("pytester",)

GOLDEN = (
    Path(__file__).parents[2]
    / "goldens"
    / "tiny-deepseek-v3"
    / "activations"
    / "reference-nvfp4-stored"
)


def test_an_engine_s_test_holds_its_run_to_a_golden(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        f"""
        import shutil
        from safetensors.torch import load_file, save_file

        GOLDEN = {str(GOLDEN)!r}

        def test_equal(nvfp4_agrees):
            nvfp4_agrees(GOLDEN, GOLDEN)

        def test_layer_3_is_wrong(nvfp4_agrees, tmp_path):
            shutil.copytree(GOLDEN, tmp_path / "run")
            file = tmp_path / "run" / "layers" / "003.safetensors"
            tensors = load_file(file)
            name = next(name for name in sorted(tensors) if name.endswith("hidden"))
            tensors[name][-1] *= 1.5
            save_file(tensors, file)
            nvfp4_agrees(tmp_path / "run", GOLDEN)
        """
    )

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["E*AssertionError: *: *", "E*part at layer 3, hidden, *"])
