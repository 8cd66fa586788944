import builtins
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("huggingface_hub")

from nvfp4check.checkpoint.locations import open_storage
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.patience import Retry
from nvfp4check.checkpoint.remote_hub import HubStorage
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.checkpoint.validation import ValidationOptions, validate
from nvfp4check.findings import CheckError

SHARD = "model-00001-of-000002.safetensors"


def patient(delays: list[float]) -> Retry:
    """Patience that notes its waits and takes no time for them; nothing is left to chance."""
    return Retry(
        wait=lambda over, seconds: delays.append(seconds),
        clock=lambda: sum(delays),
        chance=lambda: 1.0,
    )


@pytest.mark.parametrize("revision", ["", "@main", "@v1", "@refs%2Fpr%2F1"])
def test_a_checkpoint_of_the_hub_is_the_local_one(
    hub: SimpleNamespace, golden: SimpleNamespace, revision: str
) -> None:
    remote, local = open_checkpoint(f"hf://org/name{revision}"), open_checkpoint(golden.nvfp4)
    assert remote.tensors == local.tensors
    assert remote.files == local.files
    assert remote.config == local.config
    assert remote.json_problems == []
    entry = remote.tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale"]
    assert remote.tensor_bytes(entry).tobytes() == local.tensor_bytes(entry).tobytes()


def test_at_level_headers_only_headers_and_documents_are_downloaded(hub: SimpleNamespace) -> None:
    checkpoint = open_checkpoint("hf://org/name")
    result = validate(checkpoint, ValidationOptions(level=RuleLevel.HEADERS))
    assert result.findings == ()
    headers = sum(header.data_start for header in checkpoint.shards.values())
    assert hub.elsewhere.sent == headers
    files = {path.rpartition("/")[2] for path in hub.sent_of if "/resolve/" in path}
    assert not any(hub.sent_of[path] for path in hub.sent_of if path.endswith(".safetensors"))
    assert {name for name in files if not name.endswith((".json", ".md", ".safetensors"))} == set()


def test_what_is_read_is_one_commit_whatever_is_pushed_meanwhile(hub: SimpleNamespace) -> None:
    storage = open_storage("hf://org/name@v1")
    storage.read(SHARD, 0, 8)
    storage.read("config.json", 0, storage.list()["config.json"])
    resolved = [path for path, _ in hub.requests if "/resolve/" in path]
    assert resolved
    assert all("/resolve/0123456789abcdef0123456789abcdef01234567/" in path for path in resolved)


def test_the_token_goes_to_the_hub_and_not_to_the_host_it_redirects_to(
    hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    open_checkpoint("hf://org/name")
    sent = {headers.get("Authorization") for _, headers in hub.requests}
    assert sent == {"Bearer hf_secret"}
    assert hub.elsewhere.requests
    for path, headers in hub.elsewhere.requests:
        assert "hf_secret" not in path + str(headers)


def test_a_signed_address_is_used_again_and_renewed_when_it_has_run_out(
    hub: SimpleNamespace, golden: SimpleNamespace
) -> None:
    storage = HubStorage("hf://org/name", patient([]))
    for start in range(10):
        storage.read(SHARD, start, start + 100)
    assert len([1 for path, _ in hub.requests if path.endswith(SHARD)]) == 1
    hub.elsewhere.faults = [403]
    assert storage.read(SHARD, 3, 100) == (golden.nvfp4 / SHARD).read_bytes()[3:100]
    assert len([1 for path, _ in hub.requests if path.endswith(SHARD)]) == 2


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("hf://org/absent", "no such repository, or none that you may see.*spelling.*HF_TOKEN"),
        ("hf://org/private", "no such repository, or none that you may see.*spelling.*HF_TOKEN"),
        ("hf://org/gated", "the repository is gated: .*ask for access.*set HF_TOKEN"),
        ("hf://org/closed", "status 401; the repository is private or gated.*HF_TOKEN"),
        ("hf://org/name@v2", "no such revision: check the branch, tag or commit after the @"),
        ("hf://org/name/nowhere", "the repository has no such folder"),
        ("hf://onlyname", "give hf://organisation/name"),
        ("hf://", "give hf://organisation/name"),
        ("hf://org/na me", "give hf://organisation/name"),
        ("hf://org/a..b", "give hf://organisation/name"),
    ],
)
def test_what_cannot_be_opened_is_said_with_a_remedy(
    hub: SimpleNamespace, location: str, why: str
) -> None:
    with pytest.raises(CheckError, match=why) as caught:
        open_checkpoint(location)
    assert "\n" not in str(caught.value)


def test_a_busy_hub_is_asked_again(hub: SimpleNamespace) -> None:
    delays: list[float] = []
    hub.faulty = lambda path, span: True
    hub.faults = [429, 503, 404]
    with pytest.raises(CheckError, match=r"no such repository|status 404"):
        HubStorage("hf://org/busy", patient(delays)).list()
    assert delays == [1.0 + 1.0, 1.0 + 2.0]


def test_a_server_that_is_no_hub_is_said_to_be_none(
    hub: SimpleNamespace, golden: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "api" / "models" / "org").mkdir(parents=True)
    (tmp_path / "api" / "models" / "org" / "name").write_text("<html>hello</html>")
    hub.elsewhere.RequestHandlerClass = hub.plain
    hub.elsewhere.directory = tmp_path
    monkeypatch.setenv("HF_ENDPOINT", hub.elsewhere.url)
    with pytest.raises(CheckError, match=r"does not answer as a hub does.*check HF_ENDPOINT"):
        open_checkpoint("hf://org/name")


def test_a_hub_that_is_not_there_is_tried_once_more_alone(
    closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    delays: list[float] = []
    with pytest.raises(CheckError, match=r"no answer from 127\.0\.0\.1: .*check the spelling"):
        HubStorage("hf://org/name", patient(delays)).list()
    assert delays == [1.0]


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *arguments: object, **options: object) -> object:
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(CheckError, match=r"pip install 'nvfp4check\[hub\]'"):
        open_checkpoint("hf://org/name")
