"""Loopback servers of golden checkpoints that count what they send and misbehave on demand."""

import contextlib
import hashlib
import json
import socket
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

#: What a server answers in place of the truth: a status, or the name of a misbehaviour.
Fault = int | str | None

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class RangeServer(ThreadingHTTPServer):
    """Serves one directory by ranges."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: type[BaseHTTPRequestHandler], directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.directory = directory
        #: Bytes of bodies, in all and by path.
        self.sent = 0
        self.sent_of: dict[str, int] = {}
        #: Path and headers of each request.
        self.requests: list[tuple[str, dict[str, str]]] = []
        #: Answers to give before the true one, in the order in which requests come: for requests
        #: of which one follows the other.
        self.faults: list[Fault] = []
        #: The answer to one range of one file at the n-th time of asking, counted from 0: the same
        #: in whatever order requests come.
        self.plan: Callable[[str, str, int], Fault] = lambda path, span, time: None
        self.asked: Counter[tuple[str, str]] = Counter()
        self.given: Counter[Fault] = Counter()
        #: What misbehaves; questions for a file's size do not, unless asked to.
        self.faulty: Callable[[str, str], bool] = lambda path, span: span != "bytes=0-0"
        self.latency = 0.0
        #: What busy answers ask for, before 7 seconds.
        self.retry_after: list[str] = []
        self.etags: dict[str, str] = {}
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        #: Set when a client hangs up on a file that it was sent whole.
        self.hung_up = threading.Event()
        #: Set at the end: answers that are held back wait for it.
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, path: str, span: str) -> Fault:
        with self.lock:
            if not self.faulty(path, span):
                return None
            fault = self.plan(path, span, self.asked[path, span])
            self.asked[path, span] += 1
            if self.faults:
                fault = self.faults.pop(0)
            self.given[fault] += 1
            return fault

    def count(self, path: str, size: int) -> None:
        with self.lock:
            self.sent += size
            self.sent_of[path] = self.sent_of.get(path, 0) + size

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End every connection, so that no thread waits for a client's next request."""
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that hang up: they are meant to."""


class RangeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet
    server: RangeServer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        time.sleep(self.server.latency)
        with self.server.lock:
            headers = {name.title(): value for name, value in self.headers.items()}
            self.server.requests.append((self.path, headers))
        # A proxy is asked for a whole address.
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.serve(self.server.directory / path.lstrip("/"))

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.server.count(self.path, len(body))  # before a client can know that it has them
        self.wfile.write(body)

    def serve(self, file: Path) -> None:
        if not file.is_file():
            self.answer(404)
            return
        span = self.headers.get("Range", "bytes=0-")
        first, _, last = span.removeprefix("bytes=").partition("-")
        size = file.stat().st_size
        start, stop = int(first), min(int(last or size) + 1, size)
        if start >= size:
            self.answer(416, Content_Range=f"bytes */{size}")
            return
        with file.open("rb") as opened:
            opened.seek(start)
            part = opened.read(stop - start)
        self.misbehave(self.server.fault(self.path, span), file, part, start, size)

    def misbehave(self, fault: Fault, file: Path, part: bytes, start: int, size: int) -> None:
        span = f"bytes {start}-{start + len(part) - 1}/{size}"
        tag = self.server.etags.get(
            file.name, f'"{hashlib.sha256(str(file).encode()).hexdigest()}"'
        )
        match fault:
            case int():
                known = self.server.retry_after
                self.answer(fault, Retry_After=known.pop(0) if known else "7")
            case "endless range":
                self.answer(206, part, Content_Range=f"bytes 0-99/{'9' * 5000}")
            case "date":
                date = self.date_time_string(time.time() + 50)
                self.answer(503, Retry_After=date)
            case "dropped":  # half of what was announced, then the end
                self.send_response(206)
                self.send_header("Content-Range", span)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part[: len(part) // 2])
                self.close_connection = True
            case "short":
                self.answer(206, part[:-1], Content_Range=span)
            case "long":
                self.answer(206, part + b"\0" * 100_000, Content_Range=span)
            case "shifted":
                self.answer(
                    206, part, Content_Range=f"bytes {start + 1}-{start + len(part)}/{size}"
                )
            case "grown":
                self.answer(206, part, Content_Range=span.replace(f"/{size}", f"/{size + 1}"))
            case "no range":
                self.answer(206, part)
            case "gzip":
                self.answer(206, part, Content_Range=span, Content_Encoding="gzip")
            case "whole":
                self.send_response(200)
                self.send_header("Content-Length", str(size))
                self.end_headers()
                with file.open("rb") as opened:
                    try:
                        while chunk := opened.read(1 << 16):
                            self.wfile.write(chunk)
                            self.server.count(self.path, len(chunk))
                    except OSError:
                        self.server.hung_up.set()
            case "slow":  # half of what was announced, and no more for long
                self.send_response(206)
                self.send_header("Content-Range", span)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part[: len(part) // 2])
                self.wfile.flush()
                self.server.released.wait()
                self.close_connection = True
            case "silent":
                self.server.released.wait()
                self.close_connection = True
            case "hung up":
                self.close_connection = True
            case str():
                self.answer(302, Location=fault)
            case None:
                self.answer(206, part, Content_Range=span, ETag=tag)


class HubHandler(RangeHandler):
    """The part of the Hub's interface that reading needs: information, tree, resolve, storage."""

    repository = "org/name"
    revisions = ("main", "v1", "refs/pr/1", COMMIT)

    def do_GET(self) -> None:
        time.sleep(self.server.latency)
        with self.server.lock:
            headers = {name.title(): value for name, value in self.headers.items()}
            self.server.requests.append((self.path, headers))
        path, _, query = self.path.partition("?")
        token = self.headers.get("Authorization")
        if path.startswith("/storage/"):
            self.serve(self.server.directory / path.removeprefix("/storage/"))
        elif path.startswith("/api/models/org/private") and token is None:
            self.answer(401, X_Error_Message="Invalid username or password.")
        elif path.startswith("/api/models/org/gated"):
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
        elif path.startswith("/api/models/org/closed") and "/tree/" not in path:
            self.information("org/closed", "main")
        elif path.startswith("/api/models/org/closed"):
            self.tree("org/closed", path, query)
        elif path.startswith("/org/closed/"):
            self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
        elif path.startswith("/api/models/org/busy"):
            fault = self.server.fault(self.path, "")
            self.answer(fault if isinstance(fault, int) else 503, Retry_After="1")
        elif path.startswith("/api/models/org/name/tree/"):
            self.tree("org/name", path, query)
        elif path.startswith("/api/models/org/name/revision/"):
            self.information("org/name", urllib.parse.unquote(path.rpartition("/")[2]))
        elif path == "/api/models/org/name":
            self.information("org/name", "main")
        elif path.startswith(f"/org/name/resolve/{COMMIT}/"):
            self.resolve(path.removeprefix(f"/org/name/resolve/{COMMIT}/"))
        else:
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def information(self, repository: str, revision: str) -> None:
        if revision not in self.revisions:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            return
        siblings = [{"rfilename": file.name} for file in self.server.directory.iterdir()]
        self.json({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings})

    def tree(self, repository: str, path: str, query: str) -> None:
        _, _, rest = path.partition("/tree/")
        revision, _, folder = rest.partition("/")
        if revision != COMMIT or folder:
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            return
        files = sorted(self.server.directory.iterdir())
        # Two pages, as for long listings.
        half = len(files) // 2
        page = files[half:] if "cursor=2" in query else files[:half]
        link = f'<{self.server.url}{path}?{query}&cursor=2>; rel="next"'
        self.json(
            [
                {"type": "directory", "oid": "0" * 40, "size": 0, "path": "folder"},
                *(self.entry(file) for file in page),
            ],
            **({} if "cursor=2" in query else {"Link": link}),
        )

    def entry(self, file: Path) -> dict[str, object]:
        size = file.stat().st_size
        entry: dict[str, object] = {
            "type": "file",
            "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            "size": size,
            "path": file.name,
        }
        if file.suffix == ".safetensors":
            sha = hashlib.sha256(file.read_bytes()).hexdigest()
            entry["lfs"] = {"oid": sha, "size": size, "pointerSize": 134}
        return entry

    def resolve(self, name: str) -> None:
        file = self.server.directory / urllib.parse.unquote(name)
        if not file.is_file():
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        elif file.suffix == ".safetensors":  # large files lie on a storage of another host
            target = f"{self.server.storage}/storage/{name}?signature=secret"
            self.answer(302, Location=target, X_Linked_Size=str(file.stat().st_size))
        else:  # small ones come whole, whatever range was asked
            self.answer(200, file.read_bytes(), ETag='"small"')

    def json(self, document: object, **headers: str) -> None:
        self.answer(200, json.dumps(document).encode(), Content_Type="application/json", **headers)


