"""`nvfp4check capture logprobs`: a run from a server that speaks the OpenAI API."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nvfp4check
from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import OutputOption, PlainFormatOption, prepared_format, write
from nvfp4check.cli.progress import progress_bar
from nvfp4check.report.render import render

if TYPE_CHECKING:
    from nvfp4check.logprobs.capture import CaptureResult

app = make_app(group="A run from what is already served.")


class ServerName(StrEnum):
    """What kind of server it is."""

    AUTO = "auto"
    VLLM = "vllm"
    SGLANG = "sglang"
    TRTLLM = "trtllm"
    LLAMACPP = "llamacpp"
    OPENAI = "openai"
    STEPWISE = "stepwise"


@command(
    app,
    examples=(
        "nvfp4check capture logprobs --base-url http://localhost:8000/v1 --model deepseek "
        "--prompts prompts.jsonl --out served",
        "nvfp4check capture logprobs --base-url http://localhost:30000 --server sglang --model m "
        "--prompts prompts.jsonl --tokenizer ./model --out served --resume",
    ),
)
def logprobs(
    base_url: Annotated[
        str,
        typer.Option(metavar="URL", help="The server, with or without /v1.", show_default=False),
    ],
    model: Annotated[
        str, typer.Option(metavar="M", help="The name it serves the model by.", show_default=False)
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help='JSON lines with "id" and "tokens" or "text".', show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="RUN", help="The run directory to write.", show_default=False),
    ],
    server: Annotated[
        ServerName,
        typer.Option(
            help="auto: by what it says. trtllm, llamacpp and stepwise: one request a token, for "
            "servers that tell nothing of the prompt."
        ),
    ] = ServerName.AUTO,
    top: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Tokens of each position; vLLM allows --max-logprobs of them."
        ),
    ] = 20,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT",
            help="Where the model's tokenizer.json is, for prompts given as text.",
            show_default=False,
        ),
    ] = None,
    api_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable that holds the key, if any.")
    ] = "OPENAI_API_KEY",
    retries: Annotated[
        int, typer.Option(metavar="N", min=0, help="Tries after a failed one, waiting longer each.")
    ] = 5,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="For one request.")
    ] = 300.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the capture in --out.")
    ] = False,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Ask a server for the log-probabilities of every token of given prompts.

    What it answers is kept in RUN/answers, and an interrupted capture goes on with --resume.
    `nvfp4check agree REFERENCE RUN` then holds it against another run.
    """
    into = prepared_format(format, output)

    from nvfp4check.logprobs.capture import CaptureOptions, capture_logprobs
    from nvfp4check.logprobs.client import Client
    from nvfp4check.logprobs.dialects import Server
    from nvfp4check.tokens import read_prompts

    client = Client(
        base_url=base_url,
        api_key=os.environ.get(api_key_env),
        retries=retries,
        timeout=timeout,
    )
    options = CaptureOptions(
        model=model,
        server=None if server is ServerName.AUTO else Server(server.value),
        top=top,
        tokenizer=tokenizer,
        resume=resume,
    )
    with progress_bar("Prompts") as bar:
        result = capture_logprobs(client, read_prompts(prompts), out, options, bar)
    write(render(capture_document(result), into), output)
    return ExitCode.HOLDS


def capture_document(result: "CaptureResult") -> dict[str, Any]:
    """Return what was captured, as a JSON document."""
    info = result.run.info
    return {
        "schema": "nvfp4check/capture/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "run": str(result.run.path),
        "server": result.server.value,
        "base_url": info.checkpoint["base_url"],
        "model": info.checkpoint["served_as"],
        "logits": info.logits,
        "asked": result.asked,
        "prompts": [{"id": prompt.id, "tokens": prompt.tokens} for prompt in info.prompts],
    }
