"""Whether a difference of benchmark scores is more than chance, given how many questions there are.

n questions, a answered rightly by the original and b by the quantised model.

Contract:
    interval   Wilson's score interval at 95 % for each share
    paired     both models answer the same questions, so only those count that one answers and the
               other does not: discordant ones. A table does not tell how many; it is between
               |a - b| and |a - b| + 2 min(a, b, n - a, n - b). The exact McNemar test at both
               ends bounds its p-value
    verdict    beyond chance when the largest p is below 5 %; within chance when the smallest is
               not; otherwise the table cannot tell
    rounding   a score printed to a digit may be half a digit off: the difference is taken at its
               least for the largest p and at its most for the smallest

Averages over several runs narrow the noise of sampling answers, never that of choosing questions,
which is what is bounded here.
"""

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

from nvfp4check.checkpoint.card.parse import Card, Table

#: Significance of the test, and of the intervals.
ALPHA = 0.05

#: Questions of each benchmark, by its name without case, spaces and marks, and where that stands.
QUESTIONS = {
    "mmlupro": (12_032, "TIGER-Lab/MMLU-Pro, test split"),
    "mmlu": (14_042, "cais/mmlu, test split"),
    "gpqadiamond": (198, "Idavidrein/gpqa, diamond subset"),
    "livecodebench": (
        315,
        "2024-07 to 2025-01, as Artificial Analysis runs it; other windows vary",
    ),
    "scicode": (338, "sub-problems of 80 problems; Artificial Analysis uses 288 of them"),
    "aime2024": (30, "two papers of 15 problems"),
    "aime2025": (30, "two papers of 15 problems"),
    "math500": (500, "HuggingFaceH4/MATH-500"),
    "gsm8k": (1_319, "openai/gsm8k, test split"),
    "humaneval": (164, "openai/openai_humaneval"),
    "ifeval": (541, "google/IFEval"),
}


class Chance(StrEnum):
    """What a table can say of a difference."""

    WITHIN = "within chance"
    BEYOND = "beyond chance"
    OPEN = "the table cannot tell"
    UNKNOWN_SIZE = "number of questions not known"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreComparison:
    """One benchmark, the original's score against the quantised model's, in percent."""

    benchmark: str
    original: float
    quantized: float
    questions: int | None = None
    source: str | None = None
    interval_original: tuple[float, float] | None = None
    interval_quantized: tuple[float, float] | None = None
    #: McNemar's p with the fewest and with the most discordant questions.
    p_smallest: float | None = None
    p_largest: float | None = None
    verdict: Chance = Chance.UNKNOWN_SIZE

    @property
    def difference(self) -> float:
        """Points gained by quantising; negative where it lost."""
        return self.quantized - self.original


def evaluations(card: Card) -> tuple[ScoreComparison, ...]:
    """Compare every benchmark of the card's tables that has a higher- and a 4-bit-precision row."""
    return tuple(found for table in card.tables for found in _compare_table(_upright(table)))


def compare_scores(
    benchmark: str, original: float, quantized: float, half_digit: float = 0.5
) -> ScoreComparison:
    """Compare two scores in percent, each printed to plus or minus `half_digit`."""
    known = QUESTIONS.get(re.sub(r"[^a-z0-9]", "", benchmark.lower()))
    in_range = 0 <= original <= 100 and 0 <= quantized <= 100
    if known is None or not in_range:
        return ScoreComparison(benchmark=benchmark, original=original, quantized=quantized)
    questions, source = known
    right = [round(questions * score / 100) for score in (original, quantized)]
    slack = math.floor(2 * half_digit / 100 * questions)  # both scores rounded, opposite ways
    least = max(0, abs(right[0] - right[1]) - slack)
    most = min(questions, abs(right[0] - right[1]) + slack)
    p_smallest = mcnemar(most, most)
    shared = 2 * min(*right, questions - right[0], questions - right[1])
    p_largest = mcnemar(least, min(questions, least + shared))
    if p_largest < ALPHA:
        verdict = Chance.BEYOND
    else:
        verdict = Chance.OPEN if p_smallest < ALPHA else Chance.WITHIN
    return ScoreComparison(
        benchmark=benchmark,
        original=original,
        quantized=quantized,
        questions=questions,
        source=source,
        interval_original=wilson(right[0], questions),
        interval_quantized=wilson(right[1], questions),
        p_smallest=p_smallest,
        p_largest=p_largest,
        verdict=verdict,
    )


def wilson(right: int, questions: int) -> tuple[float, float]:
    """Return Wilson's score interval of a share, in percent."""
    z = NormalDist().inv_cdf(1 - ALPHA / 2)
    share = right / questions
    centre = (share + z * z / (2 * questions)) / (1 + z * z / questions)
    spread = math.sqrt(share * (1 - share) / questions + z * z / (4 * questions**2))
    half = z * spread / (1 + z * z / questions)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def mcnemar(difference: int, discordant: int) -> float:
    """Return the exact two-sided p of `discordant` fair coins that differ by `difference` or more.

    A difference of the other parity than the coins' number is taken as one less.
    """
    if difference <= 0 or discordant == 0:
        return 1.0
    fewer = (discordant - difference + 1) // 2
    tail = term = 1
    for heads in range(1, fewer + 1):
        term = term * (discordant - heads + 1) // heads
        tail += term
    return min(1.0, float(2 * tail / (1 << discordant)))


def _upright(table: Table) -> Table:
    """Return the table with precisions as rows: cards print it either way."""
    if _precision(table.head[1:]) is None:
        return table
    width = min(len(table.head), *(len(row) for row in table.rows)) if table.rows else 0
    lines = (table.head, *table.rows)
    turned = [tuple(line[column] for line in lines) for column in range(width)]
    return Table(turned[0], tuple(turned[1:])) if turned else table


def _precision(names: tuple[str, ...]) -> tuple[int, int] | None:
    """Return the places of the original's and of the 4-bit precision among names."""
    quantized = [i for i, name in enumerate(names) if re.search(r"\b(NV)?FP4\b", name, re.I)]
    original = [i for i, name in enumerate(names) if re.search(r"\b(FP8|BF16|FP16)\b", name, re.I)]
    return (original[0], quantized[0]) if quantized and original else None


def _compare_table(table: Table) -> list[ScoreComparison]:
    places = _precision(tuple(row[0] if row else "" for row in table.rows))
    if places is None:
        return []
    original, quantized = (table.rows[place] for place in places)
    found = []
    for benchmark, first, second in list(zip(table.head, original, quantized, strict=False))[1:]:
        numbers = [re.fullmatch(r"(\d{1,3})(\.\d+)?\s*%?", cell) for cell in (first, second)]
        if None not in numbers:
            digits = min(len(n.group(2) or ".") - 1 for n in numbers if n)
            scores = [float(n.group(1) + (n.group(2) or "")) for n in numbers if n]
            found.append(compare_scores(benchmark, scores[0], scores[1], 0.5 / 10**digits))
    return found
