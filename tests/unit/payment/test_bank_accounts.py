"""Bank details: leading zeros, check digits, countries. Vectors of the central banks' and SWIFT's own documents."""

from __future__ import annotations

from typing import Any

import pytest

from kernel.errors import FieldViolation
from payment.domain.bank_account import BankAccount, check_bank_account, last_four


def account(country: str, scheme: str = "", code: str = "", number: str = "", **values: Any) -> BankAccount:
    return BankAccount(values.pop("holder", "Jane Doe"), country, scheme, code, number, **values)


def wrong(each: BankAccount) -> list[str]:
    return [violation.field for violation in check_bank_account(each)[1]]


GOOD = [
    account("US", "aba_routing_number", "021000021", "1234567890"),
    account("US", "aba_routing_number", "111000025", "0001"),
    account("PR", "aba_routing_number", "021502011", "12345678901234567"),
    account("GB", "sort_code", "089999", "66374958"),
    account("GB", "sort_code", "08-99-99", "6637 4958"),
    account("JE", "sort_code", "200000", "123456"),
    account("AU", "bsb", "062-000", "12345678"),
    account("IN", "ifsc", "HDFC0000001", "50100012345678"),
    account("IN", "ifsc", "sbin0001234", "000123456"),
    account("DE", "iban", "DE89 3704 0044 0532 0130 00"),
    account("GB", "iban", "GB82WEST12345698765432"),
    account("JE", "iban", "GB82WEST12345698765432"),
    account("NO", "iban", "NO9386011117947", bic="DNBANOKK"),
    account("FR", "iban", "FR1420041010050500013M02606"),
    account("RE", "iban", "FR1420041010050500013M02606"),
    account("JP", bic="BOTKJPJT", number="1234567"),
    account("SG", bic="DBSSSGSGXXX", number="001-2345-678"),
]
BAD = [
    (account("US", "aba_routing_number", "021000022", "1234567890"), ["recipient.aba_routing_number"]),  # check digit
    (account("US", "aba_routing_number", "123456789", "1234567890"), ["recipient.aba_routing_number"]),
    (account("US", "aba_routing_number", "000000000", "1234567890"), ["recipient.aba_routing_number"]),
    (account("US", "aba_routing_number", "131000029", "1234567890"), ["recipient.aba_routing_number"]),  # range 13
    (account("US", "aba_routing_number", "21000021", "1234567890"), ["recipient.aba_routing_number"]),  # zero lost
    (account("US", "aba_routing_number", "02100002१", "1234567890"), ["recipient.aba_routing_number"]),  # not ASCII
    (account("US", "aba_routing_number", "021000021", "123"), ["recipient.account_number"]),
    (account("US", "aba_routing_number", "021000021", "12345678901234567A"), ["recipient.account_number"]),
    (account("US", number="1234567890"), ["recipient.aba_routing_number"]),
    (account("US", "iban", "US891234567890123456"), ["recipient.iban"]),
    (account("GB", "aba_routing_number", "021000021", "1234567890"), ["recipient.aba_routing_number"]),
    (account("GB", "sort_code", "08999", "66374958"), ["recipient.sort_code"]),
    (account("GB", "sort_code", "089999", "663749581"), ["recipient.account_number"]),
    (account("GB", "sort_code", "089999", "12345"), ["recipient.account_number"]),
    (account("GB", number="12345678"), ["recipient.sort_code"]),
    (account("AU", "bsb", "06200", "12345678"), ["recipient.bsb"]),
    (account("AU", "bsb", "062000", "1234"), ["recipient.account_number"]),
    (account("IN", "ifsc", "HDFC1000001", "50100012345678"), ["recipient.ifsc"]),
    (account("IN", "ifsc", "HDF00000001", "50100012345678"), ["recipient.ifsc"]),
    (account("IN", "ifsc", "HDFC0000001", "12345678"), ["recipient.account_number"]),
    (account("DE", "iban", "DE89370400440532013001"), ["recipient.iban"]),  # check digits
    (account("DE", "iban", "DE8937040044053201300"), ["recipient.iban"]),  # length
    (account("DE", "iban", "FR1420041010050500013M02606"), ["recipient.iban"]),  # country
    (account("DE", "iban", "ZZ8937040044053201300000"), ["recipient.iban"]),
    (account("DE", "iban", "DE!9"), ["recipient.iban"]),
    (account("NO", "iban", "NO43860111179AB"), ["recipient.iban"]),
    (account("NO", "iban", "NOSTRUCTURE"), ["recipient.iban"]),  # letters where digits must be
    (account("DE", "iban", "DE89370400440532013000", "999999"), ["recipient.account_number"]),
    (account("DE", bic="DEUTDEFF", number="532013000"), ["recipient.iban"]),
    (account("JP", number="1234567"), ["recipient.bank_identifier"]),
    (account("JP", bic="BOTK", number="1234567"), ["recipient.bic"]),
    (account("JP", bic="BOTKJPJT"), ["recipient.account_number"]),
    (account("jp", bic="BOTKJPJT", number="1234567"), ["recipient.country_code"]),
    (account("JP", bic="BOTKJPJT", number="1234567", holder="  "), ["recipient.account_holder_name"]),
]


@pytest.mark.parametrize("each", GOOD, ids=lambda each: f"{each.country_code}-{each.scheme or 'bic'}")
def test_good_details_pass(each: BankAccount) -> None:
    assert wrong(each) == []


@pytest.mark.parametrize(("each", "fields"), BAD)
def test_bad_details_name_their_field(each: BankAccount, fields: list[str]) -> None:
    assert wrong(each) == fields


def test_every_violation_is_named_not_only_the_first() -> None:
    each = account("US", "aba_routing_number", "1", "x", holder="", bic="?")
    assert wrong(each) == [
        "recipient.account_holder_name",
        "recipient.aba_routing_number",
        "recipient.account_number",
        "recipient.bic",
    ]


def test_leading_zeros_survive_and_short_uk_accounts_are_padded() -> None:
    padded, _ = check_bank_account(account("GB", "sort_code", "00-00-01", "123456"))
    assert (padded.bank_code, padded.account_number) == ("000001", "00123456")
    kept, _ = check_bank_account(account("US", "aba_routing_number", "021000021", "0000123"))
    assert (kept.bank_code, kept.account_number) == ("021000021", "0000123")


def test_no_violation_quotes_an_account_number() -> None:
    for each, _ in BAD:
        _, violations = check_bank_account(each)
        for violation in violations:
            assert not each.account_number or each.account_number not in violation.description
            assert each.scheme != "iban" or each.bank_code not in violation.description
            assert isinstance(violation, FieldViolation)


def test_only_the_last_four_characters_are_shown() -> None:
    assert (last_four("1234567890"), last_four("1234"), last_four("")) == ("****7890", "****", "")
    masked = account("US", "aba_routing_number", "021000021", "1234567890").masked()
    assert (masked.account_number, masked.bank_code) == ("****7890", "021000021")
    masked = account("DE", "iban", "DE89370400440532013000").masked()
    assert (masked.bank_code, masked.account_number) == ("****3000", "")
