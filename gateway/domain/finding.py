"""What callers ask about findings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from gateway.domain.document import DOCUMENT, NumberText, kind_of, read_document
from gateway.domain.fields import UNPRINTABLE, is_id
from kernel.errors import FieldViolation

__all__ = ["PAGE_SIZE_MAX", "QUERY_FIELDS", "FindingQuery", "Resolution", "parse_finding_query", "parse_resolution"]

PAGE_SIZE_MAX = 500
REASON_LENGTH_MAX = 500
REQUEST_ID_LENGTH_MAX = 128
_LENGTHS = {
    "page_token": 512,
    "psp": 64,
    "seller_account": 128,
    "reference": 255,
    "checkout_id": 128,
}
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9:]{8}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})")
"""RFC 3339."""
QUERY_FIELDS = ("page_size", *_LENGTHS, "open_only", "kind", "subject", "start_time", "end_time")
"""The fields of a query, all optional."""


@dataclass(frozen=True, slots=True)
class FindingQuery:
    """Which findings. Empty fields do not filter."""

    page_size: int = 0
    page_token: str = ""
    open_only: bool = False
    kind: str = ""
    psp: str = ""
    seller_account: str = ""
    subject: str = ""
    reference: str = ""
    checkout_id: str = ""
    start_time: datetime | None = None
    end_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Resolution:
    """Why a finding is no problem any more."""

    reason: str
    request_id: str


def parse_finding_query(
    query: Mapping[str, str], kinds: frozenset[str], subjects: frozenset[str]
) -> FindingQuery | list[FieldViolation]:
    """The query, or everything that is wrong with it. `kinds` and `subjects` are the names that there are."""
    wrong = [
        FieldViolation(name, f"is not known; the fields are {', '.join(QUERY_FIELDS)}")
        for name in query
        if name not in QUERY_FIELDS
    ]
    wrong += [FieldViolation(name, "must not be empty; leave it out") for name, value in query.items() if not value]
    wrong += [
        FieldViolation(name, f"may have at most {most} characters")
        for name, most in _LENGTHS.items()
        if len(query.get(name, "")) > most
    ]
    size = query.get("page_size", "")
    if size and not (size.isascii() and size.isdigit() and 1 <= int(size[:9]) <= PAGE_SIZE_MAX):
        wrong.append(FieldViolation("page_size", f"must be a number from 1 to {PAGE_SIZE_MAX}"))
    open_only = query.get("open_only", "")
    if open_only not in ("", "true", "false"):
        wrong.append(FieldViolation("open_only", "must be true or false"))
    for name, known in (("kind", kinds), ("subject", subjects)):
        if query.get(name, "") and query[name] not in known:
            wrong.append(FieldViolation(name, f"must be one of {', '.join(sorted(known))}"))
    times = {name: _time_of(query.get(name, "")) for name in ("start_time", "end_time")}
    wrong += [
        FieldViolation(name, "must be a time with its zone, such as 2026-01-31T12:00:00Z")
        for name, time in times.items()
        if time is None and query.get(name, "")
    ]
    if wrong:
        return wrong
    return FindingQuery(
        page_size=int(size or 0),
        open_only=open_only == "true",
        kind=query.get("kind", ""),
        subject=query.get("subject", ""),
        start_time=times["start_time"],
        end_time=times["end_time"],
        **{name: query.get(name, "") for name in _LENGTHS},
    )


def parse_resolution(body: bytes) -> Resolution | list[FieldViolation]:
    """``{"reason": …, "request_id": …}``, or everything that is wrong with it."""
    document = read_document(body)
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        return [FieldViolation(DOCUMENT, f"must be an object, not {kind_of(document)}")]
    wrong = [FieldViolation(name, "comes twice") for name in getattr(document, "repeated", ())]
    wrong += [
        FieldViolation(str(name), "is not a field of a resolution")
        for name in document
        if name not in ("reason", "request_id")
    ]
    reason, request_id = document.get("reason"), document.get("request_id")
    if (
        not isinstance(reason, str)
        or isinstance(reason, NumberText)
        or not reason.strip()
        or len(reason) > REASON_LENGTH_MAX
    ):
        wrong.append(FieldViolation("reason", f"must be text of 1 to {REASON_LENGTH_MAX} characters"))
    elif UNPRINTABLE.search(reason) is not None:
        wrong.append(FieldViolation("reason", "has a control character or half of a surrogate pair"))
    if not isinstance(request_id, str) or isinstance(request_id, NumberText) or not is_id(request_id):
        wrong.append(
            FieldViolation(
                "request_id", f"must be an id of 1 to {REQUEST_ID_LENGTH_MAX} characters: letters, digits, . _ : -"
            )
        )
    if wrong:
        return wrong
    return Resolution(str(reason), str(request_id))


def _time_of(text: str) -> datetime | None:
    if _TIME.fullmatch(text) is None:
        return None
    try:
        return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
