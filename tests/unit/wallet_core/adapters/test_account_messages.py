"""Risk: accounts that native code opens and reads are not those that the protobuf library would have read, or are answered
otherwise. Two wallets get the same bytes; one of them takes nothing natively. Whatever comes back must be equal, byte for
byte, errors too.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ducat.wallet.v1 import wallet_pb2
from kernel.clock import FixedClock
from kernel.errors import DucatError, InvalidArgument, OutOfRange
from kernel.ids import account_id, derived_transfer_id
from tests.unit.wallet_core.service.memory_host import MemoryDirectory, MemoryHost, NoReadModel
from wallet_core.adapters.grpc import WalletServicer
from wallet_core.engine.codes import AMOUNT_MAX, AccountFlags, TransferFlags
from wallet_core.service.history import History
from wallet_core.service.port import AccountRow, TransferRow, slot_of
from wallet_core.service.wallet import Wallet
from wallet_core.shard import ShardClock, ShardHostConfig, WalletHost

NOW_MS = 1_800_000_000_000
CLEARING = bytes(15) + b"\x07"
FAR = 2**63 - 1


class LongWay(WalletHost):
    """Every row is an object."""

    async def account_message(self, message: bytes) -> None:
        return None

    async def read_message(self, message: bytes) -> None:
        return None


class Served:
    """The servicer over real shards."""

    def __init__(self, host: WalletHost) -> None:
        self.host = host
        archive = MemoryHost(FixedClock(0))
        wallet = Wallet(host, MemoryDirectory(), NoReadModel(), read_wait_s=0.05)
        self.servicer = WalletServicer(host, wallet, History(host, archive, FixedClock(0)))

    async def open(self, raw: bytes) -> object:
        return await _outcome(self.servicer.CreateAccounts(raw, None))

    async def get(self, raw: bytes) -> object:
        return await _outcome(self.servicer.GetAccounts(raw, None))


async def _outcome(call: object) -> object:
    """The answer, or all that the caller would hear of the error."""
    try:
        return await call  # type: ignore[misc]
    except DucatError as error:
        return type(error), error.message, error.reason, error.metadata, getattr(error, "violations", None)
    except Exception as error:
        return type(error), str(error)


async def opened(folder: Path, shards: int, owned: tuple[int, ...] = ()) -> tuple[Served, Served]:
    """One that takes natively what it can, and one that does not."""
    made = []
    for place, kind in (("short", WalletHost), ("long", LongWay)):
        settings = ShardHostConfig(
            data_dir=folder / place, shard_count=shards, shard_ids=owned, segment_bytes=1 << 20, reserve_bytes=0
        )
        made.append(Served(await kind.open(settings, clock=ShardClock(NOW_MS * 10**6))))
    return made[0], made[1]


def key(number: int) -> bytes:
    return account_id(f"test/{number}")


class Messages:
    """Random requests: most of them plain, many a little odd, some broken."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)

    def open_request(self) -> bytes:
        some = [self.spec() for _ in range(self.pick.choice([1, 1, 2, 3, 8, 40]))]
        return self.bent(b"".join(b"\x0a" + varint(len(one)) + one for one in some))

    def spec(self) -> bytes:
        pick = self.pick
        odd = pick.random() < 0.03
        fields = {
            "account_id": pick.choice([b"", b"short", bytes(16), b"\xff" * 16, b"x" * 17]) if odd else self.known(),
            "currency_code": pick.choice(["USD", "USD", "USD", "EUR", "", "U", "US", "usd", "U\0D"]),
            "overdraft_limit_minor": pick.choice([0, 0, 1, 127, 128, 10**12, -1, FAR, -FAR - 1]),
            "balance_limit_minor": pick.choice([0, 0, 0, 5, 10**9, -1, FAR]),
            "may_overdraw": pick.random() < 0.3,
            "frozen": pick.random() < 0.1,
            "closed": pick.random() < 0.05,
        }
        if pick.random() < 0.03:
            fields |= {"name": pick.choice(["seller/é/USD", "test/1", "n" * 200, "n" * 201, "\0"])}
        if pick.random() < 0.02:
            fields |= {"striped": True, "may_overdraw": True, "overdraft_limit_minor": 0, "balance_limit_minor": 0}
        if pick.random() < 0.02:
            fields |= {"currency_code": pick.choice(["USDX", "ÄÖÜ", "€"])}
        parts = [
            wallet_pb2.AccountSpec(**{name: value}).SerializeToString()  # type: ignore[arg-type]
            for name, value in fields.items()
        ]
        if pick.random() < 0.2:
            pick.shuffle(parts)
        if pick.random() < 0.1:
            parts.insert(pick.randrange(len(parts) + 1), pick.choice(parts))
        if pick.random() < 0.1:
            parts.insert(pick.randrange(len(parts) + 1), self.stranger())
        return b"".join(parts)

    def get_request(self) -> bytes:
        pick = self.pick
        request = wallet_pb2.GetAccountsRequest(
            account_ids=[self.known() for _ in range(pick.choice([0, 1, 2, 3, 10, 60]))]
        )
        if pick.random() < 0.05:
            request.account_ids.append(pick.choice([b"", b"x" * 15, b"x" * 17]))
        if pick.random() < 0.1:
            request.names.append(pick.choice(["test/1", "seller/é/USD", ""]))
        if pick.random() < 0.1:
            request.at_least.add(shard=pick.randrange(3), sequence_number=pick.choice([0, 1, 5]))
        return self.bent(request.SerializeToString())

    def known(self) -> bytes:
        return self.pick.choice([key(self.pick.randrange(300)), key(self.pick.randrange(300)), CLEARING])

    def stranger(self) -> bytes:
        """A field that the contract does not have, or has with another type, or none at all."""
        pick = self.pick
        number, wire = pick.choice([1, 2, 3, 4, 6, 9, 10, 15, 16, 5000, 2**29 - 1, 0]), pick.randrange(8)
        tag = varint(number << 3 | wire)
        if wire == 0:
            return tag + pick.choice(
                [b"\x00", b"\x01", b"\x80\x01", b"\x81\x00", b"\xff" * 9 + b"\x01", b"\xff" * 9 + b"\x02"]
            )
        if wire == 2:
            return tag + pick.choice([b"\x00", b"\x02ab", b"\x80\x00", b"\x82\x00ab", b"\x81\x80\x80\x80\x80\x00a"])
        return tag + bytes(8 if wire == 1 else 4 if wire == 5 else 0)

    def bent(self, raw: bytes) -> bytes:
        pick = self.pick
        how = pick.random()
        if how < 0.75 or not raw:
            return raw
        at = pick.randrange(len(raw))
        if how < 0.80:
            return raw[:at]
        if how < 0.88:
            return raw[:at] + bytes([raw[at] ^ 1 << pick.randrange(8)]) + raw[at + 1 :]
        if how < 0.92:
            return raw[:at] + bytes([pick.randrange(256)]) + raw[at:]
        if how < 0.96:
            return raw + self.stranger()
        return self.stranger() + raw


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


