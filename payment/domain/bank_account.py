"""Bank accounts of people whom no PSP knows, checked by their country's rules. Every number is text: leading zeros count.

What is checked, and where the rule comes from:

    IFSC        ^[A-Z]{4}0[A-Z0-9]{6}$, no check digit (Reserve Bank of India)
    ABA         nine digits, Σ d × (3,7,1,3,7,1,3,7,1) ≡ 0 mod 10, first two 00–12, 21–32, 61–72 or 80, never 000000000
    sort code   six digits; the account number has 6 to 8 digits and is padded with zeros on the left to 8. The modulus
                check needs Vocalink's tables, which are not ours to ship: a pass means "could exist"
    BSB         six digits, no check digit (AusPayNet)
    IBAN        country, length, mod 97 = 1, the country's own structure (python-stdnum, from the SWIFT registry)
    BIC         ISO 9362, 8 or 11 characters
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from stdnum import bic as stdnum_bic
from stdnum import iban as stdnum_iban
from stdnum import numdb
from stdnum.exceptions import InvalidChecksum, ValidationError

from kernel.errors import FieldViolation

__all__ = ["BANK_SCHEMES", "BankAccount", "PostalAddress", "check_bank_account", "last_four"]

BANK_SCHEMES = ("ifsc", "aba_routing_number", "sort_code", "bsb", "iban")
"""The ways to name a bank; the names are those of the fields of ducat.payment.v1.BankAccount."""

_COUNTRIES_OF = {
    "ifsc": frozenset({"IN"}),
    "aba_routing_number": frozenset({"US", "PR", "GU", "VI", "AS", "MP"}),
    "sort_code": frozenset({"GB", "GG", "JE", "IM"}),
    "bsb": frozenset({"AU"}),
}
_SCHEMES_OF_COUNTRY: dict[str, tuple[str, ...]] = {
    **{country: (scheme,) for scheme, countries in _COUNTRIES_OF.items() for country in countries},
    **dict.fromkeys(_COUNTRIES_OF["sort_code"], ("sort_code", "iban")),
}
_IBAN_USERS = {
    "GB": frozenset({"GB", "GG", "JE", "IM"}),
    "FR": frozenset({"FR", "GF", "GP", "MQ", "RE", "PM", "YT", "NC", "PF", "WF", "BL", "MF", "TF"}),
}
"""Countries whose accounts have another country's IBAN."""

_ACCOUNT_NUMBER = {
    "ifsc": (re.compile(r"[0-9]{9,18}"), "9 to 18 digits"),
    "aba_routing_number": (re.compile(r"[0-9]{4,17}"), "4 to 17 digits"),
    "sort_code": (re.compile(r"[0-9]{6,8}"), "6 to 8 digits"),
    "bsb": (re.compile(r"[0-9]{5,9}"), "5 to 9 digits"),
    "": (re.compile(r"[A-Z0-9]{4,34}"), "4 to 34 letters and digits"),
}
_Violation = Callable[[str, str], None]
_SEPARATORS = re.compile(r"[\s-]")
_IFSC = re.compile(r"[A-Z]{4}0[A-Z0-9]{6}")
_NINE_DIGITS = re.compile(r"[0-9]{9}")
_SIX_DIGITS = re.compile(r"[0-9]{6}")
_IBAN = re.compile(r"[A-Z]{2}[0-9]{2}[A-Z0-9]{8,30}")
_IBAN_PART = re.compile(r"([0-9]+)!")
_IBAN_REGISTRY = numdb.get("iban")
_COUNTRY = re.compile(r"[A-Z]{2}")
_ABA_WEIGHTS = (3, 7, 1, 3, 7, 1, 3, 7, 1)


@dataclass(frozen=True, slots=True)
class PostalAddress:
    """A postal address, for compliance checks."""

    line1: str = ""
    line2: str = ""
    city: str = ""
    region: str = ""
    postal_code: str = ""
    country_code: str = ""


@dataclass(frozen=True, slots=True)
class BankAccount:
    """`scheme` is one of BANK_SCHEMES, or empty where only the BIC names the bank; `bank_code` is the value
    of that field.
    """

    account_holder_name: str
    country_code: str
    scheme: str = ""
    bank_code: str = ""
    account_number: str = ""
    bic: str = ""
    bank_name: str = ""
    address: PostalAddress | None = None

    def masked(self) -> BankAccount:
        """As it may be shown: account number and IBAN with their last four characters only."""
        return replace(
            self,
            account_number=last_four(self.account_number),
            bank_code=last_four(self.bank_code) if self.scheme == "iban" else self.bank_code,
        )


def last_four(number: str) -> str:
    """``****7890``; nothing but stars where four characters would be all there is; empty for empty."""
    if not number:
        return ""
    return f"****{number[-4:]}" if len(number) > 4 else "****"


