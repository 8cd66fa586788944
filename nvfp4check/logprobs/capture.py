"""A run directory from a server: the best log-probabilities after each token of given prompts.

Each prompt's answers are kept as they came, in OUT/answers, before they are read: an interrupted
capture continues with the prompts that are missing, and what a server said can be looked at later.
The run holds `<prompt>/values` [T, N], `/tokens` [T, N] and `/logsumexp` [T], which is 0, and
`/following` [T]: the log-probability of the token that really follows, NaN after the last.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nvfp4check
from nvfp4check.activations import (
    LOGITS_FILE,
    TOKENS_FILE,
    PromptInfo,
    Run,
    RunInfo,
    leftovers,
    write_bytes,
    write_info,
    write_tensors,
)
from nvfp4check.agreement.sources import FOLLOWING
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.findings import CheckError
from nvfp4check.logprobs.client import Client
from nvfp4check.logprobs.dialects import (
    DIALECTS,
    Dialect,
    Distribution,
    Server,
    TokenOfText,
    detect,
    read_answers,
)
from nvfp4check.tokens import Prompt, load_tokenizer, tokenize

ANSWERS_FOLDER = "answers"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """What a server is asked for."""

    model: str
    #: None: by what the server says of itself.
    server: Server | None = None
    #: Tokens of each position.
    top: int = 20
    #: Checkpoint whose tokenizer makes tokens of text.
    tokenizer: str | None = None
    resume: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureResult:
    """A finished capture."""

    run: Run
    server: Server
    #: Prompts asked by this call; a continued capture has fewer than there are.
    asked: int


def capture_logprobs(
    client: Client,
    prompts: Sequence[Prompt],
    out: Path,
    options: CaptureOptions,
    progress: Callable[[int, int], None] | None = None,
) -> CaptureResult:
    """Ask a server for the log-probabilities of every prompt, and write them as a run.

    Raises:
        CheckError: The server, the prompts or the directory do not allow it.
    """
    if out.exists() and any(out.iterdir()) and not options.resume:
        raise CheckError(f"{out}: is not empty; give a new directory, or --resume")
    prompts = _with_tokens(prompts, options.tokenizer)
    server = options.server or detect(client, options.model)
    dialect = DIALECTS[server](
        model=options.model, top=options.top, token_of_text=_texts(options.tokenizer)
    )
    asked = 0
    rows: dict[str, list[Distribution]] = {}
    for number, prompt in enumerate(prompts):
        tokens = prompt.tokens or ()
        answers, fresh = _answers(client, dialect, tokens, out / ANSWERS_FOLDER, number)
        rows[prompt.id] = read_answers(dialect, tokens, answers, f"prompt {prompt.id!r}")
        asked += fresh
        if progress is not None:
            progress(number + 1, len(prompts))
    _write(out, prompts, rows, client, options, server)
    return CaptureResult(run=Run.open(out), server=server, asked=asked)


def _with_tokens(prompts: Sequence[Prompt], tokenizer: str | None) -> list[Prompt]:
    if all(prompt.tokens for prompt in prompts):
        return list(prompts)
    if tokenizer is None:
        lacking = next(prompt.id for prompt in prompts if not prompt.tokens)
        raise CheckError(
            f"prompt {lacking!r} is text: name the checkpoint that has the model's tokenizer.json "
            "with --tokenizer, or give prompts with tokens"
        )
    checkpoint = open_checkpoint(tokenizer)
    size = (checkpoint.config or {}).get("vocab_size")
    return tokenize(prompts, checkpoint.storage, size if isinstance(size, int) else 1 << 31)


def _texts(tokenizer: str | None) -> TokenOfText:
    """Return a function from a token's text to its id, where one token alone has that text."""
    if tokenizer is None:
        return lambda text: None
    return ids_by_text(load_tokenizer(open_checkpoint(tokenizer).storage)).get


def ids_by_text(tokenizer: Any) -> dict[str, int | None]:
    """Return the id of each text that a tokenizer's tokens have, None where several have it.

    The vocabulary says which ids there are, those of added tokens too: they need not follow one
    another, so that counting up to their number would miss some and take holes for tokens.
    """
    tokens = sorted(set(tokenizer.get_vocab(with_added_tokens=True).values()))
    texts = tokenizer.decode_batch([[token] for token in tokens], skip_special_tokens=False)
    ids: dict[str, int | None] = {}
    for token, text in zip(tokens, texts, strict=True):
        ids[text] = None if text in ids else token
    return ids


def _answers(
    client: Client, dialect: Dialect, tokens: Sequence[int], folder: Path, number: int
) -> tuple[list[Any], bool]:
    """Return the answers to a prompt's requests, and whether the server was asked for them."""
    requests = dialect.requests(tokens)
    text = json.dumps([client.root, requests], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    file = folder / f"{number:05d}.json"
    if file.is_file():
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(kept, dict) or not isinstance(kept.get("answers", []), list):
                raise ValueError("no object with answers")
        except (OSError, ValueError) as error:
            raise CheckError(f"{file}: cannot be read: {error}; delete it to ask again") from error
        if kept.get("requests") != digest or "answers" not in kept:
            raise CheckError(
                f"{file}: answers to other requests (another prompt, server, model or --top); give "
                "a new directory"
            )
        return kept["answers"], False
    answers = [client.post(path, body) for path, body in requests]
    folder.mkdir(parents=True, exist_ok=True)
    document = {"requests": digest, "answers": answers}
    write_bytes(file, json.dumps(document).encode("utf-8"))
    return answers, True


def _write(
    out: Path,
    prompts: Sequence[Prompt],
    rows: dict[str, list[Distribution]],
    client: Client,
    options: CaptureOptions,
    server: Server,
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for prompt in prompts:
        tensors |= top_tensors(prompt.id, prompt.tokens or (), rows[prompt.id], options.top)
    write_tensors(
        out / TOKENS_FILE, {p.id: torch.tensor(p.tokens, dtype=torch.int64) for p in prompts}
    )
    write_tensors(out / LOGITS_FILE, tensors)
    for leftover in leftovers(out):
        leftover.unlink()
    write_info(
        out,
        RunInfo(
            prompts=tuple(
                PromptInfo(id=p.id, tokens=len(p.tokens or ()), text=p.text) for p in prompts
            ),
            complete=True,
            checkpoint={
                "served_as": options.model,
                "base_url": client.root,
                **({"location": options.tokenizer} if options.tokenizer else {}),
            },
            mode="served",
            logits=f"topk:{options.top}",
            versions={"nvfp4check": nvfp4check.__version__, "server": server.value},
        ),
    )


def top_tensors(
    prompt: str, tokens: Sequence[int], rows: Sequence[Distribution], top: int
) -> dict[str, torch.Tensor]:
    """Return the tensors of a prompt; of equal log-probabilities the lower token comes first."""
    values = torch.full((len(rows), top), -torch.inf, dtype=torch.float64)
    ids = torch.full((len(rows), top), -1, dtype=torch.int32)
    following = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    for position, row in enumerate(rows):
        best = sorted(row.items(), key=lambda entry: (-entry[1], entry[0]))[:top]
        for rank, (token, value) in enumerate(best):
            ids[position, rank], values[position, rank] = token, value
        if position + 1 < len(tokens):
            following[position] = row.get(tokens[position + 1], torch.nan)
    return {
        f"{prompt}/values": values,
        f"{prompt}/tokens": ids,
        f"{prompt}/logsumexp": torch.zeros(len(rows), dtype=torch.float64),
        f"{prompt}/{FOLLOWING}": following,
    }