@contextlib.contextmanager
def running(handler: type[RangeHandler], directory: Path) -> Iterator[RangeServer]:
    """Run a server in a thread."""
    with RangeServer(handler, directory) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
            server.hang_up()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens at."""
    with contextlib.closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """A host that no name server knows, wherever the test runs; none is asked."""
    lookup = socket.getaddrinfo

    def unknown(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == "no-such-host.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return lookup(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    return "no-such-host.invalid"


@pytest.fixture
def serve() -> Iterator[Callable[[Path], RangeServer]]:
    """Serve a directory by http: `serve(path).url`."""
    with contextlib.ExitStack() as stack:
        yield lambda directory: stack.enter_context(running(RangeHandler, directory))


@pytest.fixture
def server(golden: SimpleNamespace, serve: Callable[[Path], RangeServer]) -> RangeServer:
    """A loopback server of the NVFP4 golden."""
    return serve(golden.nvfp4)


@pytest.fixture
def hub(golden: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """A loopback hub, named by HF_ENDPOINT, with the golden in org/name; large files elsewhere."""
    with running(HubHandler, golden.nvfp4) as hub, running(HubHandler, golden.nvfp4) as storage:
        hub.storage = storage.url.replace("127.0.0.1", "localhost")
        hub.elsewhere, hub.plain = storage, RangeHandler
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
