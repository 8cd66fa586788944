import pytest
import torch

from nvfp4check.report.histograms import (
    code_counts,
    code_label,
    count_scale,
    scale_counts,
    scale_label,
    weight_plots,
)
from nvfp4ref import e2m1, e4m3


def test_every_codes_label_is_its_value() -> None:
    values = e2m1.decode(torch.arange(16, dtype=torch.uint8)).tolist()
    assert [float(code_label(code)) for code in range(16)] == values
    assert (code_label(0), code_label(8)) == ("0", "-0")


def test_every_scales_label_is_its_value_to_six_digits() -> None:
    for byte, value in enumerate(e4m3.decode(torch.arange(256, dtype=torch.uint8)).tolist()):
        expected = "NaN" if value != value else f"{value:.6g}"
        assert scale_label(byte) == expected


def test_codes_are_counted_by_value_from_the_least() -> None:
    counts = code_counts(range(16))
    assert list(counts) == sorted(counts, key=lambda label: (float(label), label[0] != "-"))
    assert (counts["-6"], counts["-0"], counts["0"], counts["6"]) == (15, 8, 0, 7)


def test_every_scale_byte_is_counted_in_the_row_of_its_power_of_two() -> None:
    values = e4m3.decode(torch.arange(256, dtype=torch.uint8)).tolist()
    for byte, value in enumerate(values):
        counts = [0] * 256
        counts[byte] = 1
        (row,) = (label for label, count in scale_counts(counts).items() if count)
        if value != value:
            assert row == "NaN"
        elif value == 0:
            assert row == "0"
        elif value < 0:
            assert row == "negative"
        else:
            low = 2.0 ** int(row.removeprefix("2**"))
            assert low <= value < 2 * low


def test_negative_and_nan_scales_widen_the_plot() -> None:
    sound = [0] * 256
    sound[0x78] = 5
    unsound = [*sound[:255], 1]
    assert [len(plot.bars) for plot in weight_plots(None, sound)] == [128]
    assert [len(plot.bars) for plot in weight_plots(None, unsound)] == [256]


def test_what_was_not_read_has_no_plot() -> None:
    assert weight_plots(None, None) == []


@pytest.mark.parametrize(
    ("tallest", "words"),
    [
        (0, []),
        (1, ["0", "1"]),
        (7, ["0", "2", "4", "6"]),
        (28, ["0", "10", "20"]),
        (40, ["0", "10", "20", "30", "40"]),
        (41, ["0", "20", "40"]),
        (81_000, ["0", "50 k"]),
        (35_000_000, ["0", "10 M", "20 M", "30 M"]),
        (123_456_789_012, ["0", "50 G", "100 G"]),
    ],
)
def test_a_scale_has_round_counts_that_stand_where_bars_of_that_height_end(
    tallest: int, words: list[str]
) -> None:
    scale = count_scale(tallest)

    assert [label for label, _ in scale] == words
    assert all(0 <= place <= 100 for _, place in scale)
    assert not scale or scale[0][1] == 100
