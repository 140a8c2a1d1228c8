"""What a caller of Ducat installs: the generated stubs and a thin client.

    import ducat

    with ducat.Client(address="ducat.internal:443", token=token, tls=ducat.TLS(ca="ca.pem")) as client:
        client.payments.get_payment(checkout_id="CHK-1")

`ducat.Client` blocks, `ducat.aio.Client` is for asyncio, `ducat.errors` is what calls raise, `ducat.batch` builds bulk
transfers. Messages are in `ducat.payment.v1.payment_pb2` and its siblings. Docs: docs/client.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ducat import aio, batch, errors
    from ducat.client import Client
    from ducat.config import TLS, Retry
    from ducat.errors import DucatError

__all__ = ["TLS", "Client", "DucatError", "Retry", "aio", "batch", "errors"]

_HOMES = {"Client": "client", "DucatError": "errors", "Retry": "config", "TLS": "config"}


def __getattr__(name: str) -> Any:
    """Imports at first use: a process that only needs stubs pays for nothing else."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name not in _HOMES:
        return import_module(f"{__name__}.{name}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
