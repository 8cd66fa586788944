"""How each server is asked for the log-probabilities of given tokens, and how it answers.

    vllm      /v1/completions with prompt_logprobs: token ids, the whole prompt in one request
    sglang    /generate with input_ids and logprob_start_len 0: likewise
    openai    /v1/completions with echo and logprobs: token_id:N or the tokens' texts
    stepwise  /v1/completions with logprobs, one request for each prefix: for servers that tell the
              log-probabilities of what they generate and not of the prompt
    trtllm    stepwise: TensorRT-LLM's trtllm-serve echoes the text of a prompt, not its numbers
    llamacpp  stepwise, with token ids, and a plain letter forced as what is generated

Each gives, for position i, the distribution of the token after token i: the rows of a prompt and,
for the last one, that of the token the server would generate.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from nvfp4check.findings import CheckError
from nvfp4check.logprobs.client import Client

#: Log-probability by token id.
Distribution = dict[int, float]

#: From a token's text to its id; None where the text is that of no or of several tokens.
TokenOfText = Callable[[str], int | None]

_TOKEN_ID = "token_id:"

#: Text that is one token of any vocabulary and a whole character.
_LETTER = "a"

#: Ids of tokens are kept as int32.
_MOST_TOKENS = 1 << 31

#: A sum of probabilities may exceed 1 by rounding: 2,000 terms, each off by 2**-24.
_SUM_SLACK = 2000 * 2.0**-24


class Server(StrEnum):
    """What kind of server it is."""

    VLLM = "vllm"
    SGLANG = "sglang"
    TRTLLM = "trtllm"
    LLAMACPP = "llamacpp"
    OPENAI = "openai"
    STEPWISE = "stepwise"


def detect(client: Client, model: str) -> Server:
    """Return the kind of server by what it says of its models.

    SGLang and llama.cpp answer under any model's name, so the name is looked up here.

    Raises:
        CheckError: It does not answer, or serves other models only.
    """
    document = client.get("/v1/models")
    listed = document.get("data") if isinstance(document, dict) else None
    entries = listed if isinstance(listed, list) else []
    models = [entry for entry in entries if isinstance(entry, dict)]
    names = [str(entry["id"]) for entry in models if "id" in entry]
    aliases = {alias for entry in models for alias in (str(entry.get("root")), *_aliases(entry))}
    if names and model not in aliases.union(names) and model.partition(":")[0] not in names:
        raise CheckError(
            f"{client.root}: serves {', '.join(names[:5])}{' …' if len(names) > 5 else ''}, not "
            f"{model}; give one of these as --model, or the kind of server by --server to ask it "
            "all the same"
        )
    owners = {str(entry.get("owned_by", "")).lower() for entry in models}
    known = {
        "vllm": Server.VLLM,
        "sglang": Server.SGLANG,
        "tensorrt_llm": Server.TRTLLM,
        "tensorrt-llm": Server.TRTLLM,
        "llamacpp": Server.LLAMACPP,
    }
    return next((known[owner] for owner in sorted(owners) if owner in known), Server.OPENAI)


def _aliases(entry: Mapping[str, Any]) -> list[str]:
    aliases = entry.get("aliases")
    return [str(alias) for alias in aliases] if isinstance(aliases, list) else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect(ABC):
    """One way to ask."""

    model: str
    #: How many tokens of each position are asked for.
    top: int
    token_of_text: TokenOfText

    @abstractmethod
    def requests(self, tokens: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
        """Return the paths and bodies that a prompt takes."""

    @abstractmethod
    def read(self, tokens: Sequence[int], answers: Sequence[Any]) -> list[Distribution]:
        """Return the distribution after each token.

        Raises:
            ValueError: The answers are not what was asked for.
        """

    def completion(self, prompt: Sequence[int], **more: Any) -> tuple[str, dict[str, Any]]:
        """Return a request of one generated token."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": self.top,
            **more,
        }
        return "/v1/completions", body

    def by_text(self, entries: Any) -> Distribution:
        """Return a distribution that is given by the tokens' texts."""
        if not isinstance(entries, Mapping):
            raise ValueError(f"{entries!r} is no list of log-probabilities")
        found: Distribution = {}
        best = max(entries, key=lambda text: float(entries[text]), default=None)
        for text, value in entries.items():
            known = text[len(_TOKEN_ID) :] if text.startswith(_TOKEN_ID) else ""
            token = int(known) if known.isdecimal() else self.token_of_text(text)
            if token is not None:
                found[token] = float(value)
            elif text == best:
                raise ValueError(
                    f"the best token is given as the text {text!r}, which is no or several tokens; "
                    "name the model's tokenizer with --tokenizer, or a server that gives ids"
                )
        return found


