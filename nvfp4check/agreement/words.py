"""The text of tokens, by the tokenizer of a run's checkpoint, where there is one."""

from typing import Any, Self

from nvfp4check.activations import Run
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.findings import CheckError
from nvfp4check.tokens import TOKENIZER_FILE

#: Tokens before a position that are shown with it.
BEFORE = 12


class Words:
    """Gives the text of tokens; their numbers where there is no tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, *runs: Run) -> Self:
        """Return the words of the first run whose checkpoint has a tokenizer that can be read."""
        for run in runs:
            location = run.info.checkpoint.get("location")
            tokenizer = _load(str(location)) if location else None
            if tokenizer is not None:
                return cls(tokenizer)
        return cls(None)

    def token(self, token: int) -> dict[str, Any]:
        """Return a token and its text."""
        return {"token": token, "text": self._text([token])}

    def at(self, run: Run, prompt: str, position: int) -> str | None:
        """Return the text of a prompt's token."""
        return self._text(run.tokens(prompt)[position : position + 1].tolist())

    def before(self, run: Run, prompt: str, position: int) -> str | None:
        """Return the text up to and with a position, cut to the last tokens of it."""
        first = max(0, position + 1 - BEFORE)
        return self._text(run.tokens(prompt)[first : position + 1].tolist())

    def _text(self, tokens: list[int]) -> str | None:
        if self._tokenizer is None or any(token < 0 for token in tokens):
            return None
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))


def _load(location: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    try:
        storage = open_checkpoint(location).storage
        if TOKENIZER_FILE not in storage.list():
            return None
        source = storage.read(TOKENIZER_FILE, 0, storage.list()[TOKENIZER_FILE])
        return Tokenizer.from_str(source.decode("utf-8"))
    except (CheckError, StorageError, UnicodeDecodeError):
        return None  # the checkpoint has moved: the report shows numbers
    except Exception:  # the library raises bare Exception for a bad file
        return None
