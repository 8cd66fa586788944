import math
from fractions import Fraction

import pytest

from nvfp4check.checkpoint.card.evaluation import (
    Chance,
    compare_scores,
    evaluations,
    mcnemar,
    wilson,
)
from nvfp4check.checkpoint.card.parse import parse_card


def _plain_mcnemar(difference: int, discordant: int) -> float:
    worse = [k for k in range(discordant + 1) if abs(2 * k - discordant) >= difference]
    return float(Fraction(sum(math.comb(discordant, k) for k in worse), 2**discordant))


@pytest.mark.parametrize("discordant", range(1, 25))
def test_mcnemar_is_the_share_of_coin_rows_that_differ_as_much(discordant: int) -> None:
    for difference in range(2 - discordant % 2, discordant + 1, 2):
        assert mcnemar(difference, discordant) == _plain_mcnemar(difference, discordant)


def test_wilson_of_a_published_example() -> None:
    # 15 of 148, Newcombe, Statistics in Medicine 17 (1998), table I: 0.0624 to 0.1605
    low, high = wilson(15, 148)

    assert (round(low / 100, 4), round(high / 100, 4)) == (0.0624, 0.1605)


def test_two_points_of_mmlu_pro_are_more_than_chance() -> None:
    assert compare_scores("MMLU-Pro", 85.0, 83.0, 0.05).verdict is Chance.BEYOND


def test_two_points_of_gpqa_are_chance() -> None:
    assert compare_scores("GPQA Diamond", 79, 77).verdict is Chance.WITHIN


def test_three_questions_of_aime_are_chance_however_they_pair() -> None:
    found = compare_scores("AIME 2025", 90, 80)

    assert found.questions == 30
    assert found.verdict is Chance.WITHIN


def test_a_middling_difference_depends_on_how_the_answers_pair() -> None:
    assert compare_scores("MATH-500", 90.0, 87.0, 0.05).verdict is Chance.OPEN


def test_a_benchmark_of_unknown_size_is_not_judged() -> None:
    assert compare_scores("Arena", 50, 40).verdict is Chance.UNKNOWN_SIZE


TABLE = """
| Precision | MMLU-Pro | GPQA Diamond |
| --- | --- | --- |
| FP8 (AA Ref) | 85 | 79 |
| FP4 | 83 | 77 |
"""
TURNED = """
| Benchmark | FP8 | NVFP4 |
|:--|--:|--:|
| MMLU-Pro | 85 | 83 |
| GPQA Diamond | 79 | 77 |
"""


@pytest.mark.parametrize("text", [TABLE, TURNED])
def test_a_table_is_read_either_way_round(text: str) -> None:
    found = evaluations(parse_card(text, "README.md"))

    assert [(score.benchmark, score.original, score.quantized) for score in found] == [
        ("MMLU-Pro", 85, 83),
        ("GPQA Diamond", 79, 77),
    ]


def test_a_table_of_something_else_is_left_alone() -> None:
    text = "| a | b |\n|---|---|\n| FP8 | x |\n| FP4 | y |\n"

    assert evaluations(parse_card(text, "README.md")) == ()
