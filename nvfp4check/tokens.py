"""Prompts: where they come from, and the tokens they become.

A prompts file has one JSON object a line, `{"id": …, "text": …}` or `{"id": …, "tokens": […]}`.
Text becomes tokens by the checkpoint's own tokenizer.json; the begin-of-sequence token goes first
where tokenizer_config.json says `add_bos_token` and the tokenizer has not put it there itself.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvfp4check.activations import TOP_PARTS
from nvfp4check.checkpoint.documents import MAX_JSON_BYTES
from nvfp4check.checkpoint.storage import Storage, StorageError
from nvfp4check.findings import CheckError

#: The prompts of the model card of nvidia/DeepSeek-V3.1-NVFP4.
MODEL_CARD_PROMPTS = (
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
)

#: A key of every safetensors file that is no tensor.
_RESERVED = "__metadata__"

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as it was given: text, tokens, or both."""

    id: str
    text: str | None = None
    tokens: tuple[int, ...] | None = None


def prompts_of_texts(texts: Sequence[str]) -> list[Prompt]:
    """Return texts as prompts, with the ids prompt0, prompt1 and so on."""
    return [Prompt(id=f"prompt{i}", text=text) for i, text in enumerate(texts)]


def read_prompts(file: str | Path) -> list[Prompt]:
    """Return the prompts of a file.

    Raises:
        CheckError: The file cannot be read, or a line is not a prompt; the message says which.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckError(f"{file}: cannot be read as prompts: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(_prompt(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise CheckError(
                    f"{file}, line {number}: {error}; a line is "
                    '{"id": "a", "text": "…"} or {"id": "a", "tokens": [0, 17]}'
                ) from error
    check_prompts(prompts, str(file))
    return prompts


def _prompt(document: Any) -> Prompt:
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    name, text, tokens = (document.get(key) for key in ("id", "text", "tokens"))
    if not isinstance(name, str) or not name:
        raise ValueError(f"id {name!r} is not a name")
    if text is not None and not isinstance(text, str):
        raise ValueError("text is not a string")
    if tokens is not None:
        if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
            raise ValueError("tokens is not a list of whole numbers")
        tokens = tuple(tokens)
    if text is None and tokens is None:
        raise ValueError("neither text nor tokens")
    return Prompt(id=name, text=text, tokens=tokens)


def check_prompts(prompts: Sequence[Prompt], where: str) -> None:
    """Refuse an empty list, ids that cannot name tensors in one file, and text that is none.

    Raises:
        CheckError: So it is.
    """
    if not prompts:
        raise CheckError(f"{where}: no prompts")
    seen: set[str] = set()
    for prompt in prompts:
        for what, text in (("id", prompt.id), ("text", prompt.text or "")):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise CheckError(f"{where}: {what} {text!r} holds half a character; give UTF-8")
        if prompt.id == _RESERVED:
            raise CheckError(f"{where}: prompt id {prompt.id!r} has a meaning in files; rename it")
        if prompt.id in seen:
            raise CheckError(f"{where}: prompt id {prompt.id!r} occurs twice; ids must differ")
        seen.add(prompt.id)
    for prompt in prompts:
        before, slash, last = prompt.id.rpartition("/")
        if slash and last in TOP_PARTS and before in seen:
            raise CheckError(
                f"{where}: prompt id {prompt.id!r} is what best logits of {before!r} are called; "
                "rename one of them"
            )


def tokenize(prompts: Sequence[Prompt], storage: Storage, vocab_size: int) -> list[Prompt]:
    """Return the prompts with tokens; those that came with tokens keep them.

    Raises:
        CheckError: Text without a tokenizer, tokens outside the vocabulary, or ids that cannot be.
    """
    check_prompts(prompts, "prompts")
    if any(prompt.tokens is None for prompt in prompts):
        encode = _encoder(storage)
        prompts = [
            prompt if prompt.tokens is not None else _encoded(prompt, encode(prompt.text or ""))
            for prompt in prompts
        ]
    for prompt in prompts:
        tokens = prompt.tokens or ()
        if not tokens:
            raise CheckError(f"prompt {prompt.id!r} has no tokens")
        outside = [token for token in tokens if not 0 <= token < vocab_size]
        if outside:
            raise CheckError(
                f"prompt {prompt.id!r}: token {outside[0]} is not in the vocabulary of {vocab_size}"
            )
    return list(prompts)


def _encoded(prompt: Prompt, tokens: list[int]) -> Prompt:
    return Prompt(id=prompt.id, text=prompt.text, tokens=tuple(tokens))


def load_tokenizer(storage: Storage) -> Any:
    """Return the tokenizer of a checkpoint.

    Raises:
        CheckError: It has none, or none that can be read, or the library is not installed.
    """
    if TOKENIZER_FILE not in storage.list():
        raise CheckError(
            f"{storage.location}: no {TOKENIZER_FILE}, so text cannot become tokens; "
            "give prompts with tokens"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise CheckError(
            "text prompts need the tokenizers package: pip install tokenizers, "
            "or give prompts with tokens"
        ) from None
    source = _read(storage, TOKENIZER_FILE)
    try:
        return Tokenizer.from_str(source)
    except Exception as error:  # the library raises bare Exception for a bad file
        raise CheckError(f"{storage.location}/{TOKENIZER_FILE}: {error}") from error


def _encoder(storage: Storage) -> Any:
    """Return a function from text to tokens, from the tokenizer of a checkpoint."""
    tokenizer, begin = load_tokenizer(storage), _begin_token(storage)

    def encode(text: str) -> list[int]:
        try:
            tokens: list[int] = tokenizer.encode(text).ids
        except Exception as error:  # the same: a vocabulary without its word for the unknown
            raise CheckError(f"{storage.location}/{TOKENIZER_FILE}: {error}") from error
        first = None if begin is None else tokenizer.token_to_id(begin)
        return tokens if first is None or tokens[:1] == [first] else [first, *tokens]

    return encode


def _begin_token(storage: Storage) -> str | None:
    """Return the token that every prompt begins with, if the tokenizer's configuration has one."""
    if TOKENIZER_CONFIG_FILE not in storage.list():
        return None
    try:
        config = json.loads(_read(storage, TOKENIZER_CONFIG_FILE))
    except (ValueError, RecursionError) as error:
        raise CheckError(f"{storage.location}/{TOKENIZER_CONFIG_FILE}: {error}") from error
    if not isinstance(config, dict):
        raise CheckError(f"{storage.location}/{TOKENIZER_CONFIG_FILE}: no JSON object")
    if not config.get("add_bos_token"):
        return None
    token = config.get("bos_token")
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read(storage: Storage, name: str) -> str:
    size = storage.list()[name]
    if size > MAX_JSON_BYTES:
        raise CheckError(
            f"{storage.location}/{name}: {size:,} bytes, expected at most {MAX_JSON_BYTES:,}"
        )
    try:
        return storage.read(name, 0, size).decode("utf-8")
    except (StorageError, UnicodeDecodeError) as error:
        raise CheckError(f"{storage.location}/{name}: {error}") from error
