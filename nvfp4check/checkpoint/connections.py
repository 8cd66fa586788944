"""Connections to web servers: what they fail with, and bodies read no further than asked.

Connections are kept and used again, go through the proxies of the environment, and are not
inherited by other processes.
"""

import re
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    LocationValueError,
    NewConnectionError,
    ProxyError,
    SSLError,
)

from nvfp4check import __version__
from nvfp4check.checkpoint.patience import PassingError
from nvfp4check.checkpoint.remote import CONNECTIONS
from nvfp4check.findings import CheckError

_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to wait for a connection and for the next bytes; bytes a second that are enough."""

    connect: float = 10.0
    read: float = 30.0
    slowest: float = 16384.0


@dataclass(slots=True)
class Connections:
    """Open connections, through the proxies of the environment. They do not travel."""

    timeouts: Timeouts
    managers: dict[str | None, urllib3.PoolManager] = field(default_factory=dict)

    def get(
        self, url: str, start: int, stop: int, headers: Mapping[str, str]
    ) -> urllib3.BaseHTTPResponse:
        """Ask for bytes `start` to `stop`; redirects are answers like others.

        Raises:
            PassingError: no answer came.
            CheckError: none will.
        """
        own = {
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
            "User-Agent": f"nvfp4check/{__version__}",
        }
        try:
            return self._manager(url).request(
                "GET",
                url,
                headers={**own, **headers},
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
                timeout=urllib3.Timeout(connect=self.timeouts.connect, read=self.timeouts.read),
            )
        except LocationValueError as error:
            raise CheckError(f"{_shown(url)}: is no URL: {error}") from error
        except SSLError as error:
            if error.args and isinstance(error.args[0], ssl.SSLCertVerificationError):
                raise CheckError(
                    f"{_shown(url)}: its certificate cannot be trusted: {reason_of(error)}; "
                    "SSL_CERT_FILE names certificates to trust"
                ) from error
            raise PassingError(f"no answer: {reason_of(error)}") from error
        except (NewConnectionError, ConnectTimeoutError, ProxyError) as error:
            raise PassingError(f"no answer: {reason_of(error)}", unreachable=True) from error
        except (HTTPError, OSError) as error:
            raise PassingError(f"no answer: {reason_of(error)}") from error

    def _manager(self, url: str) -> urllib3.PoolManager:
        parts = urllib.parse.urlsplit(url)
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy is not None and urllib.request.proxy_bypass(parts.hostname or ""):
            proxy = None
        if proxy not in self.managers:
            self.managers[proxy] = (
                urllib3.PoolManager(maxsize=CONNECTIONS)
                if proxy is None
                else urllib3.ProxyManager(proxy, maxsize=CONNECTIONS)
            )
        return self.managers[proxy]

    def __reduce__(self) -> tuple[type["Connections"], tuple[Timeouts]]:
        return Connections, (self.timeouts,)


def origin_of(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what credentials are given for."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise CheckError(f"{_shown(url)}: is no URL: {error}") from error
    return parts.scheme, parts.hostname, port or {"http": 80, "https": 443}.get(parts.scheme)


def _shown(url: str) -> str:
    """A URL for messages: without its query, which may be a signature."""
    return url.partition("?")[0]


def body_of(response: urllib3.BaseHTTPResponse, length: int, timeouts: Timeouts) -> bytes:
    """Read `length` bytes, or those there are.

    Raises:
        PassingError: they come too slowly.
    """
    until = time.monotonic() + timeouts.read + length / timeouts.slowest
    chunks, missing = [], length
    while missing:
        chunk = response.read1(min(missing, _CHUNK))
        if not chunk:
            break
        chunks.append(chunk)
        missing -= len(chunk)
        if missing and time.monotonic() > until:
            raise PassingError(f"{length - missing:,} of {length:,} bytes came in time: too slow")
    return b"".join(chunks)


def let_go(response: urllib3.BaseHTTPResponse) -> None:
    """Keep the connection where the answer was read to its end, else close it."""
    if response.length_remaining == 0:
        response.drain_conn()  # nothing comes, and the connection learns that nothing will
        response.release_conn()
    else:
        response.close()


def reason_of(error: BaseException) -> str:
    """The last part of an error's message; urllib3 puts its own objects before it."""
    text = str(error) or type(error).__name__
    return re.sub(r"^\S*\(host=[^)]*\):? ?|^<[^>]*>:? ?", "", text)[:300]
