"""The exhaustive run, thinned; and that it sees a planted fault."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvfp4check.bench import __main__ as bench
from nvfp4check.bench import exhaustive
from nvfp4ref import e2m1, e4m3

pytest.importorskip("ml_dtypes")

#: A prime, so that every low bit pattern of the mantissa occurs.
STRIDE = 65537


def test_every_65537th_float32_is_cast_as_others_cast_it() -> None:
    outcome = exhaustive.check(0, exhaustive.ALL_VALUES, STRIDE)

    assert outcome.differences == 0
    values = {name: comparison.values for name, comparison in outcome.comparisons.items()}
    assert values.pop("e2m1") == 65536 - 2 * 128  # but for NaN, one in 256 of all
    assert set(values.values()) == {65536}


def test_the_surroundings_of_every_midpoint_are_cast_as_others_cast_them() -> None:
    for middle in {*e2m1.MIDPOINTS, *e4m3.MIDPOINTS}:
        bits = int(torch.tensor(middle).view(torch.int32))
        for sign in (0, 1 << 31):
            assert exhaustive.check(sign + bits - 8, sign + bits + 9).differences == 0


def test_a_range_in_parts_is_the_whole_range() -> None:
    start, stop = 0x43E00000, 0x43F00000
    whole, parts = exhaustive.check(start, stop, 257), exhaustive.Outcome()
    middle = start + 257 * 1000
    parts.merge(exhaustive.check(start, middle, 257))
    parts.merge(exhaustive.check(middle, stop, 257))

    assert parts == whole


@pytest.fixture
def faulty_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round ties of E2M1 away from zero: wrong at 0.25, 1.25, 2.5 and 5 only."""
    encode = e2m1.encode

    def away(values: torch.Tensor) -> torch.Tensor:
        return encode(torch.where(values == 1.25, 1.3, values))

    monkeypatch.setattr(e2m1, "encode", away)


@pytest.mark.usefixtures("faulty_ties")
def test_one_wrong_value_is_seen_and_named() -> None:
    outcome = exhaustive.check(0x3F9F0000, 0x3FA10000)

    assert outcome.differences == 1
    assert outcome.comparisons["e2m1"].first == exhaustive.Difference(0x3FA00000, 3, 2)
    assert exhaustive.to_json(outcome, 1.0)["verdict"] == "fail"
    assert "float32 0x3fa00000: reference 0x03, other 0x02" in exhaustive.to_text(outcome, 1.0)


@pytest.mark.usefixtures("faulty_ties")
def test_a_difference_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["exhaustive", "--start", "0x3F9F0000", "--stop", "0x3FA10000", "--jobs", "1"]

    assert bench.main([*arguments, "--format", "json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["comparisons"][0]["first"]["bits"] == "0x3fa00000"


def test_equality_is_exit_code_0_and_one_json_document(tmp_path: Path) -> None:
    output = tmp_path / "outcome.json"
    command = [sys.executable, "-m", "nvfp4check.bench", "exhaustive", "--stride", "1000003"]

    result = subprocess.run(
        [*command, "--jobs", "2", "--format", "json", "--output", output],
        capture_output=True,
        text=True,
    )

    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    document = json.loads(output.read_text())
    assert document["schema"] == "nvfp4check/bench-exhaustive/1"
    assert document["verdict"] == "pass"
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]


def test_a_missing_oracle_is_exit_code_2_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)

    assert bench.main(["exhaustive", "--stop", "16", "--jobs", "1"]) == 2
    assert "pip install 'nvfp4check[oracles]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--start", "5", "--stop", "5"],
        ["--stop", "0x100000001"],
        ["--start", "-1"],
        ["--stride", "0"],
        ["--jobs", "0"],
        ["--start", "one"],
    ],
)
def test_a_range_that_is_none_is_bad_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        bench.main(["exhaustive", *arguments])

    assert ending.value.code == 2


def test_the_dispatcher_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--help"]) == 0
    listing = capsys.readouterr().out
    assert all(name in listing for name in bench.BENCHES)
    assert bench.main(["nothing"]) == 2
    assert "exhaustive" in capsys.readouterr().err


def test_listing_the_measurements_loads_no_torch() -> None:
    code = "import sys; from nvfp4check.bench.__main__ import main; main(['-h']); " + (
        "sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
