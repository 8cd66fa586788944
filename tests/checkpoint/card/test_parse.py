import pytest

from nvfp4check.checkpoint.card.parse import parse_card
from nvfp4check.findings import CheckError


def test_front_matter_and_prose_are_told_apart() -> None:
    card = parse_card("---\nlicense: mit\ntags:\n- a\n- b\n---\n# Title\n", "README.md")

    assert card.strings("license") == ("mit",)
    assert card.strings("tags") == ("a", "b")
    assert card.prose == "# Title\n"


@pytest.mark.parametrize(
    "front",
    [
        "a: [",
        "- only\n- a list",
        "!!python/object/apply:os.system ['echo']",
        "a: &a [x, x]\nb: *a",
        "a: " + "[" * 5000,
        "when: 2024-99-99",
    ],
)
def test_hostile_front_matter_is_a_problem_and_nothing_more(front: str) -> None:
    card = parse_card(f"---\n{front}\n---\ntext\n", "README.md")

    assert card.front_matter == {}
    assert len(card.problems) == 1
    assert card.prose == "text\n"


def test_a_card_without_front_matter_says_so() -> None:
    assert parse_card("# Title\n", "README.md").problems == ("no front matter",)


def test_a_file_that_is_no_card_is_refused() -> None:
    with pytest.raises(CheckError, match="--card"):
        parse_card("x" * 1_000_001, "weights.bin")


def test_a_sentence_is_cut_out_of_its_line() -> None:
    card = parse_card("First one. The second says 1.6x here. Third.\n", "README.md")
    start = card.prose.index("1.6x")

    assert card.sentence(start, start + 4) == "The second says 1.6x here"
