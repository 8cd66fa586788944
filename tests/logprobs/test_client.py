"""The client against servers that are busy, slow, cut off, moved, or not what they should be."""

import socket
import threading
from email.utils import formatdate
from typing import Any

import pytest

from nvfp4check.findings import CheckError
from nvfp4check.logprobs.client import Client

GOOD = {"body": b'{"choices": []}'}
NOW = 1_800_000_000.0


class Waits(list[float]):
    """Takes the place of sleeping."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def client(server: Any, waits: Waits | None = None, **more: Any) -> Client:
    return Client(
        base_url=server.url,
        sleep=Waits() if waits is None else waits,
        clock=lambda: NOW,
        **more,
    )


def test_each_wait_is_twice_the_last_up_to_the_longest(scripted: Any) -> None:
    scripted.answer({"status": 503})
    waits = Waits()

    with pytest.raises(CheckError, match=r"HTTP 503: .*tried 9 times"):
        client(scripted, waits, retries=8).get("/v1/models")

    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(scripted: Any, status: int) -> None:
    scripted.answer({"status": status}, GOOD)

    assert client(scripted).post("/v1/completions", {}) == {"choices": []}
    assert len(scripted.seen) == 2


@pytest.mark.parametrize(
    ("asked", "waited"),
    [
        ("7", 7.0),
        ("90", 90.0),
        ("100000", 600.0),
        (formatdate(NOW + 45, usegmt=True), 45.0),
        (formatdate(NOW - 45, usegmt=True), 0.5),
        ("soon", 0.5),
        ("", 0.5),
        ("0", 0.5),
    ],
)
def test_a_server_that_says_how_long_is_given_that_long(
    scripted: Any, asked: str, waited: float
) -> None:
    scripted.answer({"status": 429, "headers": {"Retry-After": asked}}, GOOD)
    waits = Waits()

    client(scripted, waits).post("/v1/completions", {})

    assert waits == [waited]


@pytest.mark.parametrize(
    "broken",
    [
        {"body": b'{"choices": [{"text"', "length": False},
        {"body": b'{"choices": []}', "cut": 8},
        {"body": b"", "length": True},
        {"body": b'{"choices": "\xff"}'},
    ],
    ids=["half-written", "cut-off", "empty", "not-utf-8"],
)
def test_a_broken_answer_is_asked_for_again(scripted: Any, broken: dict[str, Any]) -> None:
    scripted.answer(broken, GOOD)

    assert client(scripted).post("/v1/completions", {}) == {"choices": []}
    assert len(scripted.seen) == 2


def test_an_answer_that_stays_broken_is_an_error(scripted: Any) -> None:
    scripted.answer({"body": b'{"choices": []}', "cut": 8})

    with pytest.raises(CheckError, match=r"/v1/models: .*tried 3 times.*--resume"):
        client(scripted, retries=2).get("/v1/models")


def test_a_page_in_place_of_json_is_named_at_once(scripted: Any) -> None:
    scripted.answer({"body": b"\n<!DOCTYPE html><html>Sign in</html>"})

    with pytest.raises(CheckError, match="answers with a page in place of JSON"):
        client(scripted).get("/v1/models")
    assert len(scripted.seen) == 1


def test_an_error_page_is_shown_in_one_line(scripted: Any) -> None:
    page = b"<html>\n<h1>403 Forbidden</h1>\n" + b"<p>x</p>" * 1000
    scripted.answer({"status": 403, "body": page})

    with pytest.raises(CheckError, match="HTTP 403: <html> <h1>403 Forbidden</h1>") as caught:
        client(scripted).get("/v1/models")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        # vLLM 0.32.0, SGLang 0.5.23 (two forms), llama.cpp, and FastAPI's own
        (b'{"error":{"message":"The model `x` does not exist.","code":404}}', "model `x` does not"),
        (b'{"error":{"message":"input_ids cannot be empty."}}', "input_ids cannot be empty"),
        (b'{"object":"error","message":"Internal: no","code":400}', "Internal: no"),
        (b'{"error":{"code":400,"message":"Prompt contains invalid tokens"}}', "invalid tokens"),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b"", "Bad Request"),
    ],
)
def test_what_a_server_says_of_an_error_is_passed_on(
    scripted: Any, body: bytes, message: str
) -> None:
    scripted.answer({"status": 400, "body": body})

    with pytest.raises(CheckError, match=f"HTTP 400: .*{message}"):
        client(scripted).post("/v1/completions", {})
    assert len(scripted.seen) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_is_not_followed_and_the_key_stays(scripted: Any, status: int) -> None:
    elsewhere = f"{scripted.url}/elsewhere"
    scripted.answer({"status": status, "headers": {"Location": elsewhere}}, GOOD)

    with pytest.raises(CheckError, match=f"HTTP {status}: redirects to {elsewhere}; give that"):
        client(scripted, api_key="secret").post("/v1/completions", {})
    assert [path for path, _ in scripted.seen] == ["/v1/completions"]


def test_the_key_is_sent_and_never_shown(scripted: Any) -> None:
    scripted.answer({"status": 401, "body": b'{"error": {"message": "wrong key sk-1234"}}'})
    asking = client(scripted, api_key="sk-1234")

    with pytest.raises(CheckError, match=r"HTTP 401: wrong key \[key\]"):
        asking.get("/v1/models")

    assert scripted.seen[0][1]["Authorization"] == "Bearer sk-1234"
    assert "sk-1234" not in repr(asking)


@pytest.mark.parametrize("key", ["sk-1234\n", "sk 1234", "sk-12\u20ac34"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(scripted: Any, key: str) -> None:
    with pytest.raises(CheckError, match="--api-key-env") as refused:
        client(scripted, api_key=key)

    assert "12" not in str(refused.value)


@pytest.mark.parametrize("status", [200, 400])
def test_an_answer_nested_too_deep_is_an_error(scripted: Any, status: int) -> None:
    scripted.answer({"status": status, "body": b"[" * 4000})

    with pytest.raises(CheckError, match=r"no JSON|HTTP 400"):
        client(scripted, retries=0).get("/v1/models")


def test_without_a_key_none_is_sent(scripted: Any) -> None:
    scripted.answer(GOOD)

    client(scripted).get("/v1/models")

    assert "Authorization" not in scripted.seen[0][1]


def test_a_server_that_takes_too_long_is_an_error() -> None:
    answered = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hold() -> None:
            connection, _ = listening.accept()
            with connection:
                answered.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        silent = Client(
            base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", retries=0, timeout=0.05
        )
        try:
            with pytest.raises(CheckError, match="timed out; tried once"):
                silent.get("/v1/models")
        finally:
            answered.set()
            thread.join()


def test_a_server_that_is_not_there_is_an_error() -> None:
    waits = Waits()
    # A port that is held and not listened at, so that no other process gets it meanwhile.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        absent = f"http://127.0.0.1:{held.getsockname()[1]}"

        with pytest.raises(CheckError, match=r"refused; tried 3 times\. Is the server up"):
            Client(base_url=absent, retries=2, sleep=waits).get("/v1/models")
    assert waits == [0.5, 1]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost:8000", "give an address with http"),
        ("ftp://host/v1", "give an address with http"),
        ("http://", "give an address with http"),
        ("http://host:port/v1", "Port could not be cast"),
        ("http://[::1/v1", "Invalid IPv6 URL"),
        ("http://me:hunter2@host/v1", r"--base-url http://host…: holds a user"),
        ("http://host/v1?key=hunter2", r"--base-url http://host…: holds a user"),
        ("http://ho st/v1", "control characters"),
    ],
)
def test_an_address_that_cannot_be_asked_is_refused(address: str, message: str) -> None:
    with pytest.raises(CheckError, match=message) as caught:
        Client(base_url=address, retries=0).get("/v1/models")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_address_may_be_given_with_or_without_v1(scripted: Any, end: str) -> None:
    scripted.answer(GOOD)

    Client(base_url=scripted.url + end).get("/v1/models")

    assert scripted.seen[0][0] == "/v1/models"
