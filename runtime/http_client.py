"""HTTP calls to one origin over aiohttp, for callers that must know whether a request left.

    pool = HttpPool("https://api.psp.example", timeout_s=10)
    reply = await pool.request("POST", "/v1/payment_intents", {"Authorization": …}, body)

`NotSent` says that the request certainly never left; `NoReply` that it may have left and no whole answer came: its outcome is
unknown. Where aiohttp cannot tell, it is `NoReply`.

A kept-alive connection that the peer closes just as we write on it gave no answer and took, in all likelihood, no request: the
request is sent once more. So callers send only what is safe to send twice: a GET, or a POST with an idempotency key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
import yarl

from runtime.settings import is_loopback

__all__ = ["HttpPool", "NoReply", "NotSent", "Reply", "may_be_proxied"]

CONNECTION_COUNT_MAX = 64
KEEPALIVE_S = 20.0
"""Idle connections older than this are not used again; servers close theirs after 30 s or more."""
BODY_BYTES_MAX = 1_048_576
CONNECT_SHARE = 0.9
"""Part of the timeout that a connection, or the wait for a free one, may take, so that one that hangs is known as NotSent."""

_REPEATED_BY_AIOHTTP = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})


class NotSent(Exception):
    """No connection; the request never left."""


class NoReply(Exception):
    """The request left, at least in part, and no whole answer came."""


@dataclass(slots=True)
class Reply:
    """A whole answer: any status from 200 on. Header names in lower case."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def may_be_proxied(base_url: str) -> bool:
    """Whether calls to a URL may be sent where there is a proxy: over https, which it cannot read, or on loopback, without it."""
    return urlsplit(base_url).scheme == "https" or _is_local(base_url)


def _is_local(base_url: str) -> bool:
    return is_loopback(f"{urlsplit(base_url).hostname or '?'}:0")


class HttpPool:
    """Connections to one origin, such as ``http://127.0.0.1:8080``. A path in the base URL goes before every target.

    ``proxy`` is the URL of an HTTP proxy; it gets a CONNECT and sees nothing else. Loopback never goes through it, and the proxies of
    the environment are not looked at. Raises ValueError for a proxy with a base URL that is not https.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float,
        connection_count_max: int = CONNECTION_COUNT_MAX,
        body_bytes_max: int = BODY_BYTES_MAX,
        proxy: str = "",
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url: expected http://host[:port][/path] or https://…, got {base_url!r}")
        if proxy and not may_be_proxied(base_url):
            raise ValueError(f"base_url: a proxy would read what is sent to {base_url!r}; use https, or no proxy")
        self._proxy = None if _is_local(base_url) else proxy or None
        self._base = base_url.rstrip("/")
        self._origin = f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
        self._timeout_s = timeout_s
        self._connection_count_max = connection_count_max
        self._body_bytes_max = body_bytes_max
        self._session: aiohttp.ClientSession | None = None

    async def request(self, method: str, target: str, headers: Mapping[str, str], body: bytes | None = None) -> Reply:
        """One exchange within the timeout. `target` is percent-encoded. Raises NotSent, NoReply; ValueError for a header or
        target that could not be sent as it is.
        """
        for text in (target, *headers, *headers.values()):
            if not (text.isascii() and text.isprintable()):
                raise ValueError(f"not a request line or header: {text[:40]!r}…")
        if " " in target:
            raise ValueError(f"target: not percent-encoded: {target!r}")
        if self._session is None:
            self._session = self._open()
        url = yarl.URL(self._base + target, encoded=True)
        is_repeat = False
        try:
            try:
                return await self._exchange(self._session, method, url, headers, body)
            except (aiohttp.ServerDisconnectedError, ConnectionResetError, BrokenPipeError):
                if method in _REPEATED_BY_AIOHTTP:
                    raise
                is_repeat = True  # the first one may have arrived: from here on nothing is certainly not sent
                return await self._exchange(self._session, method, url, headers, body)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ClientHttpProxyError) as error:
            why = getattr(error, "strerror", None) or error
            raise (NoReply if is_repeat else NotSent)(
                f"no connection to {self._origin} ({type(error).__name__}: {why})"
            ) from error
        except TimeoutError as error:
            raise NoReply(f"no whole answer from {self._origin} within {self._timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise NoReply(f"no whole answer from {self._origin} ({type(error).__name__}: {error})") from error

    async def close(self) -> None:
        """Closes every connection."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._connection_count_max, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=60
            ),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s, connect=self._timeout_s * CONNECT_SHARE),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "Accept", "User-Agent"),
            trust_env=False,
        )

    async def _exchange(
        self, session: aiohttp.ClientSession, method: str, url: yarl.URL, headers: Mapping[str, str], body: bytes | None
    ) -> Reply:
        async with session.request(
            method, url, headers=headers, data=body, allow_redirects=False, proxy=self._proxy
        ) as answer:
            content = bytearray()
            async for piece in answer.content.iter_any():
                content += piece
                if len(content) > self._body_bytes_max:
                    raise NoReply(f"an answer of more than {self._body_bytes_max} bytes from {self._origin}")
            if not (
                answer.status in (204, 304)
                or "content-length" in answer.headers
                or "transfer-encoding" in answer.headers
            ):
                raise NoReply(f"an answer of unknown length from {self._origin}: it may be cut off")
            return Reply(answer.status, bytes(content), {name.lower(): value for name, value in answer.headers.items()})
