"""Checkpoints of the Hugging Face Hub: `hf://org/name[@revision][/folder]`.

huggingface_hub says which files there are, at which commit, and what the user may see; the bytes
come by the checked ranges of `HttpStorage`. The commit is fixed when the checkpoint is opened, so
that no later push mixes two versions.
"""

import json
import os
import urllib.parse
from types import ModuleType
from typing import Any

from nvfp4check.checkpoint.connections import Timeouts, origin_of
from nvfp4check.checkpoint.patience import PassingError, Retry
from nvfp4check.checkpoint.remote import MAX_FILES
from nvfp4check.checkpoint.remote_fsspec import backend_errors
from nvfp4check.checkpoint.remote_http import PASSING, HttpStorage, asked_delay
from nvfp4check.checkpoint.storage import unsafe_name
from nvfp4check.findings import CheckError

_FORM = "hf://organisation/name, with @revision where it is not main"
_TOKEN_ADVICE = (
    "for a private or gated one, ask for access on its page and set HF_TOKEN, or run "
    "`hf auth login`"
)

#: What an answer of another form makes huggingface_hub raise.
_NOT_UNDERSTOOD = (json.JSONDecodeError, KeyError, TypeError, AttributeError)


class HubStorage(HttpStorage):
    """A repository of a hub, at one commit. HF_ENDPOINT names another hub than huggingface.co."""

    def __init__(
        self, location: str, retry: Retry | None = None, timeouts: Timeouts | None = None
    ) -> None:
        super().__init__(location, retry, timeouts)
        _hub(location)
        self._root = ""

    def _find(self) -> dict[str, int]:
        hub = _hub(self._location)
        system = hub.HfFileSystem(
            endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None, skip_instance_cache=True
        )
        self._origin = origin_of(system.endpoint)

        def attempt() -> dict[str, int]:
            try:
                return self._find_with(hub, system)
            except backend_errors(ValueError, NotImplementedError, *_NOT_UNDERSTOOD) as error:
                raise self._explained(hub, error) from error

        return self._try(self._location, attempt)

    def _find_with(self, hub: ModuleType, system: Any) -> dict[str, int]:
        place = system.resolve_path(self._location.removeprefix("hf://"))
        api = hub.HfApi(endpoint=system.endpoint)
        commit = api.repo_info(
            place.repo_id, repo_type=place.repo_type, revision=place.revision
        ).sha
        folder = place.path_in_repo.strip("/")
        self._root = hub.hf_hub_url(
            place.repo_id,
            "FILE",
            subfolder=folder or None,
            repo_type=place.repo_type,
            revision=commit,
            endpoint=system.endpoint,
        ).removesuffix("/FILE")
        files: dict[str, int] = {}
        prefix = f"{folder}/" if folder else ""
        for item in api.list_repo_tree(
            place.repo_id,
            folder or None,
            recursive=True,
            revision=commit,
            repo_type=place.repo_type,
        ):
            name = item.path.removeprefix(prefix)
            size = getattr(item, "size", None)  # a folder has none
            if size is None or unsafe_name(name) is not None:
                continue
            if type(size) is not int or size < 0:
                raise TypeError(f"size {size!r} of {name}")
            files[name] = size
            self._versions[name] = item.blob_id
            if len(files) > MAX_FILES:
                raise CheckError(
                    f"{self._location}: more than {MAX_FILES:,} files; give the repository or "
                    "folder of one checkpoint"
                )
        if not files:
            raise CheckError(f"{self._location}: nothing is there")
        return files

    def _explained(self, hub: ModuleType, error: Exception) -> Exception:
        """Turn an error of huggingface_hub into one that says what to do."""
        errors = hub.errors
        cause = error.__cause__ if type(error) is FileNotFoundError and error.__cause__ else error
        where = self._location
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, errors.GatedRepoError):
            return CheckError(f"{where}: the repository is gated: {_TOKEN_ADVICE}")
        if isinstance(cause, errors.RepositoryNotFoundError) or status == 401:
            return CheckError(
                f"{where}: no such repository, or none that you may see (status {status}): check "
                f"the spelling; {_TOKEN_ADVICE}"
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return CheckError(
                f"{where}: the repository has no such revision: check the branch, tag or commit "
                "after the @"
            )
        if isinstance(cause, (errors.EntryNotFoundError, FileNotFoundError)):
            return CheckError(f"{where}: the repository has no such folder")
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return CheckError(f"{where}: HF_HUB_OFFLINE is set; unset it, or give a directory")
        if status in PASSING:
            headers = getattr(getattr(cause, "response", None), "headers", {})
            return PassingError(f"status {status}", delay=asked_delay(headers))
        if status == 403:
            return CheckError(f"{where}: status 403; {self._login_advice()}")
        if status is not None:
            return CheckError(f"{where}: status {status}: {_first_line(cause)}")
        if isinstance(cause, _NOT_UNDERSTOOD):
            return CheckError(
                f"{where}: {self._origin[1]} does not answer as a hub does: "
                f"{type(cause).__name__}: {_first_line(cause)}; check HF_ENDPOINT"
            )
        if isinstance(cause, (ValueError, NotImplementedError)):
            return CheckError(f"{where}: {_first_line(cause)}; give {_FORM}")
        unreachable = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError")
        return PassingError(
            f"no answer from {self._origin[1]}: {_first_line(cause)}", unreachable=unreachable
        )

    def _check_version(self, name: str, tag: str) -> None:
        """Do nothing: the commit is fixed, and storage behind a redirect has tags of its own."""

    def _url(self, name: str) -> str:
        return f"{self._root}/{urllib.parse.quote(name)}"

    def _credentials(self) -> dict[str, str]:
        headers = _hub(self._location).utils.build_hf_headers()
        return {"Authorization": headers["authorization"]} if "authorization" in headers else {}

    def _login_advice(self) -> str:
        return f"the repository is private or gated: {_TOKEN_ADVICE}"


def _hub(location: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckError(
            f"{location}: hf:// needs huggingface_hub, which is not installed: "
            "pip install 'nvfp4check[hub]'"
        ) from None
    module: ModuleType = huggingface_hub
    return module


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
