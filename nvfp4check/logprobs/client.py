"""JSON over HTTP to a server that may be busy, slow or gone for a moment.

The key goes to the address that was given and nowhere else: a redirection is an error, for it could
lead to another host. What a server says is shown without the key.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException, InvalidURL
from typing import Any
from urllib.parse import urlsplit

from nvfp4check.findings import CheckError

#: Answers that a later try may not repeat: busy, and failures of the server or of a proxy.
_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}

#: Seconds before the first retry; each later one waits twice as long, up to the longest.
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 30.0

#: Seconds that are waited at most where the server says how long.
_LONGEST_ASKED_WAIT = 600.0

#: Bytes of an answer that are read at most: 64 Ki positions of 1,100 tokens.
_LONGEST_ANSWER = 1 << 33


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One server."""

    #: With or without `/v1` at its end.
    base_url: str
    api_key: str | None = field(default=None, repr=False)
    retries: int = 5
    timeout: float = 300.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        """Refuse what cannot be sent, and an address that would be kept with a password in it."""
        # Said here and without the key: the library that refuses such a header shows it.
        if any(not "!" <= character <= "~" for character in self.api_key or ""):
            raise CheckError(
                "--api-key-env: the key holds a space, a line break or a letter beyond ASCII, "
                "which no header can carry; see what the variable was set to"
            )
        try:
            parts = urlsplit(self.base_url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError as error:  # a port that is no number, a bracket left open
            raise CheckError(f"--base-url {self.base_url!r}: {error}") from None
        if not sound:
            raise CheckError(
                f"--base-url {self.base_url!r}: give an address with http:// or https://"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise CheckError(
                f"--base-url {parts.scheme}://{parts.hostname}…: holds a user, a password or a "
                "query; give the address alone, and a key by --api-key-env"
            )

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
        return f"{self.root}/{path.lstrip('/')}"

    def _answer(self, request: urllib.request.Request) -> Any:
        if self.api_key:
            request.add_header("Authorization", f"Bearer {self.api_key}")
        opener = urllib.request.build_opener(_NoRedirection)
        for attempt in range(self.retries + 1):
            wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt)
            content = b""
            try:
                with opener.open(request, timeout=self.timeout) as response:
                    content = response.read(_LONGEST_ANSWER)
                return json.loads(content)
            except urllib.error.HTTPError as error:
                with error:
                    message = f"HTTP {error.code}: {self._hidden(_reason(error))}"
                if error.code not in _TRY_AGAIN:
                    raise CheckError(f"{request.full_url}: {message}") from None
                wait = self._asked_wait(error) or wait
            except InvalidURL as error:
                raise CheckError(f"--base-url {self.base_url!r}: {error}") from None
            except (OSError, HTTPException) as error:  # URLError, timeouts, a connection cut off
                message = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, RecursionError) as error:
                if content.lstrip().startswith(b"<"):
                    raise CheckError(
                        f"{request.full_url}: answers with a page in place of JSON; is this the "
                        "address of the API?"
                    ) from None
                message = f"no JSON: {error}"
            if attempt < self.retries:
                self.sleep(wait)
        raise CheckError(
            f"{request.full_url}: {message}; {_times(self.retries + 1)}. Is the server up? "
            "Continue later with the same command and --resume"
        )

    def _hidden(self, text: str) -> str:
        return text.replace(self.api_key, "[key]") if self.api_key else text

    def _asked_wait(self, error: urllib.error.HTTPError) -> float | None:
        """Return the seconds that the server asks to wait, given as such or as a date."""
        asked = error.headers.get("Retry-After", "").strip()
        if asked.isdecimal():
            return min(float(asked), _LONGEST_ASKED_WAIT)
        try:
            seconds = parsedate_to_datetime(asked).timestamp() - self.clock()
        except ValueError:
            return None
        return min(seconds, _LONGEST_ASKED_WAIT) if seconds > 0 else None


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Leaves a redirection to be reported as the status it has."""

    def redirect_request(self, *args: Any, **more: Any) -> None:
        """Follow none."""


def _times(tries: int) -> str:
    return "tried once" if tries == 1 else f"tried {tries} times"


def _reason(error: urllib.error.HTTPError) -> str:
    """Return what the server says about an error, in one line of moderate length."""
    if 300 <= error.code < 400:
        return f"redirects to {error.headers.get('Location', 'nowhere')}; give that address"
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return str(error.reason)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return " ".join(text.split())[:300] or str(error.reason)
    inner = document.get("error", document) if isinstance(document, dict) else document
    message = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(message)[:300]
