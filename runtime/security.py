"""Who may listen, who may call, and by which keys. Docs: docs/security.md.

- `check_listen`: a process told to listen beyond loopback refuses to start without TLS and authentication, and with
  development secrets.
- `TokenStore`: a TOML file of token hashes and scopes, reloaded when it changes; a broken new version leaves the old
  one in force.
- `server_credentials`, `channel_credentials`: TLS and mTLS; the server's certificate is reloaded when its file changes.
- `reload_at_handshakes`: the same for an HTTPS server.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import ssl
import time
import tomllib
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from kernel.errors import PermissionDenied, Unauthenticated
from runtime.logs import get_logger
from runtime.settings import PROCESSES, Settings, SettingsInvalid, is_loopback

__all__ = [
    "Caller",
    "TokenStore",
    "channel_credentials",
    "check_listen",
    "create_token",
    "current_caller",
    "list_tokens",
    "reload_at_handshakes",
    "revoke_token",
    "server_credentials",
    "set_current_caller",
]

RELOAD_INTERVAL_S = 1.0
"""A file is looked at for changes at most this often."""
TOKEN_PREFIX = "ducat_"  # noqa: S105 - what a token starts with, so that scanners find leaked ones
TOKEN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SCOPE = re.compile(r"\*|[a-z]+\.(\*|[a-z_]+)")

_logger = get_logger("security")


# --- listening


def check_listen(process: str, listen: str, settings: Settings) -> None:
    """Raises SettingsInvalid where ``process`` may not listen on ``listen`` with these settings (DESIGN §9)."""
    beyond = [name for name in PROCESSES if not is_loopback(settings.listen_of(name))]
    missing = []
    if not is_loopback(listen):
        beyond.append(process)
        if not settings.tls_cert_file:
            missing.append("TLS (tls_cert_file and tls_key_file)")
        if not settings.auth_tokens_file:
            missing.append("authentication (auth_tokens_file; make tokens with `ducat token create`)")
    if beyond and settings.has_development_secrets():
        missing.append("secrets of your own (psps still holds development secrets that everyone knows)")
    if missing:
        raise SettingsInvalid(
            f"{process} may not start: {', '.join(dict.fromkeys(beyond))} would listen beyond loopback without "
            f"{'; without '.join(missing)}. Set them, or listen on 127.0.0.1"
        )


# --- tokens

_current_caller: ContextVar[str] = ContextVar("caller", default="")


def current_caller() -> str:
    """The name of the token that came with the call under way; empty where authentication is off."""
    return _current_caller.get()


def set_current_caller(name: str) -> None:
    """Sets it for the task of this call."""
    _current_caller.set(name)


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose token came with a call, and what it may do."""

    name: str
    scopes: frozenset[str]
    expire_s: float = float("inf")

    def allows(self, scope: str) -> bool:
        """``payments.write`` is allowed by itself, by ``payments.*`` and by ``*``."""
        scopes = self.scopes
        return scope in scopes or f"{scope.partition('.')[0]}.*" in scopes or "*" in scopes


