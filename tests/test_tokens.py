"""Prompts files and their tokens."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nvfp4check.checkpoint.storage import LocalStorage
from nvfp4check.findings import CheckError
from nvfp4check.tokens import (
    MODEL_CARD_PROMPTS,
    Prompt,
    check_prompts,
    prompts_of_texts,
    read_prompts,
    tokenize,
)

TINY = Path(__file__).parents[1] / "goldens" / "tiny-deepseek-v3"


def test_a_prompts_file_has_texts_and_tokens(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"id": "a", "text": "one\u2028line"}\n\n{"id": "b", "tokens": [0, 17]}\n', encoding="utf-8"
    )

    assert read_prompts(file) == [
        Prompt(id="a", text="one\u2028line"),
        Prompt(id="b", tokens=(0, 17)),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[1]", "not a JSON object"),
        ('{"text": "x"}', "id None is not a name"),
        ('{"id": "", "text": "x"}', "id '' is not a name"),
        ('{"id": "b"}', "neither text nor tokens"),
        ('{"id": "b", "text": 5}', "text is not a string"),
        ('{"id": "b", "tokens": [1, true]}', "tokens is not a list of whole numbers"),
        ('{"id": "a", "tokens": [1]}', "'a' occurs twice"),
        ('{"id": "b", "tokens": ' + "[" * 100_000, "line 2"),
        ('{"id": "__metadata__", "tokens": [1]}', "'__metadata__' has a meaning in files"),
        ('{"id": "a/values", "tokens": [1]}', "'a/values' is what best logits of 'a' are called"),
        (r'{"id": "\ud800", "tokens": [1]}', r"id '\\ud800' holds half a character"),
        (r'{"id": "b", "text": "x\udcff"}', r"text 'x\\udcff' holds half a character"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "a", "text": "x"}\n' + line)

    with pytest.raises(CheckError, match=message):
        read_prompts(file)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "a", "tokens": [1]}', encoding="utf-8-sig")

    assert read_prompts(file) == [Prompt(id="a", tokens=(1,))]


def test_prompts_that_come_by_another_way_are_looked_at_too(tmp_path: Path) -> None:
    twice = [Prompt(id="a", tokens=(1,)), Prompt(id="a", tokens=(2,))]
    with pytest.raises(CheckError, match="occurs twice"):
        tokenize(twice, LocalStorage(tmp_path), 10)


def test_no_prompts_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="no prompts"):
        check_prompts([], "here")
    with pytest.raises(CheckError, match="cannot be read as prompts"):
        read_prompts(tmp_path / "nowhere")


class TestTokenizer:
    """The tiny checkpoint's own tokenizer."""

    @pytest.fixture(autouse=True)
    def tokenizers(self) -> None:
        pytest.importorskip("tokenizers")

    def test_the_model_cards_prompts_become_the_recorded_tokens(self) -> None:
        recorded = load_file(TINY / "activations" / "transformers-float32" / "tokens.safetensors")

        prompts = tokenize(prompts_of_texts(MODEL_CARD_PROMPTS), LocalStorage(TINY / "bf16"), 1024)

        for prompt in prompts:
            assert list(prompt.tokens or ()) == recorded[prompt.id].tolist()

    def test_the_begin_token_goes_first_where_only_the_configuration_asks_for_it(
        self, tmp_path: Path
    ) -> None:
        """DeepSeek-V3's tokenizer.json leaves it to `add_bos_token`."""
        tokenizer = json.loads((TINY / "bf16" / "tokenizer.json").read_text())
        tokenizer["post_processor"] = None
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        text = [Prompt(id="p", text="Hello")]

        without = tokenize(text, LocalStorage(tmp_path), 1024)[0].tokens or ()
        shutil.copy(TINY / "bf16" / "tokenizer_config.json", tmp_path)
        with_it = tokenize(text, LocalStorage(tmp_path), 1024)[0].tokens or ()

        assert with_it == (0, *without)

    @pytest.mark.parametrize("config", ["[]", "{", "[" * 100_000])
    def test_a_broken_configuration_is_refused(self, config: str, tmp_path: Path) -> None:
        shutil.copy(TINY / "bf16" / "tokenizer.json", tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(config)

        with pytest.raises(CheckError, match=r"tokenizer_config\.json: "):
            tokenize([Prompt(id="p", text="x")], LocalStorage(tmp_path), 1024)

    def test_a_broken_tokenizer_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text('{"model": 7}')

        with pytest.raises(CheckError, match=r"tokenizer\.json"):
            tokenize([Prompt(id="p", text="x")], LocalStorage(tmp_path), 1024)


def test_a_tokenizer_without_its_own_word_for_the_unknown_is_refused(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(CheckError, match=r"tokenizer\.json: .*UNK"):
        tokenize(prompts_of_texts(["b"]), LocalStorage(tmp_path), 10)


def test_text_without_a_tokenizer_is_refused_and_tokens_need_none(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)

    with pytest.raises(CheckError, match="give prompts with tokens"):
        tokenize([Prompt(id="p", text="x")], storage, 10)
    assert tokenize([Prompt(id="p", tokens=(9,))], storage, 10)[0].tokens == (9,)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [((), "no tokens"), ((10,), "not in the vocabulary"), ((-1,), "token -1")],
)
def test_tokens_outside_the_vocabulary_are_refused(
    tokens: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckError, match=message):
        tokenize([Prompt(id="p", tokens=tokens)], LocalStorage(tmp_path), 10)
