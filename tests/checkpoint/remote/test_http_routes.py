"""Where requests go, and where they must not go."""

import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvfp4check.checkpoint.connections import Timeouts
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.patience import Retry
from nvfp4check.checkpoint.remote_http import HttpStorage
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.findings import CheckError

SHARD = "model-00001-of-000002.safetensors"
CONFIG = "config.json"


def patient(delays: list[float], attempts: int = 4) -> Retry:
    """Patience that notes its waits and takes no time for them; nothing is left to chance."""
    return Retry(
        attempts=attempts,
        wait=lambda over, seconds: delays.append(seconds),
        clock=lambda: sum(delays),
        chance=lambda: 1.0,
    )


def opened(server: SimpleNamespace, delays: list[float] | None = None) -> HttpStorage:
    """A storage whose sizes are known, so that faults hit reads."""
    storage = HttpStorage(server.url, patient([] if delays is None else delays))
    storage.list()
    return storage


def test_a_redirect_is_followed_and_remembered(
    serve: Callable[[Path], SimpleNamespace], golden: SimpleNamespace
) -> None:
    first, second = serve(golden.nvfp4), serve(golden.nvfp4)
    storage = opened(first)
    first.faults = [f"{second.url}/{SHARD}"]
    for start in range(5):
        assert storage.read(SHARD, start, 90) == (golden.nvfp4 / SHARD).read_bytes()[start:90]
    assert [path for path, _ in second.requests] == [f"/{SHARD}"] * 5
    second.faults = [403]  # the address has run out: ask the first one again
    assert storage.read(SHARD, 7, 90) == (golden.nvfp4 / SHARD).read_bytes()[7:90]
    assert first.requests[-1][1]["Range"] == "bytes=7-89"


def test_the_proxy_of_the_environment_is_used(
    server: SimpleNamespace,
    golden: SimpleNamespace,
    nowhere: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    remote = open_checkpoint(f"http://{nowhere}/")
    assert remote.tensors == open_checkpoint(golden.nvfp4).tensors
    monkeypatch.setenv("no_proxy", "invalid")
    with pytest.raises(CheckError, match="no answer"):
        HttpStorage(f"http://{nowhere}", patient([])).list()


@pytest.fixture
def secure(
    server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """The server with a certificate that nobody signed, in the file `certificate`."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -keyout {key} "
        f"-out {certificate} -addext subjectAltName=DNS:localhost",
        shell=True,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    return SimpleNamespace(
        server=server,
        url=f"https://localhost:{server.server_port}",
        certificate=certificate,
    )


def test_a_certificate_that_nobody_vouches_for_is_refused_at_once(secure: SimpleNamespace) -> None:
    delays: list[float] = []
    with pytest.raises(CheckError, match=r"certificate cannot be trusted.*SSL_CERT_FILE"):
        HttpStorage(secure.url, patient(delays), Timeouts(connect=600.0, read=600.0)).list()
    assert delays == []


def test_https_is_read_and_never_left_for_http(
    secure: SimpleNamespace,
    golden: SimpleNamespace,
    serve: Callable[[Path], SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(secure.certificate))
    storage = HttpStorage(secure.url)
    assert storage.read(SHARD, 5, 500) == (golden.nvfp4 / SHARD).read_bytes()[5:500]
    plain = serve(golden.nvfp4)
    secure.server.faults = [f"{plain.url}/{SHARD}?signature=secret"]
    with pytest.raises(CheckError, match="not followed") as caught:
        storage.read(SHARD, 5, 500)
    assert plain.requests == []
    assert "secret" not in str(caught.value)


def test_redirects_in_a_circle_end(server: SimpleNamespace) -> None:
    storage = opened(server)
    server.faults = [f"/{SHARD}"] * 99
    with pytest.raises(CheckError, match="redirected more than 5 times"):
        storage.read(SHARD, 0, 90)
    assert len([1 for path, headers in server.requests if headers["Range"] == "bytes=0-89"]) == 6


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "http://[::1/x"]
)
def test_a_redirect_out_of_the_web_is_not_followed(server: SimpleNamespace, target: str) -> None:
    storage = opened(server)
    server.faults = [target]
    with pytest.raises(CheckError, match="not followed"):
        storage.read(SHARD, 0, 90)


def test_a_name_that_leads_out_is_not_asked_for(server: SimpleNamespace) -> None:
    with pytest.raises(StorageError, match="not opened"):
        HttpStorage(server.url).read("../config.json", 0, 1)
    assert server.requests == []


def test_an_index_leads_to_nothing_outside(
    serve: Callable[[Path], SimpleNamespace], tmp_path: Path
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside.safetensors").write_bytes(b"secret")
    names = ("../outside.safetensors", "file:///etc/passwd", "http://127.0.0.1:1/x", "/etc/passwd")
    index = ", ".join(f'"t{place}": "{name}"' for place, name in enumerate(names))
    (inside / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    server = serve(tmp_path)
    checkpoint = open_checkpoint(f"{server.url}/inside")
    assert sorted(checkpoint.unsafe) == sorted(names)
    assert {path.rpartition("/")[0] for path, _ in server.requests} == {"/inside"}


def test_a_name_with_signs_of_a_url_is_a_name(
    serve: Callable[[Path], SimpleNamespace], tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "x?y=#1 %41.safetensors"}}'
    )
    (tmp_path / "x?y=#1 %41.safetensors").write_bytes(b"12345678")
    storage = opened(serve(tmp_path))
    assert storage.read("x?y=#1 %41.safetensors", 0, 8) == b"12345678"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://user:secret@127.0.0.1/x", "holds a login"),
        ("http://127.0.0.1/x?token=secret", "holds a query"),
        ("http://127.0.0.1/x#part", "holds a query or a fragment"),
        ("http://127.0.0.1:port/x", "is no URL"),
        ("http://[::1/x", "is no URL"),
    ],
)
def test_a_url_that_cannot_be_a_folder_is_refused_without_its_secrets(url: str, why: str) -> None:
    with pytest.raises(CheckError, match=why) as caught:
        open_checkpoint(url)
    assert "secret" not in str(caught.value)
