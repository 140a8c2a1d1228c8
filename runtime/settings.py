"""Every setting of every process, in one flat class.

Precedence, first wins: flags (`overrides`) > environment (`DUCAT_<NAME>`) > secrets files (`DUCAT_<NAME>_FILE`, whose
content is the value) > `ducat.toml` (or the file that DUCAT_CONFIG_FILE names; `<name>_file` reads a file there too) >
the defaults, which are for development on one machine. An unknown key in the file is an error that names the key.
`describe()` is what `ducat config` prints.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kernel.money import CURRENCY_EXPONENTS

__all__ = [
    "PROCESSES",
    "PspSettings",
    "SettingDescription",
    "Settings",
    "SettingsInvalid",
    "is_loopback",
    "mask",
    "split_address",
]

CONFIG_FILE = "ducat.toml"
PREFIX = "DUCAT_"
PROCESSES = ("gateway", "payment", "executor", "wallet", "ledger", "sandbox")
DEVELOPMENT_SECRETS = frozenset({"sk_test_sandbox", "sk_payout_sandbox", "whsec_sandbox_dev"})
_DAY_MS = 86_400_000
_URL_PASSWORD = re.compile(r"(://[^/@:\s]*:)[^/@\s]+(?=@)|([?&]password=)[^&\s]+")


class SettingsInvalid(Exception):
    """The settings cannot be used; the message names each wrong key, where it stands, and what to do."""


class PspSettings(BaseModel):
    """One payment service provider. `api_key_file` and the like read the secret from a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")
    adapter: str
    base_url: str
    api_key: SecretStr
    payout_api_key: SecretStr
    webhook_secret: SecretStr
    webhook_secret_previous: SecretStr = SecretStr("")
    """Accepted too while a secret is being replaced; empty = none."""
    currency_codes: list[str] = []
    weight: int = Field(default=1, ge=0, le=1000)

    @model_validator(mode="before")
    @classmethod
    def _read_files(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return _with_file_contents(data, cls.model_fields.keys(), "psps")

    @model_validator(mode="after")
    def _currencies_known(self) -> PspSettings:
        unknown = [code for code in self.currency_codes if code not in CURRENCY_EXPONENTS]
        if unknown:
            raise ValueError(f"currency_codes: not ISO 4217 codes: {', '.join(unknown)}")
        return self


def development_psps(sandbox_url: str) -> list[PspSettings]:
    """Two sandbox PSPs, so that routing has a choice."""
    return [
        PspSettings(
            name=name,
            adapter="sandbox",
            base_url=f"{sandbox_url}/{name}",
            api_key=SecretStr("sk_test_sandbox"),
            payout_api_key=SecretStr("sk_payout_sandbox"),
            webhook_secret=SecretStr("whsec_sandbox_dev"),
        )
        for name in ("sandbox", "sandbox2")
    ]


class Settings(BaseSettings):
    """All settings; every field has a development default. Build with `Settings.load()`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, validate_default=True)

    # where state lives
    data_dir: str = Field(".ducat", description="folder of logs, snapshots and embedded servers")
    database_url: str = Field("", repr=False, description="PostgreSQL URL; empty = the embedded one of `ducat up`")
    redis_url: str = Field("", repr=False, description="Valkey or Redis URL; empty = the embedded one of `ducat up`")
    redis_timeout_ms: int = Field(
        5_000, ge=50, description="how long one command of the read model waits for a Valkey that does not answer"
    )
    bus: Literal["valkey", "kafka"] = Field("valkey", description="engine of the bus")
    kafka_bootstrap: str = Field("", description="host:port,… of Kafka; needed with bus = kafka and wallet_log = kafka")

    # addresses
    gateway_listen: str = Field("127.0.0.1:8080", description="HTTP address of the gateway; port 0 = any free one")
    payment_listen: str = Field("127.0.0.1:50051", description="gRPC address of payment")
    executor_listen: str = Field("127.0.0.1:50052", description="gRPC address of the executor")
    wallet_listen: str = Field("127.0.0.1:50053", description="gRPC address of the wallet")
    ledger_listen: str = Field("127.0.0.1:50054", description="gRPC address of the ledger")
    sandbox_listen: str = Field("127.0.0.1:8070", description="HTTP address of the sandbox PSP")
    payment_address: str = Field(
        default_factory=lambda data: dial(data, "payment_listen"), description="where payment is called"
    )
    executor_address: str = Field(
        default_factory=lambda data: dial(data, "executor_listen"), description="where the executor is called"
    )
    wallet_address: str = Field(
        default_factory=lambda data: dial(data, "wallet_listen"), description="where the wallet is called"
    )
    ledger_address: str = Field(
        default_factory=lambda data: dial(data, "ledger_listen"), description="where the ledger is called"
    )
    gateway_url: str = Field("http://127.0.0.1:8080", description="public base of checkout, return and webhook URLs")
    sandbox_url: str = Field("http://127.0.0.1:8070", description="base URL of the sandbox PSP")
    metrics_listen_gateway: str = Field("", description="Prometheus address of the gateway; empty = off")
    metrics_listen_payment: str = Field("", description="Prometheus address of payment; empty = off")
    metrics_listen_executor: str = Field("", description="Prometheus address of the executor; empty = off")
    metrics_listen_wallet: str = Field("", description="Prometheus address of the wallet; empty = off")
    metrics_listen_ledger: str = Field("", description="Prometheus address of the ledger; empty = off")
    metrics_listen_sandbox: str = Field("", description="Prometheus address of the sandbox; empty = off")

    # security (docs/security.md)
    tls_cert_file: str = Field("", description="certificate chain (PEM) of this process; reloaded when it changes")
    tls_key_file: str = Field("", description="private key (PEM) of this process")
    tls_ca_file: str = Field("", description="certificate authority (PEM) of peers")
    tls_client_auth: bool = Field(False, description="callers must show a certificate of tls_ca_file (mTLS)")
    auth_tokens_file: str = Field(
        "", description="TOML file of token hashes and scopes; empty = no authentication (loopback only)"
    )
    auth_token: SecretStr = Field(SecretStr(""), description="token that this process sends")

    grpc_proxy: bool = Field(
        False,
        description="calls beyond loopback go through the proxy of the environment (grpc_proxy, https_proxy); needs TLS",
    )

    # what an operator sees
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")
    log_format: Literal["json", "text"] = Field("json", description="json for machines, text for people")
    otel_endpoint: str = Field(
        "", description="OTLP/gRPC endpoint for spans, such as http://127.0.0.1:4317; empty = off"
    )

    # limits
    grpc_concurrency_max: int = Field(
        512,
        ge=1,
        description="RPCs at once: unary calls and streams, of callers and of other processes each; more are refused",
    )
    grpc_caller_rate_max: float = Field(
        0, ge=0, description="calls a second of one token; a bulk stream is one call; more are refused; 0 = any"
    )
    grpc_message_bytes_max: int = Field(8 * 1024 * 1024, ge=4096, description="largest gRPC message")
    request_deadline_ms: int = Field(10_000, ge=1, description="deadline of a unary call whose caller set none")
    shutdown_grace_ms: int = Field(5_000, ge=0, description="how long running RPCs may take to end at shutdown")
    orders_per_payment_max: int = Field(100, ge=1, le=1000, description="payment orders in one checkout")
    order_expiry_s: int = Field(86_400, ge=60, description="how long an order may stay unpaid before it expires")
    body_bytes_max: int = Field(262_144, ge=1024, description="largest HTTP body at the gateway")
    gateway_api_concurrency_max: int = Field(512, ge=1, description="calls of the REST API at once; more get 503")
    gateway_webhook_concurrency_max: int = Field(256, ge=1, description="webhooks at once; more get 503")
    gateway_page_concurrency_max: int = Field(256, ge=1, description="requests for pages at once; more get 503")
    gateway_caller_rate_max: float = Field(
        1_000, ge=0, description="calls a second of one token, or of one address without tokens; more get 429; 0 = any"
    )
    gateway_address_rate_max: float = Field(
        1_000, ge=0, description="webhooks, and pages, a second from one address; more get 429; 0 = any"
    )
    gateway_connections_max: int = Field(4_096, ge=1, description="HTTP connections of the gateway, idle ones included")
    gateway_connections_per_address_max: int = Field(
        3_072, ge=0, description="HTTP connections of the gateway from one address; 0 = as many as there are"
    )
    gateway_trusted_proxies: str = Field(
        "",
        description="addresses or networks of your own reverse proxies, with commas: their X-Forwarded-For is believed",
    )
    postgres_connections_max: int = Field(
        10, ge=3, description="connections of one process's pool; the outbox relay keeps one of them"
    )

    # executor
    executor_concurrency: int = Field(32, ge=1, description="orders that one executor runs at once")
    psp_timeout_ms: int = Field(10_000, ge=1, description="deadline of one call to a PSP")
    psp_proxy: str = Field(
        "",
        repr=False,
        pattern=r"^(https?://[^\s/]+/?)?$",
        description="proxy that PSPs are called through, such as http://egress.internal:3128; empty = none, whatever the environment says",
    )
    statement_descriptor: str = Field(
        "DUCAT MARKET",
        min_length=5,
        max_length=22,
        pattern=r"^[ !#-&()+-;=?-\[\]-~]*[A-Za-z][ !#-&()+-;=?-\[\]-~]*$",
        description="what the buyer's bank statement shows: 5 to 22 ASCII characters, one a letter, none of < > \\ ' \" *",
    )
    psps: list[PspSettings] = Field(
        default_factory=lambda data: development_psps(data.get("sandbox_url", "")),
        description="payment service providers",
    )
    unknown_poll_schedule_s: list[int] = Field(
        [2, 5, 15, 60, 300, 1800, 3600, 10800, 21600, 43200, 86400],
        min_length=1,
        description="when a PSP is asked again about an outcome that we did not get; the last repeats",
    )
    accepted_poll_schedule_s: list[int] = Field(
        [900, 3600, 14400, 86400],
        min_length=1,
        description="when a PSP is asked about what it took but never told the end of by webhook; the last repeats",
    )

    # wallet
    wallet_shard_count: int = Field(2, ge=1, le=64, description="shards of the whole system; fixed once data exist")
    wallet_shards: str = Field("", description='shards that this process owns, such as "0-3"; empty = all')
    wallet_segment_bytes: int = Field(
        64 * 1024 * 1024, ge=1024 * 1024, description="size of one event log segment file"
    )
    wallet_log: Literal["file", "kafka"] = Field(
        "file", description="where a shard's frames become durable; with kafka any node can take a shard over"
    )
    wallet_kafka_topic: str = Field(
        "ducat.wallet.log", min_length=1, description="topic of the shards' logs, a partition a shard"
    )
    wallet_kafka_min_insync_replicas: int = Field(
        0, ge=0, description="replicas that must have a frame before it counts; 0 = 2, or 1 where there is one broker"
    )
    wallet_kafka_timeout_ms: int = Field(
        30_000, ge=2_000, le=600_000, description="how long an append waits for Kafka before the wallet stops"
    )
    wallet_disk_reserve_bytes: int = Field(
        256 * 1024 * 1024, ge=0, description="free disk below which writes are refused"
    )
    wallet_peers: str = Field(
        "", description='who owns the other shards, such as "2-3=10.0.0.2:50053 4-7=10.0.0.3:50053"'
    )
    wallet_alone: bool = Field(
        False, description="shards and gRPC alone: no database, no read model, no bus (benchmarks, embedding)"
    )
    wallet_projection: bool = Field(
        True, description="follow the logs into the read model (off: for measurements of the shards alone)"
    )
    wallet_id_window_ms: int = Field(7 * _DAY_MS, ge=60_000, description="how far back transfer ids are remembered")
    wallet_room_ids: int = Field(
        0,
        ge=0,
        le=2**30,
        description="transfers of a shard for whose ids memory is touched at the start, 30 bytes each: full speed at once",
    )
    wallet_keep_history: bool = Field(
        True, description="never delete event log segments; off: keep only what the two newest snapshots need"
    )
    wallet_check_interval_s: float = Field(
        60.0,
        ge=0,
        description="how often the wallet adds up the balances of all shards (it looks at every account); 0 = never",
    )
    wallet_scrub_bytes_per_s: int = Field(
        4 * 1024 * 1024,
        ge=0,
        description="how fast segments and snapshots are read and checked in the background; 0 = never",
    )
    wallet_scrub_interval_h: float = Field(
        24.0, gt=0, description="how often all of them are; longer where the rate is too low"
    )
    wallet_snapshot_events: int = Field(
        5_000_000, ge=0, description="events of a shard after which a snapshot is taken; 0 = only when asked for"
    )
    wallet_snapshots_kept: int = Field(
        2, ge=2, description="snapshots kept of each shard: a look into the past starts from the nearest one before it"
    )

    # ledger
    ledger_compare_interval_s: float = Field(
        60.0, ge=0, description="how often the ledger compares its accounts with the wallet's; 0 = only when asked"
    )
    ledger_compare_grace_s: float = Field(
        60.0,
        ge=1,
        description="how long an event may be applied by one of wallet and ledger alone before that is a difference",
    )
    ledger_compare_confirm_s: float = Field(
        20.0, ge=0, description="after how long an account that differs is looked at again before it is told"
    )

    # bus
    bus_delivery_count_max: int = Field(
        8, ge=1, description="deliveries of a message before it goes to the dead-letter topic"
    )
    bus_claim_idle_ms: int = Field(5_000, ge=100, description="after how long another consumer takes a stalled message")
    bus_group_idle_max_s: int = Field(
        86_400,
        ge=1,
        description="Valkey: how long a group without a living member holds back the trimming of its streams",
    )
    bus_stream_length_max: int = Field(
        1_000_000,
        ge=1_000,
        description="Valkey: messages that a stream keeps, about; the feed of the publisher has the rest",
    )

    # feeds (docs/bus.md)
    feed_check_interval_s: float = Field(
        10.0, gt=0, le=600, description="how often a consumer compares what it has applied with the publisher's feed"
    )
    feed_grace_s: float = Field(
        5.0, ge=0, le=600, description="how long the bus may take before a consumer fetches a message from the feed"
    )
    feed_retention_days: int = Field(
        30, ge=1, description="how long published messages are kept once every consumer has proven them"
    )

    # backups (docs/backup.md)
    backup_target: str = Field(
        "", description="where `ducat backup` keeps backups: a folder, or s3://bucket/prefix; empty = given by --to"
    )
    backup_s3_endpoint: str = Field("", description="URL of an S3-compatible server; empty = Amazon's own")
    backup_s3_region: str = Field(
        "", description="region of the bucket; empty = what boto3 finds in its own configuration"
    )
    backup_s3_access_key: str = Field("", description="access key; empty = what boto3 finds (environment, role)")
    backup_s3_secret_key: SecretStr = Field(SecretStr(""), description="the secret of the access key")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # load() has already laid the layers over one another

    @classmethod
    def load(
        cls,
        overrides: Mapping[str, Any] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        config_file: str | None = None,
    ) -> Settings:
        """The effective settings. `overrides` are flags by field name; a value of None means that the flag was not
        given.

        Raises SettingsInvalid naming each wrong key, where it stands and what to do.
        """
        layers = _Layers.read(
            cls.model_fields.keys(), overrides or {}, os.environ if environ is None else environ, config_file
        )
        try:
            settings = cls(**layers.values)
        except ValidationError as error:
            raise SettingsInvalid(_explain(error, layers.origins)) from None
        settings._origins.update(layers.origins)
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.bus == "kafka" and not self.kafka_bootstrap:
            raise ValueError("bus = kafka needs kafka_bootstrap (host:port)")
        if self.wallet_log == "kafka" and not self.kafka_bootstrap:
            raise ValueError("wallet_log = kafka needs kafka_bootstrap (host:port)")
        if self.grpc_proxy and not self.tls_ca_file:
            raise ValueError("grpc_proxy needs tls_ca_file: a proxy would read account numbers in the clear")
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ValueError("tls_cert_file and tls_key_file belong together; set both or neither")
        if self.tls_client_auth and not (self.tls_ca_file and self.tls_cert_file):
            raise ValueError("tls_client_auth needs tls_ca_file, tls_cert_file and tls_key_file")
        names = [psp.name for psp in self.psps]
        if len(set(names)) != len(names):
            raise ValueError(f"psps: names must differ, got {', '.join(names)}")
        for process in PROCESSES:
            split_address(self.listen_of(process))
        return self

    def listen_of(self, process: str) -> str:
        """The address that a process listens on."""
        return str(getattr(self, f"{process}_listen"))

    def metrics_listen_of(self, process: str) -> str:
        """The Prometheus address of a process; empty = off."""
        return str(getattr(self, f"metrics_listen_{process}", ""))

    def has_development_secrets(self) -> bool:
        """Whether a secret that stands in the public source is in use."""
        return any(
            secret.get_secret_value() in DEVELOPMENT_SECRETS
            for psp in self.psps
            for secret in (psp.api_key, psp.payout_api_key, psp.webhook_secret, psp.webhook_secret_previous)
        )

    def describe(self) -> list[SettingDescription]:
        """Every setting: name, value with secrets masked, where it comes from, what it is."""
        masked = self.masked()
        return [
            SettingDescription(name, masked[name], self._origins.get(name, "default"), field.description or "")
            for name, field in type(self).model_fields.items()
        ]

    def masked(self) -> dict[str, Any]:
        """All values, plain types, every secret as `mask()` shows it."""
        return {name: _masked(getattr(self, name)) for name in type(self).model_fields}

    def environment(self) -> dict[str, str]:
        """These settings as environment variables, for a child process. Contains secrets: never log it."""
        return {
            f"{PREFIX}{name.upper()}": text
            if isinstance(text := _plain(getattr(self, name)), str)
            else json.dumps(text)
            for name in type(self).model_fields
        }


@dataclass(frozen=True, slots=True)
class SettingDescription:
    """One line of `ducat config`."""

    name: str
    value: Any
    source: str
    help: str


@dataclass(frozen=True, slots=True)
class _Layers:
    """The raw values, the highest layer first to win, and where each came from."""

    values: dict[str, Any]
    origins: dict[str, str]

    @classmethod
    def read(
        cls, known: Any, overrides: Mapping[str, Any], environ: Mapping[str, str], config_file: str | None
    ) -> _Layers:
        values, origins = _read_config_file(known, config_file or environ.get(f"{PREFIX}CONFIG_FILE", ""))
        for name in known:
            variable = f"{PREFIX}{name.upper()}"
            if f"{variable}_FILE" in environ and f"{name}_file" not in known and environ[f"{variable}_FILE"]:
                path = environ[f"{variable}_FILE"]
                values[name], origins[name] = (
                    _decode(name, _read_secret(path, f"{variable}_FILE")),
                    f"file {path} ({variable}_FILE)",
                )
            if variable in environ:
                values[name], origins[name] = _decode(name, environ[variable]), f"environment {variable}"
        for name, value in overrides.items():
            if value is None:
                continue
            if name not in known:
                raise SettingsInvalid(f"flag --{name.replace('_', '-')}: no such setting{_did_you_mean(name, known)}")
            values[name], origins[name] = _decode(name, value) if isinstance(value, str) else value, "flag"
        return cls(values, origins)


_LISTS = ("psps", "unknown_poll_schedule_s", "accepted_poll_schedule_s")


def _decode(name: str, text: str) -> Any:
    """Lists come as JSON in the environment and in flags; everything else is left to the type of its field."""
    if name not in _LISTS:
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise SettingsInvalid(f"{name}: expected a JSON list, got something else ({error})") from None


def _read_config_file(known: Any, named: str) -> tuple[dict[str, Any], dict[str, str]]:
    path = Path(named or CONFIG_FILE)
    if not path.exists():
        if named:
            raise SettingsInvalid(f"{path}: no such file; mend {PREFIX}CONFIG_FILE or the --config flag")
        return {}, {}
    try:
        data = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise SettingsInvalid(f"{path}: cannot be read: {error.strerror}") from None
    values = _with_file_contents(data, known, str(path))
    for key in values:
        if key not in known:
            raise SettingsInvalid(f"{path}: unknown key `{key}`{_did_you_mean(key, known)}")
    return values, dict.fromkeys(values, str(path))


def _with_file_contents(data: dict[str, Any], known: Any, where: str) -> dict[str, Any]:
    """Replaces each `<name>_file` that is no setting of its own by `<name>` with the content of that file."""
    values = dict(data)
    for key, path in data.items():
        name = key.removesuffix("_file")
        if name == key or key in known or name not in known:
            continue
        if name in data:
            raise SettingsInvalid(f"{where}: both `{name}` and `{key}` are set; keep one")
        del values[key]
        values[name] = _read_secret(str(path), f"{where}: {key}")
    return values


def _read_secret(path: str, where: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"{where}: {path} cannot be read: {error}") from None


def _did_you_mean(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean `{near[0]}`?" if near else "; see `ducat config` for the names"


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    """One line a wrong key. Never the value: it may be a secret."""
    lines = []
    for each in error.errors(include_url=False, include_input=False, include_context=False):
        if each["type"] == "default_factory_not_called":
            continue  # only says that another field is wrong
        path = ".".join(str(part) for part in each["loc"])
        name = str(each["loc"][0]) if each["loc"] else ""
        where = f" (from {origins[name]})" if name in origins else ""
        lines.append(f"{path}{where}: {each['msg']}" if path else each["msg"].removeprefix("Value error, "))
    return "\n".join(lines)


def mask(secret: str) -> str:
    """`****`, and the last four characters where at least sixteen others stay hidden; nothing for an empty one."""
    if not secret:
        return ""
    return f"****{secret[-4:]}" if len(secret) >= 20 else "****"


def _masked(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return mask(value.get_secret_value())
    if isinstance(value, list):
        return [_masked(each) for each in value]
    if isinstance(value, str):
        return _URL_PASSWORD.sub(r"\1\2****", value)
    if isinstance(value, BaseModel):
        return {name: _masked(getattr(value, name)) for name in type(value).model_fields}
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    return value


def dial(data: Mapping[str, Any], listen: str) -> str:
    """The address to call a process by that listens on `listen`: a wildcard host becomes localhost."""
    address = str(data.get(listen, ""))
    try:
        host, port = split_address(address)
    except ValueError:
        return address
    return f"localhost:{port}" if host in {"0.0.0.0", "::", "*"} else address  # noqa: S104 - compared, not bound


def split_address(address: str) -> tuple[str, int]:
    """``127.0.0.1:50051`` or ``[::1]:50051`` → host and port."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not 0 <= int(port) <= 65535 or not host:
        raise ValueError(f"expected host:port such as 127.0.0.1:50051, got {address!r}")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` can be reached from this machine alone. A name other than localhost counts as beyond it."""
    host, _ = split_address(address)
    if host in {"localhost", "::1"}:
        return True
    parts = host.split(".")
    return len(parts) == 4 and parts[0] == "127" and all(part.isdigit() and int(part) < 256 for part in parts)
