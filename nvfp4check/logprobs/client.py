"""JSON over HTTP to a server that may be busy, slow or gone for a moment."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from nvfp4check.findings import CheckError

#: Answers that a later try may not repeat: busy, and failures of the server or of a proxy.
_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}

#: Seconds before the first retry; each later one waits twice as long, up to the longest.
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 30.0

#: Bytes of an answer that are read at most: 64 Ki positions of 1,100 tokens.
_LONGEST_ANSWER = 1 << 33


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One server."""

    #: With or without `/v1` at its end.
    base_url: str
    api_key: str | None = None
    retries: int = 5
    timeout: float = 300.0
    sleep: Callable[[float], None] = time.sleep

    @property
    def root(self) -> str:
        """The address that `/v1` stands below."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    def get(self, path: str) -> Any:
        """Return what lies at a path.

        Raises:
            CheckError: The server does not answer, or with an error.
        """
        return self._answer(urllib.request.Request(self._url(path)))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the answer to a request.

        Raises:
            CheckError: The server does not answer, or with an error.
        """
        request = urllib.request.Request(
            self._url(path),
            data=json.dumps(body).encode("utf-8"),
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        return self._answer(request)

    def _url(self, path: str) -> str:
        url = f"{self.root}/{path.lstrip('/')}"
        if not url.startswith(("http://", "https://")):
            raise CheckError(
                f"--base-url {self.base_url!r}: give an address with http:// or https://"
            )
        return url

    def _answer(self, request: urllib.request.Request) -> Any:
        if self.api_key:
            request.add_header("Authorization", f"Bearer {self.api_key}")
        for attempt in range(self.retries + 1):
            wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.loads(response.read(_LONGEST_ANSWER))
            except urllib.error.HTTPError as error:
                message = f"HTTP {error.code}: {_reason(error)}"
                if error.code not in _TRY_AGAIN:
                    raise CheckError(f"{request.full_url}: {message}") from None
                wait = _asked_wait(error) or wait
            except (OSError, HTTPException) as error:  # URLError, timeouts, a connection cut off
                message = str(getattr(error, "reason", error))
            except ValueError as error:
                message = f"no JSON: {error}"
            if attempt < self.retries:
                self.sleep(wait)
        raise CheckError(
            f"{request.full_url}: {message}; {_times(self.retries + 1)}. Is the server up? "
            "Continue later with the same command and --resume"
        )


def _times(tries: int) -> str:
    return "tried once" if tries == 1 else f"tried {tries} times"


def _reason(error: urllib.error.HTTPError) -> str:
    """Return what the server says about an error, in one line of moderate length."""
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return str(error.reason)
    try:
        document = json.loads(text)
    except ValueError:
        return " ".join(text.split())[:300] or str(error.reason)
    inner = document.get("error", document) if isinstance(document, dict) else document
    message = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(message)[:300]


def _asked_wait(error: urllib.error.HTTPError) -> float | None:
    """Return the seconds that the server asks to wait."""
    asked = error.headers.get("Retry-After", "")
    return min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else None
