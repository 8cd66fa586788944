"""The measurement of dequantisation names what it ran, and compares only with others."""

import json

import pytest

from nvfp4check.bench import __main__ as bench


@pytest.mark.filterwarnings("ignore")  # of the imports of the others, where they are installed
def test_a_small_measurement_is_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "32", "--columns", "256", "--rounds", "1", "--format", "json"]

    assert bench.main(["dequantize", *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    speeds = document["gigabytes_per_second"]
    assert document["schema"] == "nvfp4check/bench-dequantize/1"
    assert {"copy", "nvfp4check nvfp4", "nvfp4check fp8"} <= set(speeds)
    others = [
        speed for name, speed in speeds.items() if name != "copy" and "nvfp4check" not in name
    ]
    assert (document["times_the_fastest_other"] is None) == (not others)


@pytest.mark.parametrize("arguments", [["--columns", "24"], ["--rounds", "0"]])
def test_a_shape_that_is_none_is_bad_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        bench.main(["dequantize", *arguments])

    assert ending.value.code == 2
