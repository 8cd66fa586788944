"""Captures from a server: a loopback server replays what vLLM 0.32.0 answered, or fails at will."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import AgreeOptions, agree
from nvfp4check.agreement.statistics import Decision
from nvfp4check.cli.capture import capture_document
from nvfp4check.findings import CheckError
from nvfp4check.logprobs.capture import CaptureOptions, capture_logprobs
from nvfp4check.logprobs.client import Client
from nvfp4check.logprobs.dialects import OpenAi, Server, Sglang, Stepwise, Vllm
from nvfp4check.tokens import Prompt

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "goldens" / "servers" / "vllm-0.32.0.json").read_text()
)
PROMPTS = [
    Prompt(id=entry["id"], tokens=tuple(entry["request"]["prompt"]))
    for entry in RECORDED["exchange"]
]


class Replay:
    """A server on the loopback that answers what was recorded, after the failures it is told."""

    def __init__(self) -> None:
        self.failures: list[int] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        replay = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(RECORDED["models"] if self.path == "/v1/models" else None)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                replay.requests.append(body)
                replay.keys.append(self.headers["Authorization"])
                entries = (*RECORDED["exchange"], *RECORDED["echo"], *RECORDED["step"])
                known = [e["answer"] for e in entries if e["request"] == body]
                self.answer(known[0] if known else None)

            def answer(self, document: Any) -> None:
                status = replay.failures.pop(0) if replay.failures else 200
                if document is None:
                    status, document = 400, {"error": {"message": "no such exchange"}}
                data = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Replay]:
    replay = Replay()
    yield replay
    replay.close()


def client(server: Replay, **more: Any) -> Client:
    return Client(base_url=server.url, sleep=lambda seconds: None, **more)


def capture(server: Replay, out: Path, **more: Any) -> Run:
    options = CaptureOptions(model="tiny", **more)
    return capture_logprobs(client(server), PROMPTS, out, options).run


def test_what_vllm_served_agrees_with_the_reference(
    server: Replay, tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = capture(server, tmp_path / "served")

    result = agree(tiny_run("bf16"), run, AgreeOptions(max_kl=1e-6, min_top1=0.5))

    assert result.logits is not None
    assert result.logits.positions == 46
    assert result.logits.mean("top1") == 1
    assert result.logits.kl.mean < 1e-6
    reference, candidate = result.logits.perplexities
    assert candidate == pytest.approx(reference, rel=1e-6)
    # 20 of 1,024 tokens bound KL from below, so keeping a limit is not shown.
    assert result.verdict is Decision.UNDECIDED


def test_a_model_that_the_server_lacks_is_named_before_it_is_asked(
    server: Replay, tmp_path: Path
) -> None:
    with pytest.raises(CheckError, match="serves tiny, not huge"):
        capture_logprobs(client(server), PROMPTS, tmp_path / "a", CaptureOptions(model="huge"))
    assert server.requests == []


def test_what_vllm_served_in_bf16_is_told_from_nvfp4(
    server: Replay, tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = capture(server, tmp_path / "served")

    result = agree(tiny_run("nvfp4"), run, AgreeOptions(max_kl=1e-3))

    assert result.verdict is Decision.FAIL


def test_the_rows_are_those_of_the_answer(server: Replay, tmp_path: Path) -> None:
    run = capture(server, tmp_path / "served")

    values, tokens, total = run.top_logits("prompt0")
    first = RECORDED["exchange"][0]["answer"]["choices"][0]["prompt_logprobs"][1]
    by_rank = {entry["rank"]: (int(t), entry["logprob"]) for t, entry in first.items()}
    assert (int(tokens[0, 0]), float(values[0, 0])) == by_rank[1]
    assert (int(tokens[0, 19]), float(values[0, 19])) == by_rank[20]
    assert tokens.shape == (8, 20)
    assert total.count_nonzero() == 0
    assert torch.equal(run.tokens("prompt0"), torch.tensor(PROMPTS[0].tokens))


def test_echoed_and_stepwise_answers_are_those_of_prompt_logprobs() -> None:
    tokens = PROMPTS[0].tokens or ()

    def of(name: str, dialect: type) -> list[dict[int, float]]:
        made = dialect(model="tiny", top=5, token_of_text=lambda text: None)
        rows: list[dict[int, float]] = made.read(tokens, [e["answer"] for e in RECORDED[name]])
        return rows

    whole = Vllm(model="tiny", top=20, token_of_text=lambda text: None).read(
        tokens, [RECORDED["exchange"][0]["answer"]]
    )
    for rows in (of("echo", OpenAi), of("step", Stepwise)):
        assert len(rows) == len(tokens)
        for row, full in zip(rows, whole, strict=True):
            assert all(
                value == pytest.approx(full[token], abs=1e-4) for token, value in row.items()
            )


def test_sglang_s_answer_is_read_with_its_ids() -> None:
    about = {
        "input_token_logprobs": [[None, 5, None], [-1.0, 6, None], [-3.0, 7, None]],
        "input_top_logprobs": [None, [[-0.5, 9, None], [-1.0, 6, None]], [[-0.1, 8, None]]],
        "output_top_logprobs": [[[-0.2, 4, None]]],
    }
    dialect = Sglang(model="m", top=2, token_of_text=lambda text: None)

    rows = dialect.read((5, 6, 7), [{"meta_info": about}])

    assert rows == [{9: -0.5, 6: -1.0}, {8: -0.1, 7: -3.0}, {4: -0.2}]
    ((path, body),) = dialect.requests((5, 6, 7))
    assert (path, body["input_ids"], body["logprob_start_len"]) == ("/generate", [5, 6, 7], 0)


def test_a_busy_server_is_asked_again(server: Replay, tmp_path: Path) -> None:
    server.failures = [503, 429, 500]

    assert capture(server, tmp_path / "served").info.complete


def test_a_server_that_stays_down_is_reported_with_what_to_do(
    server: Replay, tmp_path: Path
) -> None:
    server.failures = [503] * 9

    with pytest.raises(CheckError, match=r"HTTP 503.*tried 6 times.*--resume"):
        capture(server, tmp_path / "served")


def test_an_interrupted_capture_goes_on_where_it_stopped(
    server: Replay, tmp_path: Path, keeps_to_schema: Callable[[dict[str, Any]], None]
) -> None:
    server.failures = [200, 200, 200, *[503] * 6]  # the list of models and two prompts
    with pytest.raises(CheckError):
        capture(server, tmp_path / "served")
    before = len(server.requests)

    options = CaptureOptions(model="tiny", resume=True)
    result = capture_logprobs(client(server), PROMPTS, tmp_path / "served", options)

    assert (result.asked, result.server) == (2, Server.VLLM)
    keeps_to_schema(capture_document(result))
    keeps_to_schema(json.loads((result.run.path / "run.json").read_text(encoding="utf-8")))
    assert len(server.requests) == before + 2
    whole = capture(server, tmp_path / "whole")
    assert (tmp_path / "served" / "logits.safetensors").read_bytes() == (
        whole.path / "logits.safetensors"
    ).read_bytes()


def test_answers_to_other_requests_are_not_taken_for_these(server: Replay, tmp_path: Path) -> None:
    capture(server, tmp_path / "served")

    with pytest.raises(CheckError, match="answers to other requests"):
        capture(server, tmp_path / "served", resume=True, top=10)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"requests": "5', b"\xff", b"[]", b'{"answers": 5}'],
    ids=["empty", "cut", "bytes", "list", "number"],
)
def test_kept_answers_that_are_damaged_are_named(
    server: Replay, tmp_path: Path, content: bytes
) -> None:
    capture(server, tmp_path / "served")
    (tmp_path / "served" / "answers" / "00002.json").write_bytes(content)

    with pytest.raises(CheckError, match=r"00002\.json: cannot be read: .*delete it to ask again"):
        capture(server, tmp_path / "served", resume=True)


def test_a_refusal_is_not_repeated(server: Replay, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="HTTP 400: no such exchange"):
        capture(server, tmp_path / "served", top=999)
    assert len(server.requests) == 1


def test_the_key_is_sent_and_written_nowhere(server: Replay, tmp_path: Path) -> None:
    capture_logprobs(
        client(server, api_key="hunter2"), PROMPTS, tmp_path / "a", CaptureOptions(model="tiny")
    )

    assert set(server.keys) == {"Bearer hunter2"}
    written = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(written) == 3 + len(PROMPTS)
    assert not any(b"hunter2" in path.read_bytes() for path in written)


def _renamed(token: str) -> Callable[[dict[str, Any]], None]:
    def rename(choice: dict[str, Any]) -> None:
        row = choice["prompt_logprobs"][1]
        other = next(name for name in row if name != "41")
        row[token] = row.pop(other)

    return rename


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["prompt_logprobs"].append(c["prompt_logprobs"][-1]), "9 positions for 8"),
        (lambda c: c["prompt_logprobs"][1].pop("41"), "token 41 was sent"),
        (lambda c: c["prompt_logprobs"][1]["41"].update(logprob=0.5), "NaN or above 0"),
        (_renamed("-1"), "position 0: -1 is no id"),
        (_renamed(str(1 << 31)), "position 0: 2147483648 is no id"),
        (
            lambda c: [e.update(logprob=-0.1) for e in c["prompt_logprobs"][1].values()],
            "probabilities of 21 tokens sum to",
        ),
        (lambda c: c.update(prompt_logprobs=None), "no prompt_logprobs"),
        (lambda c: c.pop("logprobs"), "not of the form"),
    ],
    ids=[
        "begin-token",
        "other-token",
        "not-a-logprob",
        "negative",
        "large",
        "sum",
        "disabled",
        "form",
    ],
)
def test_an_answer_that_cannot_be_is_refused(
    edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    from nvfp4check.logprobs.dialects import read_answers

    answer = json.loads(json.dumps(RECORDED["exchange"][0]["answer"]))
    edit(answer["choices"][0])
    dialect = Vllm(model="tiny", top=20, token_of_text=lambda text: None)

    with pytest.raises(CheckError, match=message):
        read_answers(dialect, PROMPTS[0].tokens or (), [answer], "prompt 'prompt0'")


def test_a_text_that_several_tokens_have_is_left_out_unless_it_is_the_best() -> None:
    dialect = Stepwise(model="m", top=2, token_of_text={"a": 1, "b": None}.get)

    assert dialect.by_text({"a": -0.1, "b": -3.0}) == {1: -0.1}
    with pytest.raises(ValueError, match="--tokenizer"):
        dialect.by_text({"a": -3.0, "b": -0.1})
