"""What locust loads: `locust -f loadtest/locustfile.py --host http://127.0.0.1:8080`, or `make loadtest` for all of it.

Under gevent the gRPC users take the synchronous stubs; channels are opened in `on_start`, after locust has forked.
"""

from __future__ import annotations

import grpc.experimental.gevent

grpc.experimental.gevent.init_gevent()

from loadtest.users.checkout import CheckoutUser  # noqa: E402
from loadtest.users.transfer import TransferUser  # noqa: E402

__all__ = ["CheckoutUser", "TransferUser"]