class TokenStore:
    """Tokens by their SHA-256, from a TOML file::

        [[token]]
        name = "gateway"
        sha256 = "…64 hex…"
        scopes = ["payments.*", "notifications.write"]
        expire_time = 2027-01-01T00:00:00Z   # optional

    The token itself is never stored. ``now_s`` is unix time, ``monotonic_s`` paces the look at the file.
    """

    def __init__(
        self, path: str, now_s: Callable[[], float] = time.time, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._now_s = now_s
        self._monotonic_s = monotonic_s
        self._version = _version_of(path)
        self._callers = _read_tokens(path)
        self._look_again_s = monotonic_s() + RELOAD_INTERVAL_S

    def authenticate(self, authorization: str) -> Caller:
        """The caller of an ``authorization`` header. Raises Unauthenticated, without saying what was nearly right."""
        if self._monotonic_s() >= self._look_again_s:
            self._reload()
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("no bearer token: send `authorization: Bearer <token>`")
        digest = hashlib.sha256(token.encode()).digest()
        found = self._callers.get(digest[:8])
        if found is None or not hmac.compare_digest(found[0], digest):
            raise Unauthenticated("the token is not known here; ask for a new one (`ducat token create`)")
        if self._now_s() >= found[1].expire_s:
            raise Unauthenticated("the token has expired; ask for a new one (`ducat token create`)")
        return found[1]

    def authorize(self, authorization: str, scope: str) -> Caller:
        """As `authenticate`, and the caller must have ``scope``. Raises PermissionDenied naming the scope."""
        caller = self.authenticate(authorization)
        if scope and not caller.allows(scope):
            raise PermissionDenied(
                f"token {caller.name!r} lacks the scope {scope!r}", metadata={"scope": scope, "caller": caller.name}
            )
        return caller

    def _reload(self) -> None:
        self._look_again_s = self._monotonic_s() + RELOAD_INTERVAL_S
        version = _version_of(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._callers = _read_tokens(self._path)
        except SettingsInvalid as error:
            _logger.warning("tokens not reloaded, the old ones stay in force", reason=str(error))
        else:
            _logger.info("tokens reloaded", count=len(self._callers), path=self._path)


def _read_tokens(path: str) -> dict[bytes, tuple[bytes, Caller]]:
    try:
        data = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise SettingsInvalid(f"auth_tokens_file {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"auth_tokens_file {path}: not TOML: {error}") from None
    rows = data.get("token", [])
    if set(data) - {"token"} or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SettingsInvalid(f"auth_tokens_file {path}: expected only [[token]] tables")
    callers: dict[bytes, tuple[bytes, Caller]] = {}
    for index, row in enumerate(rows):
        digest, caller = _read_token(row, f"auth_tokens_file {path}: token[{index}]")
        if digest[:8] in callers:
            raise SettingsInvalid(f"auth_tokens_file {path}: token[{index}]: the same sha256 stands there twice")
        callers[digest[:8]] = (digest, caller)
    return callers


def _read_token(row: Any, where: str) -> tuple[bytes, Caller]:
    unknown = set(row) - {"name", "sha256", "scopes", "expire_time"}
    if unknown:
        raise SettingsInvalid(f"{where}: unknown key `{min(unknown)}`")
    name, sha256, scopes, expire_time = (row.get(key) for key in ("name", "sha256", "scopes", "expire_time"))
    if not isinstance(name, str) or not TOKEN_NAME.fullmatch(name):
        raise SettingsInvalid(f"{where}: name must match {TOKEN_NAME.pattern}")
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise SettingsInvalid(f"{where}: sha256 must be 64 lower-case hexadecimal digits")
    if not isinstance(scopes, list) or not all(isinstance(scope, str) and SCOPE.fullmatch(scope) for scope in scopes):
        raise SettingsInvalid(f"{where}: scopes must be a list such as ['payments.write', 'wallet.*']")
    if expire_time is not None and not (isinstance(expire_time, datetime) and expire_time.tzinfo):
        raise SettingsInvalid(
            f"{where}: expire_time must be a date and time with an offset, such as 2027-01-01T00:00:00Z"
        )
    expire_s = expire_time.timestamp() if expire_time else float("inf")
    return bytes.fromhex(sha256), Caller(name, frozenset(scopes), expire_s)


def create_token(path: str, name: str, scopes: Sequence[str], expire_time: datetime | None = None) -> str:
    """Makes a token of 256 random bits, adds its hash to the tokens file (atomically; made with mode 0600) and returns
    the token.

    It is shown this once and cannot be read back. Raises SettingsInvalid for a bad name or scope and where the name is
    taken.
    """
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    expire = expire_time.astimezone(UTC).replace(microsecond=0) if expire_time else None
    row: dict[str, Any] = {"name": name, "sha256": digest, "scopes": list(scopes)}
    if expire:
        row["expire_time"] = expire
    _read_token(row, "token")
    file = Path(path)
    before = file.read_text() if file.exists() else ""
    if before and any(caller.name == name for _, caller in _read_tokens(path).values()):
        raise SettingsInvalid(f"{path}: a token named {name!r} exists; take another name, or remove that entry first")
    listed = ", ".join(f'"{scope}"' for scope in scopes)
    entry = f'[[token]]\nname = "{name}"\nsha256 = "{digest}"\nscopes = [{listed}]\n'
    if expire:
        entry += f"expire_time = {expire.isoformat().replace('+00:00', 'Z')}\n"
    _replace_tokens(file, f"{before.rstrip()}\n\n{entry}".lstrip())
    return token


def list_tokens(path: str) -> list[Caller]:
    """Who has a token, in the order of the file. Raises SettingsInvalid."""
    return [caller for _, caller in _read_tokens(path).values()]


def revoke_token(path: str, name: str) -> None:
    """Takes the named token out of the file; the other entries stay as they are, comments too.

    Raises SettingsInvalid where there is none of that name.
    """
    if all(caller.name != name for caller in list_tokens(path)):
        raise SettingsInvalid(f"{path}: no token is named {name!r}; see `ducat token list`")
    file = Path(path)
    head, *entries = re.split(r"(?m)^(?=[ \t]*\[\[token\]\])", file.read_text())
    kept = [entry for entry in entries if tomllib.loads(entry)["token"][0]["name"] != name]
    _replace_tokens(file, "".join((head, *kept)))


def _replace_tokens(file: Path, text: str) -> None:
    beside = file.with_name(f"{file.name}.{os.getpid()}.new")
    beside.touch(mode=0o600)
    if file.exists():
        beside.chmod(file.stat().st_mode & 0o777)
    beside.write_text(text)
    beside.replace(file)


# --- TLS


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """TLS for a gRPC server, reloaded by file change at the next handshake; None without tls_cert_file."""
    if not settings.tls_cert_file:
        return None
    certificate = _ReloadingCertificate(settings)
    return grpc.dynamic_ssl_server_credentials(
        certificate.read(),
        certificate.fetch,  # type: ignore[arg-type]  # None means: keep what is there
        require_client_authentication=settings.tls_client_auth,
    )


def channel_credentials(settings: Settings) -> grpc.ChannelCredentials | None:
    """TLS for a channel, with our own certificate where we have one (mTLS); None without tls_ca_file."""
    if not settings.tls_ca_file:
        return None
    if not settings.tls_cert_file:
        return grpc.ssl_channel_credentials(_read_pem(settings.tls_ca_file, "tls_ca_file"))
    _check_pair(settings)
    return grpc.ssl_channel_credentials(
        _read_pem(settings.tls_ca_file, "tls_ca_file"),
        _read_pem(settings.tls_key_file, "tls_key_file"),
        _read_pem(settings.tls_cert_file, "tls_cert_file"),
    )


class _ReloadingCertificate:
    """Gives gRPC a new certificate when a file has changed and the new pair fits together; else keeps the old one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._paths = [path for path in (settings.tls_cert_file, settings.tls_key_file, settings.tls_ca_file) if path]
        self._version = self._read_version()
        self._look_again_s = 0.0

    def read(self) -> grpc.ServerCertificateConfiguration:
        _check_pair(self._settings)
        pair = (
            _read_pem(self._settings.tls_key_file, "tls_key_file"),
            _read_pem(self._settings.tls_cert_file, "tls_cert_file"),
        )
        ca = _read_pem(self._settings.tls_ca_file, "tls_ca_file") if self._settings.tls_client_auth else None
        return grpc.ssl_server_certificate_configuration([pair], ca)

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC at each handshake, in a thread of its own. None keeps what is there."""
        version = self._read_version()
        if version == self._version:
            return None
        try:
            configuration = self.read()
        except SettingsInvalid as error:
            _logger.warning("certificate not reloaded, the old one stays in force", reason=str(error))
            return None
        self._version = version
        _logger.info("certificate reloaded", path=self._settings.tls_cert_file)
        return configuration

    def _read_version(self) -> tuple[Any, ...]:
        return tuple(_version_of(path) for path in self._paths)


def reload_at_handshakes(context: ssl.SSLContext, settings: Settings) -> None:
    """Lets an HTTPS server's context look at each handshake whether the certificate's files have changed. A new pair that fits
    together is in force from that handshake on; else the old one stays.
    """
    paths = (settings.tls_cert_file, settings.tls_key_file)
    version = tuple(map(_version_of, paths))
    newest: ssl.SSLContext | None = None

    def at_handshake(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal version, newest
        found = tuple(map(_version_of, paths))
        if found != version:
            try:
                newest = _check_pair(settings)
            except SettingsInvalid as error:
                _logger.warning("certificate not reloaded, the old one stays in force", reason=str(error))
            else:
                version = found
                _logger.info("certificate reloaded", path=settings.tls_cert_file)
        if newest is not None:
            connection.context = newest  # only the certificate is taken from it

    context.sni_callback = at_handshake  # also called where the client names no server


def _check_pair(settings: Settings) -> ssl.SSLContext:
    """A context with the pair of the files. Raises SettingsInvalid where they do not fit together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
    except (OSError, ssl.SSLError) as error:
        raise SettingsInvalid(
            f"tls_cert_file {settings.tls_cert_file} and tls_key_file {settings.tls_key_file}: no usable pair: {error}"
        ) from None
    return context


def _read_pem(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingsInvalid(f"{name} {path}: cannot be read: {error.strerror}") from None


def _version_of(path: str) -> tuple[int, int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
