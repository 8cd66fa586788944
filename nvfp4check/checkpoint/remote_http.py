"""Checkpoints behind a web server that answers range requests.

A web server has no listing: its files are the known names, and the shards that the index names.

Nothing a server says is believed without a look: the range, the total size and the length of each
answer must be those asked for, a whole file in place of a range is not downloaded, redirects are
few and lead to http or https only, never from https back to http, and credentials stay with the
host that they were given for.
"""

import email.utils
import re
import time
import urllib.parse
from collections.abc import Mapping
from typing import NoReturn

import urllib3
from urllib3.exceptions import HTTPError

from nvfp4check.checkpoint.connections import (
    Connections,
    Timeouts,
    body_of,
    let_go,
    origin_of,
    reason_of,
)
from nvfp4check.checkpoint.index import INDEX_FILE, read_index
from nvfp4check.checkpoint.patience import PassingError, Retry
from nvfp4check.checkpoint.remote import RemoteStorage
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.findings import CheckError

_KNOWN_FILES = (
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    INDEX_FILE,
    "model.safetensors",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
)
#: Shards of an index that are looked for. The largest checkpoints have some hundreds.
_MAX_SHARDS = 10_000
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
#: Statuses that may pass: asked too early, too often, or a server in trouble.
PASSING = (408, 425, 429, 500, 502, 503, 504)
#: How long the target of a redirect is used again: far less than signed addresses are good for.
_TARGET_SECONDS = 300.0
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})", re.ASCII)
#: `"api";r=0;t=55`: no request is left for 55 seconds.
_NOTHING_LEFT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})", re.ASCII)


class HttpStorage(RemoteStorage):
    """A checkpoint at a URL: each file at that URL, `/` and its name."""

    def __init__(
        self, location: str, retry: Retry | None = None, timeouts: Timeouts | None = None
    ) -> None:
        super().__init__(location, retry)
        self._timeouts = timeouts or Timeouts()
        self._connections = Connections(self._timeouts)
        self._origin = origin_of(self._location)
        self._versions: dict[str, str] = {}
        #: Where redirects led, by file, and until when that is used.
        self._targets: dict[str, tuple[str, float]] = {}

    def version(self, name: str) -> str:
        """The entity tag that the server gave the file, if it did."""
        return self._versions.get(name, "")

    def _find(self) -> dict[str, int]:
        _check_location(self._location)
        try:
            return self._look()
        except CheckError:
            self._files = None  # half a list is none
            raise

    def _look(self) -> dict[str, int]:
        self._files = self._sizes(_KNOWN_FILES)
        if INDEX_FILE in self._files:
            index, _ = read_index(self)
            shards = sorted(set(index.weight_map.values()))
            if len(shards) > _MAX_SHARDS:
                raise CheckError(
                    f"{self._location}/{INDEX_FILE}: names {len(shards):,} shards, expected at "
                    f"most {_MAX_SHARDS:,}"
                )
            self._files |= self._sizes(shards)
        if not self._files:
            raise CheckError(
                f"{self._location}: none of {', '.join(_KNOWN_FILES[:5])} is there; give the URL "
                "of the folder that holds them"
            )
        return self._files

    def _sizes(self, names: tuple[str, ...] | list[str]) -> dict[str, int]:
        sizes = self._side_by_side(self._size, names)
        return {name: size for name, size in zip(names, sizes, strict=True) if size is not None}

    def _size(self, name: str) -> int | None:
        """Ask for the first byte: the answer tells the size, and that ranges are understood."""

        def attempt() -> int | None:
            try:
                response = self._open(name, 0, 1)
            except _AbsentError:
                return None
            try:
                if response.status == 206:
                    body_of(response, 1, self._timeouts)
                span = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range") or "")
                if span is None:
                    raise CheckError(
                        f"{self._url(name)}: Content-Range is "
                        f"{response.headers.get('Content-Range')!r:.80}, expected the first byte "
                        "and the file's size; download the checkpoint instead"
                    )
            except (HTTPError, OSError) as error:
                raise PassingError(f"broke off: {reason_of(error)}") from error
            finally:
                let_go(response)
            self._versions[name] = _strong_tag(response)
            return int(span[3])

        return self._try(self._url(name), attempt)

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        response = self._open(name, start, stop)
        try:
            self._check_answer(name, response, start, stop)
            return body_of(response, stop - start, self._timeouts)
        except (HTTPError, OSError) as error:
            raise PassingError(f"broke off: {reason_of(error)}") from error
        finally:
            let_go(response)

    def _check_answer(
        self, name: str, response: urllib3.BaseHTTPResponse, start: int, stop: int
    ) -> None:
        """Hold an answer of status 206 against what was asked."""
        if response.status == 416:
            raise StorageError(f"{name}: is empty, expected {self.list()[name]:,} bytes")
        coding = response.headers.get("Content-Encoding", "identity")
        if coding != "identity":
            raise CheckError(f"{self._url(name)}: came as {coding[:20]!r}, which was not asked for")
        length = response.headers.get("Content-Length")
        if length is not None and length != str(stop - start):
            raise PassingError(f"Content-Length is {length[:20]}, expected {stop - start}")
        if response.status != 206:  # a whole file that was asked for whole
            return
        text = response.headers.get("Content-Range") or ""
        span = _CONTENT_RANGE.fullmatch(text)
        if span is None or (span[1], span[2]) != (str(start), str(stop - 1)):
            raise CheckError(
                f"{self._url(name)}: Content-Range is {text[:40]!r}, expected it to begin at "
                f"{start} and end at {stop - 1}; the server cannot be relied on: download the "
                "checkpoint instead"
            )
        if int(span[3]) != self.list()[name]:
            raise CheckError(
                f"{self._url(name)}: has {int(span[3]):,} bytes, and had {self.list()[name]:,} "
                "before; run again when nobody changes it"
            )
        self._check_version(name, _strong_tag(response))

    def _check_version(self, name: str, tag: str) -> None:
        before = self._versions.get(name)
        if before and tag not in ("", before):
            raise CheckError(
                f"{self._url(name)}: has ETag {tag[:80]}, and had {before[:80]} before: it is "
                "another file by now; run again when nobody changes it"
            )

    def _open(self, name: str, start: int, stop: int) -> urllib3.BaseHTTPResponse:
        """Ask for a range, follow redirects, and return an answer that may hold it."""
        first = self._url(name)
        url, until = self._targets.get(name, (first, 0.0))
        if until < time.monotonic():
            url = first
        begun_at = url
        for _ in range(_MAX_REDIRECTS + 1):
            credentials = self._credentials() if origin_of(url) == self._origin else {}
            response = self._connections.get(url, start, stop, credentials)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                break
            let_go(response)
            url = _redirected(url, location)
        else:
            raise CheckError(f"{first}: redirected more than {_MAX_REDIRECTS} times")
        if response.status == 206 or (
            response.status == 200
            and _is_whole(response, start, stop, (self._files or {}).get(name))
        ):
            if url != first and begun_at == first:
                self._targets[name] = (url, time.monotonic() + _TARGET_SECONDS)
            return response
        if response.status == 416 and _is_empty(response):
            return response
        let_go(response)
        if begun_at != first:
            # An address that a redirect gave earlier: it may have run out.
            self._targets.pop(name, None)
            raise PassingError(f"status {response.status}", delay=asked_delay(response.headers))
        self._refuse(first, response)

    def _refuse(self, url: str, response: urllib3.BaseHTTPResponse) -> NoReturn:
        """Say what is wrong with an answer that holds nothing."""
        status = response.status
        if status in (404, 410):
            raise _AbsentError(f"{url}: not there (status {status})")
        if status in PASSING:
            raise PassingError(f"status {status}", delay=asked_delay(response.headers))
        if status in (401, 403):
            raise CheckError(f"{url}: status {status}; {self._login_advice()}")
        if status == 416:
            raise StorageError(f"{url}: shorter than its size was said to be (status 416)")
        if status == 200:
            raise CheckError(
                f"{url}: the server answered a range request with the whole file (status 200, "
                "expected 206); download the checkpoint instead"
            )
        raise CheckError(f"{url}: status {status}, expected 206")

    def _url(self, name: str) -> str:
        return f"{self._location}/{urllib.parse.quote(name)}"

    def _credentials(self) -> dict[str, str]:
        """Headers for the host of the location and for no other."""
        return {}

    def _login_advice(self) -> str:
        return "it needs a login, which is not supported: download the checkpoint instead"


