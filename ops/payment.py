"""`ducat payment …`: what operators must look at.

findings                    where what a PSP says and what we have do not agree; the open ones
resolve ID --reason TEXT    close one
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import json
import uuid
from typing import TYPE_CHECKING, Any

from ops.terminal import printable
from runtime.settings import Settings

if TYPE_CHECKING:
    from ducat.payment.v1 import finding_pb2

__all__ = ["add_parser", "run"]

_PAGE_SIZE = 500


def add_parser(subparsers: Any) -> None:
    """`ducat payment` and its sub-commands."""
    parser = subparsers.add_parser("payment", help="what operators must look at: findings")
    commands = parser.add_subparsers(dest="payment_command", required=True, metavar="COMMAND")
    findings = commands.add_parser("findings", help="where a PSP and we do not agree, newest first")
    findings.add_argument("--all", action="store_true", help="also those that are resolved")
    findings.add_argument("--kind", metavar="KIND", help="only of this kind, such as amount_mismatch")
    findings.add_argument("--psp", default="", help="only of this PSP")
    findings.add_argument("--seller", default="", help="only of this seller")
    findings.add_argument("--checkout", default="", help="only of this checkout")
    resolve = commands.add_parser("resolve", help="close a finding")
    resolve.add_argument("finding_id", metavar="ID")
    resolve.add_argument("--reason", required=True, help="why it is no problem any more")
    resolve.add_argument("--request-id", help="the idempotency key (default: a new one)")
    for command in (findings, resolve):
        command.add_argument("--address", help="the payment service's gRPC address (default: the settings')")
        command.add_argument("--json", action="store_true", help="JSON, one object a line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs one sub-command; returns the exit code."""
    return asyncio.run(_run(args, Settings.load()))


async def _run(args: argparse.Namespace, settings: Settings) -> int:
    from ducat.payment.v1 import payment_service_pb2_grpc
    from runtime.channel import open_channel
    from runtime.errors import typed_rpc_errors

    channel = open_channel(args.address or settings.payment_address, settings)
    try:
        with typed_rpc_errors():
            return await _COMMANDS[args.payment_command](payment_service_pb2_grpc.PaymentServiceStub(channel), args)
    finally:
        await channel.close()


async def _findings(payments: Any, args: argparse.Namespace) -> int:
    from ducat.payment.v1 import finding_pb2
    from kernel.errors import InvalidArgument

    kind = 0
    if args.kind:
        names = {name.removeprefix("FINDING_KIND_").lower(): number for name, number in finding_pb2.FindingKind.items()}
        if args.kind.lower() not in names or not names[args.kind.lower()]:
            known = ", ".join(sorted(name for name, number in names.items() if number))
            raise InvalidArgument(f"--kind: expected one of {known}, got {args.kind!r}")
        kind = names[args.kind.lower()]
    request = finding_pb2.ListFindingsRequest(
        page_size=_PAGE_SIZE,
        open_only=not args.all,
        kind=kind,  # type: ignore[arg-type]
        psp=args.psp,
        seller_account=args.seller,
        checkout_id=args.checkout,
    )
    count = 0
    while True:
        page = await payments.ListFindings(request)
        for finding in page.findings:
            _show(finding, args.json)
        count += len(page.findings)
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    if not count and not args.json:
        print("no findings" if args.all else "no open findings")
    return 0


async def _resolve(payments: Any, args: argparse.Namespace) -> int:
    from ducat.payment.v1 import finding_pb2

    request = finding_pb2.ResolveFindingRequest(
        finding_id=args.finding_id,
        reason=args.reason,
        request_id=args.request_id or str(uuid.uuid4()),
        resolved_by=getpass.getuser(),
    )
    _show((await payments.ResolveFinding(request)).finding, args.json)
    return 0


def _show(finding: finding_pb2.Finding, as_json: bool) -> None:
    from ducat.payment.v1 import finding_pb2

    kind = finding_pb2.FindingKind.Name(finding.kind).removeprefix("FINDING_KIND_").lower()
    subject = finding_pb2.FindingSubject.Name(finding.subject).removeprefix("FINDING_SUBJECT_").lower()
    resolved = finding.resolve_time.ToJsonString() if finding.HasField("resolve_time") else None
    if as_json:
        record = {
            "finding_id": finding.finding_id,
            "kind": kind,
            "subject": subject,
            "reference": finding.reference,
            "checkout_id": finding.checkout_id,
            "seller_account": finding.seller_account,
            "psp": finding.psp,
            "psp_event_id": finding.psp_event_id,
            "text": finding.text,
            "ours": dict(finding.ours),
            "theirs": dict(finding.theirs),
            "create_time": finding.create_time.ToJsonString(),
            "resolve_time": resolved,
            "resolved_by": finding.resolved_by,
            "reason": finding.reason,
        }
        print(json.dumps(record))
        return
    lines = [
        f"{finding.finding_id}  {finding.create_time.ToJsonString()}  {kind}  {subject} {finding.reference}",
        f"  {finding.text}",
    ]
    if resolved:
        lines.append(f"  resolved {resolved} by {finding.resolved_by or 'nobody named'}: {finding.reason}")
    print("\n".join(map(printable, lines)))


_COMMANDS = {"findings": _findings, "resolve": _resolve}
