"""Suites in a user's project: collected, passed, failed with words, skipped, run in parallel."""

import pytest

pytest_plugins = ("pytester",)

GOOD = """
    from nvfp4check.suites import SwizzleSuite
    from nvfp4ref.layout import swizzle

    class TestMine(SwizzleSuite):
        def kernel(self, block_scales):
            return swizzle(block_scales)
"""

DEADLY = """
    import os
    from nvfp4check.suites import SwizzleSuite
    from nvfp4ref.layout import swizzle

    class TestMine(SwizzleSuite):
        def kernel(self, block_scales):
            if block_scales.shape[0] == 129:
                os._exit(5)
            return swizzle(block_scales)
"""

LOST = """
    from nvfp4check import suites
    from nvfp4ref.layout import swizzle

    suites.context_lost = lambda device: True

    class TestMine(suites.SwizzleSuite):
        def kernel(self, block_scales):
            return swizzle(block_scales)
"""

WRONG = """
    import torch
    from nvfp4check.suites import QuantizeSuite
    from nvfp4ref.nvfp4 import quantize

    class TestMine(QuantizeSuite):
        convention = "modelopt"

        def kernel(self, x, global_decode_scale):
            codes, scales = quantize(x, global_decode_scale, "modelopt")
            return (codes >> 4) | (codes << 4), scales
"""


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


def test_one_test_a_property_with_a_readable_id(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_mine=GOOD)

    result = run(pytester, "-v")

    result.assert_outcomes(passed=7)
    result.stdout.fnmatch_lines(["*test_mine.py::TestMine::test_every_shape PASSED*"])


def test_a_failure_prints_one_block_in_hex_and_both_codes(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_mine=WRONG)

    result = run(pytester, "-k", "test_one_hot_elements")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "quantize: a single live element lands in its own nibble, byte and block",
            "codes differ: 2 of 16*actual against expected",
            "  first   [[]0, 0[]]*0x00 (0)   0x07 (7)",
            "  x = bfloat16[[]1, 16[]] bits 40c0 0000*",
            "(seed 0, device cpu, convention modelopt)",
        ]
    )


def test_under_xdist_a_kernel_that_ends_its_process_fails_the_test_under_way(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(test_mine=DEADLY)

    result = run(pytester, "-n", "1", "-k", "every_shape or round_trips")

    assert result.parseoutcomes()["failed"] == 1
    assert result.parseoutcomes()["passed"] >= 1
    result.stdout.fnmatch_lines(["*crashed while running*TestMine::test_every_shape*"])


def test_after_an_error_that_the_gpu_keeps_a_test_says_that_it_was_not_asked(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(test_mine=LOST)

    result = run(pytester, "-k", "every_shape")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["not asked: an earlier test left the GPU in error*"])


def test_suites_run_under_xdist(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_mine=GOOD)

    run(pytester, "-n", "2").assert_outcomes(passed=7)


def test_the_base_class_itself_is_not_collected(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_mine="from nvfp4check.suites import *")

    assert run(pytester).ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_suite_without_a_kernel_says_what_to_define(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_mine="""
        from nvfp4check.suites import RopeSuite

        class TestMine(RopeSuite):
            pass
        """
    )

    result = run(pytester, "-k", "lengths")

    result.stdout.fnmatch_lines(["*define kernel(self, ...)*rope(x, positions, config)*"])


def test_unsupported_cases_are_counted_and_a_law_without_others_is_skipped(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        test_mine="""
        from nvfp4check.suites import SwizzleSuite, UnsupportedError
        from nvfp4ref.layout import swizzle

        class TestMine(SwizzleSuite):
            def kernel(self, block_scales):
                if block_scales.shape[0] > 4:
                    raise UnsupportedError("four rows at most")
                return swizzle(block_scales)
        """
    )

    result = run(pytester, "-rs")

    assert result.parseoutcomes()["passed"] == 1
    assert result.parseoutcomes()["skipped"] == 6
    result.stdout.fnmatch_lines(["*SKIPPED*four rows at most*"])


def test_a_test_that_is_set_to_none_is_left_out(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_mine=f"{GOOD}\n        test_every_shape = None\n")

    run(pytester).assert_outcomes(passed=6)


def test_an_error_of_the_kernel_is_a_failure_with_its_place(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_mine="""
        from nvfp4check.suites import SwizzleSuite

        class TestMine(SwizzleSuite):
            def kernel(self, block_scales):
                return block_scales.no_such_method()
        """
    )

    result = run(pytester, "-k", "round_trips")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["raised AttributeError:*no_such_method*test_mine.py:5)"])


def test_declared_facts_widen_what_is_allowed(pytester: pytest.Pytester) -> None:
    source = """
        import torch
        from nvfp4check.suites import MatmulSuite
        from nvfp4ref.matmul import Accumulation, matmul

        class TestMine(MatmulSuite):
            {facts}

            def kernel(self, *arguments):
                order = Accumulation(chunk=16, dtype=torch.bfloat16)
                return matmul(*arguments, order=order)
    """
    law = "test_all_scales_within_the_bound"
    pytester.makepyfile(test_silent=source.format(facts="pass"))
    pytester.makepyfile(test_declared=source.format(facts="accumulator = 'bfloat16'"))

    run(pytester, "test_silent.py", "-k", law).assert_outcomes(failed=1)
    run(pytester, "test_declared.py", "-k", law).assert_outcomes(passed=1)


def test_the_number_of_examples_and_the_seed_are_options(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_mine="""
        from nvfp4check.suites import DequantizeSuite
        from nvfp4ref.nvfp4 import dequantize

        calls = 0

        class TestMine(DequantizeSuite):
            def kernel(self, *arguments):
                global calls
                calls += 1
                return dequantize(*arguments)

        def test_calls():
            assert calls == 3
        """
    )

    result = run(
        pytester, "-k", "any_operand or calls", "--nvfp4-max-examples", "3", "--nvfp4-seed", "5"
    )

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["nvfp4: seed 5, device cpu"])
