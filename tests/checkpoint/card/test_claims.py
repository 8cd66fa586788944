from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvfp4check.checkpoint.card.claims import Answer
from nvfp4check.checkpoint.card.parse import parse_card
from nvfp4check.checkpoint.card.review import CardReview, review
from nvfp4check.checkpoint.opening import Checkpoint, open_checkpoint


@pytest.fixture(scope="module")
def card_text(goldens: Path) -> str:
    return (goldens / "model_card.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def checkpoint(golden: SimpleNamespace) -> Checkpoint:
    return open_checkpoint(golden.nvfp4)


@pytest.fixture
def answer(card_text: str, checkpoint: Checkpoint) -> Callable[..., Answer]:
    """Answer to one topic after the card's text was changed."""

    def ask(topic: str, old: str = "", new: str = "") -> Answer:
        assert old in card_text
        changed = parse_card(card_text.replace(old, new), "README.md")
        answers = {c.answer for c in review(changed, checkpoint).claims if c.topic == topic}
        return Answer.CONTRADICTED if Answer.CONTRADICTED in answers else answers.pop()

    return ask


@pytest.fixture(scope="module")
def published(card_text: str, checkpoint: Checkpoint) -> CardReview:
    return review(parse_card(card_text, "README.md"), checkpoint)


@pytest.mark.parametrize("topic", ["architecture", "producer", "producer version", "sampling"])
def test_a_true_statement_is_confirmed(answer: Callable[..., Answer], topic: str) -> None:
    assert answer(topic) is Answer.CONFIRMED


@pytest.mark.parametrize(
    ("topic", "old", "new"),
    [
        ("architecture", "Architecture:** DeepseekV3ForCausalLM", "Architecture:** LlamaFor"),
        ("producer", "quantized with [TensorRT Model Optimizer]", "quantized with llm-compressor"),
        ("producer version", "v0.39.0", "v0.40.0"),
        ("licence", "license: mit", "license: apache-2.0"),
        ("base model", "deepseek-ai/DeepSeek-V3.1\nlicense", "x/Some-Other-Model\nlicense"),
        ("tags", "- NVFP4\n- nvfp4", "- awq"),
        ("sampling", "range of 0.5-0.7", "range of 0.9-1.0"),
    ],
)
def test_a_statement_that_the_files_contradict_is_found(
    answer: Callable[..., Answer], topic: str, old: str, new: str
) -> None:
    assert answer(topic, old, new) is Answer.CONTRADICTED


def test_attention_left_unquantised_qualifies_the_statement_on_operators(
    published: CardReview,
) -> None:
    (claim,) = (c for c in published.claims if c.topic == "operators")

    assert claim.answer is Answer.QUALIFIED
    assert "5 self_attn.q_a_proj" in claim.evidence
    assert "mlp.experts.*.down_proj" not in claim.evidence


def test_the_size_ratio_is_computed_from_both_checkpoints(
    card_text: str, checkpoint: Checkpoint, golden: SimpleNamespace
) -> None:
    base = open_checkpoint(golden.fp8)
    true_ratio = f"{base.nbytes / checkpoint.nbytes:.1f}"
    for stated, expected in (("1.6", Answer.CONTRADICTED), (true_ratio, Answer.CONFIRMED)):
        card = parse_card(card_text.replace("1.6x", f"{stated}x"), "README.md")
        (claim,) = (c for c in review(card, checkpoint, base).claims if c.topic == "size ratio")
        assert claim.answer is expected


def test_the_usage_that_loads_another_repository_is_found(published: CardReview) -> None:
    (claim,) = (c for c in published.claims if c.topic == "repository")

    assert claim.answer is Answer.CONTRADICTED
    assert "nvidia/DeepSeek-V3.1-NVFP4" in claim.evidence


def test_what_the_card_leaves_unsaid_is_listed(published: CardReview, card_text: str) -> None:
    assert any("KV cache" in gap and "FP8" in gap for gap in published.unsaid)
    assert any("multi-token" in gap for gap in published.unsaid)
    assert any("q_a_proj" in gap for gap in published.unsaid)


def test_what_the_card_says_is_not_listed_as_unsaid(card_text: str, checkpoint: Checkpoint) -> None:
    said = card_text + "\nThe KV cache is FP8; the MTP layer and the attention stay in BF16.\n"

    gaps = review(parse_card(said, "README.md"), checkpoint).unsaid

    assert not [gap for gap in gaps if "KV cache" in gap or "multi-token" in gap]
    assert not [gap for gap in gaps if "q_a_proj" in gap]


def test_an_empty_card_claims_nothing(checkpoint: Checkpoint) -> None:
    found = review(parse_card("", "README.md"), checkpoint)

    assert found.claims == found.evaluation == ()