class Vllm(Dialect):
    """vLLM."""

    def requests(self, tokens: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
        """Ask once, with ids in place of texts."""
        return [
            self.completion(
                tokens,
                prompt_logprobs=self.top,
                return_tokens_as_token_ids=True,
                add_special_tokens=False,
            )
        ]

    def read(self, tokens: Sequence[int], answers: Sequence[Any]) -> list[Distribution]:
        """Read prompt_logprobs, and the generated token's logprobs for the last row."""
        choice = answers[0]["choices"][0]
        entries = choice["prompt_logprobs"]
        if entries is None:
            raise ValueError("the answer holds no prompt_logprobs; does the server disable them?")
        rows = [
            {int(token): float(entry["logprob"]) for token, entry in row.items()}
            for row in entries[1:]
        ]
        rows.append(self.by_text(choice["logprobs"]["top_logprobs"][0]))
        return _checked(tokens, rows)


class Sglang(Dialect):
    """SGLang."""

    def requests(self, tokens: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
        """Ask once, by SGLang's own API: its OpenAI API gives texts in place of ids."""
        body = {
            "input_ids": list(tokens),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": self.top,
        }
        return [("/generate", body)]

    def read(self, tokens: Sequence[int], answers: Sequence[Any]) -> list[Distribution]:
        """Read the input's best tokens, the input's own, and the output's best."""
        about = answers[0]["meta_info"]
        rows = []
        own = about["input_token_logprobs"][1:]
        for best, token in zip(about["input_top_logprobs"][1:], own, strict=True):
            row = {int(entry[1]): float(entry[0]) for entry in best}
            row[int(token[1])] = float(token[0])
            rows.append(row)
        last = about["output_top_logprobs"][0]
        rows.append({int(entry[1]): float(entry[0]) for entry in last})
        return _checked(tokens, rows)


class OpenAi(Dialect):
    """Any server that echoes the prompt with its log-probabilities."""

    def requests(self, tokens: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
        """Ask once, with the prompt echoed."""
        return [self.completion(tokens, echo=True, return_tokens_as_token_ids=True)]

    def read(self, tokens: Sequence[int], answers: Sequence[Any]) -> list[Distribution]:
        """Read the echoed tokens' best and the generated one's."""
        logprobs = answers[0]["choices"][0]["logprobs"]
        if logprobs is None or len(logprobs["top_logprobs"]) < len(tokens) + 1:
            raise ValueError(
                "the server does not echo the prompt's log-probabilities; try --server stepwise"
            )
        best = logprobs["top_logprobs"]
        own = list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))
        rows = []
        for entries, (text, value), token in zip(
            best[1:], own[1:], [*tokens[1:], None], strict=True
        ):
            row = self.by_text(entries)
            if token is not None:
                if text.startswith(_TOKEN_ID) and text != f"{_TOKEN_ID}{token}":
                    raise ValueError(f"the server echoes {text}, where token {token} was sent")
                row[token] = float(value)
            rows.append(row)
        return _checked(tokens, rows)


class Stepwise(Dialect):
    """A server that tells log-probabilities only of what it generates."""

    def requests(self, tokens: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
        """Ask for each prefix."""
        return [self.completion(tokens[:count]) for count in range(1, len(tokens) + 1)]

    def read(self, tokens: Sequence[int], answers: Sequence[Any]) -> list[Distribution]:
        """Read the best tokens after each prefix."""
        rows = []
        for answer in answers:
            logprobs = answer["choices"][0]["logprobs"]
            if logprobs is None:
                raise ValueError(
                    "the server gives no log-probabilities; start it with them enabled"
                )
            rows.append(self.row(logprobs))
        return _checked(tokens, rows, followed=False)

    def row(self, logprobs: Mapping[str, Any]) -> Distribution:
        """Read the best tokens of one answer.

        Entries by text hold one of several tokens with the same text, such as the parts of a
        character. The token generated at temperature 0 is the best, and must be among them.
        """
        if not logprobs["top_logprobs"]:
            raise ValueError(
                f"the server gives the log-probability of what it generates alone, not of the "
                f"best {self.top}; does it allow so many?"
            )
        entries = logprobs["top_logprobs"][0]
        row = self.by_text(entries)
        own, best = logprobs["tokens"][0], float(logprobs["token_logprobs"][0])
        if max(map(float, entries.values()), default=best) < best:
            raise ValueError(
                f"the best token, with the text {own!r}, is not among the answer's: several tokens "
                "have that text; a server that gives ids is needed"
            )
        return row


class LlamaCpp(Stepwise):
    """llama.cpp's server."""

    def requests(self, tokens: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
        """Ask for each prefix, and for a letter as the answer.

        The server leaves the log-probabilities out where what it generates ends amid a character.
        They are those of the model, before the bias.
        """
        return [
            self.completion(tokens[:count], logit_bias=[[_LETTER, 1000]])
            for count in range(1, len(tokens) + 1)
        ]

    def row(self, logprobs: Mapping[str, Any]) -> Distribution:
        """Read the best tokens of one answer, which have ids."""
        (generated,) = logprobs["content"]
        return {int(entry["id"]): float(entry["logprob"]) for entry in generated["top_logprobs"]}


DIALECTS: dict[Server, type[Dialect]] = {
    Server.VLLM: Vllm,
    Server.SGLANG: Sglang,
    Server.TRTLLM: Stepwise,
    Server.LLAMACPP: LlamaCpp,
    Server.OPENAI: OpenAi,
    Server.STEPWISE: Stepwise,
}


def read_answers(
    dialect: Dialect, tokens: Sequence[int], answers: Sequence[Any], where: str
) -> list[Distribution]:
    """Return the distribution after each token.

    Raises:
        CheckError: The answers are not of the form that such a server gives.
    """
    try:
        return dialect.read(tokens, answers)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckError(
            f"{where}: the answer is not of the form that --server expects ({error!r}); name the "
            f"kind of server: {', '.join(server.value for server in Server)}"
        ) from error
    except ValueError as error:
        raise CheckError(f"{where}: {error}") from error


def _checked(
    tokens: Sequence[int], rows: list[Distribution], *, followed: bool = True
) -> list[Distribution]:
    """Return the rows if they can be what was asked for.

    Raises:
        ValueError: They cannot: another number of them, another token, or no probabilities.
    """
    if len(rows) != len(tokens):
        raise ValueError(
            f"{len(rows)} positions for {len(tokens)} tokens; does the server add a "
            "begin-of-sequence token?"
        )
    for position, row in enumerate(rows):
        if any(math.isnan(value) or value > 0 for value in row.values()):
            raise ValueError(f"position {position}: a log-probability is NaN or above 0")
        strange = [token for token in row if not 0 <= token < _MOST_TOKENS]
        if strange:
            raise ValueError(f"position {position}: {strange[0]} is no id of a token")
        total = math.fsum(math.exp(value) for value in row.values())
        if total > 1 + _SUM_SLACK or not row:
            raise ValueError(
                f"position {position}: probabilities of {len(row)} tokens sum to {total:.6g}"
            )
        if followed and position + 1 < len(tokens) and tokens[position + 1] not in row:
            raise ValueError(
                f"position {position}: token {tokens[position + 1]} was sent, and its "
                "log-probability is not among the answer's; does the server change the tokens?"
            )
    return rows