def check_bank_account(account: BankAccount, path: str = "recipient") -> tuple[BankAccount, list[FieldViolation]]:
    """The account with its numbers normalized (no spaces or dashes, upper case, UK accounts padded), and everything
    that is wrong with it. Paths are those of the request, such as ``recipient.aba_routing_number``.
    """
    account = _normalized(account)
    wrong: list[FieldViolation] = []

    def violation(field: str, description: str) -> None:
        wrong.append(FieldViolation(f"{path}.{field}", description))

    address = account.address or PostalAddress()
    texts = {
        "account_holder_name": account.account_holder_name,
        "bank_name": account.bank_name,
        "address.line1": address.line1,
        "address.line2": address.line2,
        "address.city": address.city,
        "address.region": address.region,
        "address.postal_code": address.postal_code,
        "address.country_code": address.country_code,
    }
    for field, text in texts.items():
        if "\0" in text:
            violation(field, "must not hold the character NUL")
    if not account.account_holder_name.strip():
        violation("account_holder_name", "must name the owner of the account")
    if _COUNTRY.fullmatch(account.country_code) is None:
        violation(
            "country_code", f"expected an ISO 3166-1 code of two upper-case letters, got {account.country_code!r}"
        )
    _check_bank(account, violation)
    if account.bic:
        _check_bic(account.bic, violation)
    return account, wrong


def _normalized(account: BankAccount) -> BankAccount:
    def bare(number: str) -> str:
        return _SEPARATORS.sub("", number).upper()

    number = bare(account.account_number)
    if account.scheme == "sort_code" and number.isascii() and number.isdigit() and 6 <= len(number) <= 8:
        number = number.zfill(8)
    return replace(account, account_number=number, bank_code=bare(account.bank_code), bic=bare(account.bic))


def _check_bank(account: BankAccount, violation: _Violation) -> None:
    scheme, country = account.scheme, account.country_code
    wanted = _SCHEMES_OF_COUNTRY.get(country, ("iban",) if _iban_length(country) else ())
    if not scheme:
        if wanted:
            violation(wanted[0], f"is needed for an account in {country}" + (", or iban" if len(wanted) > 1 else ""))
        elif not account.bic:
            violation(
                "bank_identifier", "name the bank: one of ifsc, aba_routing_number, sort_code, bsb, iban, or else a bic"
            )
        _check_account_number(account, violation)
        return
    if scheme == "iban":
        _check_iban(account, violation)
        return
    if country not in _COUNTRIES_OF[scheme] and _COUNTRY.fullmatch(country):
        violation(scheme, f"names banks in {', '.join(sorted(_COUNTRIES_OF[scheme]))}, but country_code is {country}")
    problem = _CHECKS[scheme](account.bank_code)
    if problem:
        violation(scheme, problem)
    _check_account_number(account, violation)


def _check_account_number(account: BankAccount, violation: _Violation) -> None:
    pattern, expected = _ACCOUNT_NUMBER[account.scheme]
    if pattern.fullmatch(account.account_number) is None:
        came = f"{len(account.account_number)} characters" if account.account_number else "nothing"
        violation("account_number", f"expected {expected}, got {came}")  # never the number itself


def _check_iban(account: BankAccount, violation: _Violation) -> None:
    iban = account.bank_code
    if account.account_number and account.account_number not in iban:
        violation("account_number", "leave it empty: the IBAN names the account")
    problem = _iban_problem(iban)
    if problem:
        violation("iban", problem)
    elif account.country_code not in _IBAN_USERS.get(iban[:2], frozenset({iban[:2]})):
        violation("iban", f"is of {iban[:2]}, but country_code is {account.country_code}")


def _iban_problem(iban: str) -> str:
    """Never quotes the number: it is as secret as an account number."""
    if _IBAN.fullmatch(iban) is None:
        return "expected two letters, two check digits and up to 30 letters and digits"
    length = _iban_length(iban[:2])
    if not length:
        return f"{iban[:2]} is not a country that has IBANs"
    if len(iban) != length:
        return f"an IBAN of {iban[:2]} has {length} characters, got {len(iban)}"
    try:
        stdnum_iban.validate(iban)
    except InvalidChecksum:
        return "its check digits are wrong: is there a typing error?"
    except ValidationError:
        return f"does not have the structure of an IBAN of {iban[:2]}"
    return ""


def _check_bic(bic: str, violation: _Violation) -> None:
    try:
        stdnum_bic.validate(bic)
    except ValidationError:
        violation("bic", "expected a BIC of 8 or 11 characters, such as DEUTDEFF")


def _ifsc_problem(code: str) -> str:
    return "" if _IFSC.fullmatch(code) else f"expected four letters, a zero, six letters or digits, got {code!r}"


def _aba_problem(code: str) -> str:
    if _NINE_DIGITS.fullmatch(code) is None:
        return f"expected nine digits, got {code!r}"
    prefix = int(code[:2])
    if code == "000000000" or not (prefix <= 12 or 21 <= prefix <= 32 or 61 <= prefix <= 72 or prefix == 80):
        return f"{code} is in no range of routing numbers (first two digits 00-12, 21-32, 61-72 or 80)"
    if sum(weight * int(digit) for weight, digit in zip(_ABA_WEIGHTS, code, strict=True)) % 10:
        return f"the check digit of {code} is wrong: is there a typing error?"
    return ""


def _sort_code_problem(code: str) -> str:
    return "" if _SIX_DIGITS.fullmatch(code) else f"expected six digits, got {code!r}"


_CHECKS = {
    "ifsc": _ifsc_problem,
    "aba_routing_number": _aba_problem,
    "sort_code": _sort_code_problem,
    "bsb": _sort_code_problem,
}


def _iban_length(country: str) -> int:
    """Characters of a country's IBANs; 0 where it has none."""
    structure = _IBAN_REGISTRY.info(country)[0][1].get("bban", "")
    return 4 + sum(int(count) for count in _IBAN_PART.findall(structure)) if structure else 0
