"""A server on the loopback that answers what a test has written down for it."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class Answer:
    """One answer; with `cut` the connection ends after so many bytes of the body."""

    body: bytes = b"{}"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    #: Whether the length of the body is announced.
    length: bool = True


class Scripted:
    """Answers in the order they were given, the last of them for ever."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        #: Path and headers of each request.
        self.seen: list[tuple[str, dict[str, str]]] = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self._answer()

            def _answer(self) -> None:
                scripted.seen.append((self.path, dict(self.headers)))
                more = len(scripted.answers) > 1
                answer = scripted.answers.pop(0) if more else scripted.answers[0]
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if answer.length:
                    self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body[: answer.cut])
                self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    def answer(self, *answers: Any) -> None:
        """Say what is answered."""
        self.answers = [a if isinstance(a, Answer) else Answer(**a) for a in answers]

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """Return a server that is told what to answer."""
    server = Scripted()
    yield server
    server.close()