async def move_money(both: tuple[Served, Served], pick: random.Random, turn: int) -> None:
    """Transfers and holds that do not cross shards: both wallets' logs grow alike."""
    rows = []
    for number in range(5):
        debit, credit = key(pick.randrange(300)), CLEARING
        if pick.random() < 0.5:
            debit, credit = credit, debit
        amount = pick.choice([1, 50, 128, 10**6, 2**40, AMOUNT_MAX // 2])
        flags = int(TransferFlags.HOLD) if pick.random() < 0.3 else 0
        rows.append(TransferRow(derived_transfer_id(NOW_MS, str(turn), str(number)), debit, credit, amount, flags))
    assert await both[0].host.transfers(rows) == await both[1].host.transfers(rows)


@pytest.mark.parametrize(("shards", "owned"), [(1, ()), (4, ()), (3, (0, 2))])
async def test_any_request_is_answered_the_same_on_both_ways(
    tmp_path: Path, shards: int, owned: tuple[int, ...]
) -> None:
    short, long = await opened(tmp_path, shards, owned)
    messages = Messages(shards)
    clearing = AccountRow(CLEARING, "USD", int(AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED))
    for one in (short, long):
        assert await one.host.create_accounts([clearing]) == b"\x01"
    answers, refused, codes = 0, 0, set()
    for turn in range(400):
        raw = messages.open_request()
        was = await short.open(raw)
        assert was == await long.open(raw), raw.hex()
        if isinstance(was, bytes):
            codes |= set(wallet_pb2.CreateAccountsResponse.FromString(was).results)
        if turn % 5 == 0:
            await move_money((short, long), messages.pick, turn)
        raw = messages.get_request()
        was = await short.get(raw)
        assert was == await long.get(raw), raw.hex()
        answers += isinstance(was, bytes)
        refused += not isinstance(was, bytes)
    assert answers > 100
    assert refused > 20
    assert codes >= {1, 2, 3, 4, 5, 6}
    assert [one.digest for one in short.host.shards()] == [one.digest for one in long.host.shards()]
    for one in (short, long):
        await one.host.close()


async def test_what_is_plain_is_taken_and_the_rest_is_not(tmp_path: Path) -> None:
    """Equal answers would also come of a native way that takes nothing."""
    short, _long = await opened(tmp_path, 2)
    spec = wallet_pb2.AccountSpec(account_id=key(1), currency_code="USD", overdraft_limit_minor=5, frozen=True)
    plain = wallet_pb2.CreateAccountsRequest(accounts=[spec]).SerializeToString()
    wanted = wallet_pb2.GetAccountsRequest(account_ids=[key(1), key(2), key(1)]).SerializeToString()
    assert await short.host.account_message(plain + b"\x78\x01") == b"\x0a\x01\x01"
    read = await short.host.read_message(wanted + b"\x7d\x00\x00\x00\x00")
    assert read is not None
    assert read.ids == [key(1), key(1)]
    for change in ({"account_id": b""}, {"name": "x"}, {"striped": True}, {"currency_code": "€"}):
        odd = wallet_pb2.AccountSpec()
        odd.CopyFrom(spec)
        odd.MergeFrom(wallet_pb2.AccountSpec(**change))
        if "account_id" in change:
            odd.ClearField("account_id")
        request = wallet_pb2.CreateAccountsRequest(accounts=[spec, odd])
        assert await short.host.account_message(request.SerializeToString()) is None
    for cut in range(1, len(plain)):
        assert await short.host.account_message(plain[:cut]) is None
    for cut in range(1, len(wanted)):
        assert (await short.host.read_message(wanted[:cut]) is None) == (cut % 18 != 0)
    for odd_read in ({"names": ["x"]}, {"at_least": [wallet_pb2.ShardPosition()]}, {"account_ids": [b"x"]}, {}):
        raw = wallet_pb2.GetAccountsRequest(**odd_read).SerializeToString()
        assert await short.host.read_message(raw) is None
    for one in (short, _long):
        await one.host.close()


async def test_counts_at_their_bounds(tmp_path: Path) -> None:
    short, long = await opened(tmp_path, 2)
    for count in (0, 8190, 8191):
        specs = [wallet_pb2.AccountSpec(account_id=key(n), currency_code="USD") for n in range(count)]
        raw = wallet_pb2.CreateAccountsRequest(accounts=specs).SerializeToString()
        was = await short.open(raw)
        assert was == await long.open(raw)
        assert isinstance(was, bytes) == (count == 8190)
        raw = wallet_pb2.GetAccountsRequest(account_ids=[key(n) for n in range(count)]).SerializeToString()
        was = await short.get(raw)
        assert was == await long.get(raw)
        assert isinstance(was, bytes) == (count <= 8190)
    assert (await short.open(b""))[0] is InvalidArgument  # type: ignore[index]
    for one in (short, long):
        await one.host.close()


async def test_sums_of_a_striped_account_beyond_64_bits(tmp_path: Path) -> None:
    """Each part fits, what they add up to does not: refused on both ways, and answered where only what is available is cut."""
    short, long = await opened(tmp_path, 4)
    flags = int(AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED)
    others = [next(key(n) for n in range(100) if slot_of(key(n)) * 4 // 4096 == shard) for shard in range(4)]
    rich = AccountRow(key(500), "USD", 0, FAR)
    for one in (short, long):
        opening = [AccountRow(CLEARING, "USD", flags), *(AccountRow(each, "USD", 4) for each in others), rich]
        assert set(await one.host.create_accounts(opening)) == {1}
    seen = []
    for number, other in enumerate(others):
        rows = [
            TransferRow(derived_transfer_id(NOW_MS, "sum", str(number)), other, CLEARING, AMOUNT_MAX),
            TransferRow(derived_transfer_id(NOW_MS, "rich", str(number)), CLEARING, key(500), 1),
        ]
        raw = wallet_pb2.GetAccountsRequest(account_ids=[key(500), CLEARING, *others]).SerializeToString()
        for one in (short, long):
            assert set(await one.host.transfers(rows)) == {1}
        was = await short.get(raw)
        assert was == await long.get(raw)
        seen.append(bytes if isinstance(was, bytes) else was[0])  # type: ignore[index]
    assert seen == [bytes, bytes, OutOfRange, OutOfRange]
    for one in (short, long):
        await one.host.close()


async def test_names_are_answered_natively(tmp_path: Path) -> None:
    short, long = await opened(tmp_path, 2)
    names = ["seller/é/USD", "n" * 200, "€" * 200, ""]
    for name in names:
        fields = {"name": name} if name else {"account_id": key(9)}
        raw = wallet_pb2.CreateAccountsRequest(
            accounts=[wallet_pb2.AccountSpec(currency_code="USD", **fields)]
        ).SerializeToString()
        assert await short.open(raw) == await long.open(raw) == b"\x0a\x01\x01"
    ids = [account_id(name) if name else key(9) for name in names]
    raw = wallet_pb2.GetAccountsRequest(account_ids=ids).SerializeToString()
    was = await short.get(raw)
    assert was == await long.get(raw)
    assert isinstance(was, bytes)
    assert [one.name for one in wallet_pb2.GetAccountsResponse.FromString(was).accounts] == names
    assert await short.servicer._wallet.accounts_message(raw) == was
    for one in (short, long):
        await one.host.close()
