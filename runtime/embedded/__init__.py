"""Servers from PyPI wheels, for a machine that has no PostgreSQL and no Valkey of its own: the same code path, durable settings.

Both classes are synchronous (they wait for a child process): call them in a thread from asyncio. `start()` is idempotent in its effect:
what an earlier, killed run left behind is stopped and recovered first. A killed server comes back on the same URL with `start()`.

On Linux the servers stop cleanly when their parent dies, SIGKILL included. Elsewhere they stay; the next start
on their folder stops them where it can find them (/proc), and is refused where it cannot: the folder is locked while a server runs.
"""

from __future__ import annotations

from runtime.embedded._server import ServerFailed, free_port, private_folder
from runtime.embedded.postgres import EmbeddedPostgres
from runtime.embedded.valkey import EmbeddedValkey

__all__ = ["EmbeddedPostgres", "EmbeddedValkey", "ServerFailed", "free_port", "private_folder"]