class _AbsentError(StorageError):
    """The server has no such file."""


def _check_location(location: str) -> None:
    parts = urllib.parse.urlsplit(location)
    if parts.username is not None or parts.password is not None:
        raise CheckError(
            f"{parts.scheme}://{parts.hostname}: the URL holds a login, which would end up in "
            "reports; give a URL without one"
        )
    if parts.query or parts.fragment:
        raise CheckError(
            f"{location.partition('?')[0].partition('#')[0]}: the URL holds a query or a fragment; "
            "give the URL of the folder, to which `/` and a file's name can be added"
        )


def _redirected(url: str, location: str) -> str:
    """Where a redirect leads.

    Raises:
        CheckError: it leads out of the web, or from https to http.
    """
    try:
        target = urllib.parse.urljoin(url, location)
        scheme = urllib.parse.urlsplit(target).scheme
    except ValueError:
        target, scheme = location, ""
    if scheme not in ("http", "https") or (url.startswith("https:") and scheme == "http"):
        shown = target.partition("?")[0][:200]
        raise CheckError(f"{url.partition('?')[0]}: redirects to {shown!r}; not followed")
    return target


def _is_whole(response: urllib3.BaseHTTPResponse, start: int, stop: int, size: int | None) -> bool:
    """Whether a whole file is what was asked for, and no more."""
    length = response.headers.get("Content-Length")
    return (start, stop) == (0, size) and length == str(size)


def _is_empty(response: urllib3.BaseHTTPResponse) -> bool:
    return (response.headers.get("Content-Range") or "") == "bytes */0"


def _strong_tag(response: urllib3.BaseHTTPResponse) -> str:
    tag = response.headers.get("ETag") or ""
    return "" if tag.startswith("W/") else tag


def asked_delay(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: of Retry-After or, with nothing left, of RateLimit."""
    asked = [_retry_after(headers.get("Retry-After") or "")]
    limit = _NOTHING_LEFT.search(headers.get("RateLimit") or "")
    if limit is not None:
        asked.append(float(limit[1]))
    return max((seconds for seconds in asked if seconds is not None), default=None)


def _retry_after(text: str) -> float | None:
    """Read a number of seconds, or a date."""
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
