from collections.abc import Iterable

from wallet_core.engine.views import AccountView, Counters, CurrencyTotals, HoldView, SendView

class Engine:
    """One shard's state machine. Columns are packed little-endian bytes; see _engine.pxd for the C interface.

    Calls raise ValueError naming a column of the wrong length, EngineRefused where the call as a whole contradicts the
    state, EnginePoisoned once memory ran out or a replay failed.
    """

    def __init__(
        self,
        shard: int = 0,
        *,
        id_window_ms: int = ...,
        id_count_max: int = ...,
        generation_ids: int = ...,
        accounts_max: int = ...,
        holds_max: int = ...,
        unsettled_max: int = ...,
        memory_bytes_max: int = 0,
        room_ids: int = 0,
    ) -> None: ...
    def transfers(
        self,
        ids: bytes,
        debit_ids: bytes,
        credit_ids: bytes,
        amounts: bytes,
        timestamp_ns: int,
        *,
        flags: bytes | None = None,
        pending_ids: bytes | None = None,
        timeouts_s: bytes | None = None,
        codes: bytes | None = None,
        credit_shards: bytes | None = None,
        rows: Iterable[int] | None = None,
        chain_steps: bool = False,
    ) -> tuple[bytes, bytes]:
        """(one TransferResult byte a row, event records). With `rows` only those rows, in that order. `chain_steps`: from
        the coordinator of chains across shards, so that rows may have TransferFlags.CHAIN."""

    def open_accounts(
        self,
        ids: bytes,
        currencies: bytes,
        timestamp_ns: int,
        *,
        flags: bytes | None = None,
        overdraft_limits: bytes | None = None,
        balance_limits: bytes | None = None,
    ) -> tuple[bytes, bytes]:
        """(one AccountResult byte a row, event records)."""

    def update_accounts(
        self,
        ids: bytes,
        timestamp_ns: int,
        *,
        flags: bytes | None = None,
        overdraft_limits: bytes | None = None,
        balance_limits: bytes | None = None,
    ) -> tuple[bytes, bytes]:
        """(one AccountResult byte a row, event records). Flags and limits are set, not merged."""

    def credits(
        self,
        source_shard: int,
        first_number: int,
        ids: bytes,
        credit_ids: bytes,
        amounts: bytes,
        currencies: bytes,
        timestamp_ns: int,
        *,
        codes: bytes | None = None,
    ) -> tuple[bytes, bytes]:
        """Saga step 2: (one TransferResult byte a row, event records)."""

    def outcomes(
        self, destination_shard: int, upto_number: int, refused: Iterable[tuple[int, int]], timestamp_ns: int
    ) -> bytes:
        """Saga step 3: event records. `refused`: (number, TransferResult), ascending."""

    def expire(self, timestamp_ns: int) -> bytes: ...
    def next_deadline(self) -> int:
        """Unix nanoseconds of the first hold to expire, 0 = none."""

    def replay_frame(self, records: bytes, first_sequence: int, timestamp_ns: int) -> None: ...
    def account(self, account_id: bytes) -> AccountView | None: ...
    def account_by_ordinal(self, ordinal: int) -> AccountView | None: ...
    def result(self, transfer_id: bytes) -> int:
        """The remembered TransferResult, 0 = not remembered."""

    def state_digest(self) -> bytes: ...
    def verify_digest(self) -> bool:
        """Recomputes the linear half of the digest from all accounts."""

    def status(self) -> Counters: ...
    def currency_totals(self) -> dict[str, CurrencyTotals]: ...
    def holds(self, debit_id: bytes) -> list[HoldView]:
        """Active holds on a debit account, in the order of their placing. Looks at every hold."""

    def hold_at(self, sequence: int) -> HoldView | None:
        """The hold that this event placed, if it is still active."""

    def set_id_window(self, id_window_ms: int) -> None: ...
    def prepare_memory(self) -> None: ...
    def memory_wanted(self) -> bool: ...
    def room_wanted(self) -> bool: ...
    def sent(self, destination_shard: int) -> tuple[int, int]:
        """(last settled, last sent) saga number."""

    def sends(self, destination_shard: int, from_number: int, limit: int) -> list[SendView]: ...
    def cursor(self, source_shard: int) -> int: ...
    def refusals(self, source_shard: int, from_number: int, limit: int) -> list[tuple[int, int]]: ...
    def forget(self, source_shard: int, upto_number: int) -> None: ...
    def image_begin(self) -> None: ...
    def image_piece(self) -> bytes:
        """The next piece, b"" after the last."""

    def image_end(self) -> None: ...
    def load(self, piece: bytes) -> None: ...
    def loaded(self) -> None: ...
