"""The real sandbox over loopback HTTP, in the test's own loop, with a gateway that keeps what the webhooks brought."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from executor.psp.base import PspConfig
from sandbox.bootstrap import Sandbox
from sandbox.psp import PspName

API_KEY = "sk_contract"
PAYOUT_API_KEY = "sk_contract_payout"
WEBHOOK_SECRET = "whsec_contract"


class Server:
    """An ASGI application on a free port. `kill()` drops everything that only lives in memory, as SIGKILL does."""

    def __init__(self, app: Any, port: int = 0) -> None:
        self.listening = socket.socket()
        self.listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listening.bind(("127.0.0.1", port))
        self.port = self.listening.getsockname()[1]
        self.app = app

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        config = uvicorn.Config(
            self.app,
            interface="asgi3",
            proxy_headers=False,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            loop="none",
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        await self._server.startup(sockets=[self.listening])

    async def kill(self) -> None:
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        for task in list(self._server.server_state.tasks):
            task.cancel()
        await asyncio.sleep(0)
        self.listening.close()


class Gateway:
    """Takes webhooks; `refuse` makes it answer 503."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, str], bytes]] = []
        self.refuse = False
        self._changed = asyncio.Condition()

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        status = 503 if self.refuse else 200
        if not self.refuse:
            async with self._changed:
                self.calls.append((scope["path"], headers, body))
                self._changed.notify_all()
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    def types(self) -> list[str]:
        return [json.loads(body)["type"] for _, _, body in self.calls]

    async def until(self, condition: Callable[[Gateway], bool], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: condition(self))


class RunningSandbox:
    """The sandbox with one PSP name, `sandbox`, on a port of its own that stays the same over restarts."""

    def __init__(self, folder: Path, gateway_url: str) -> None:
        self._folder = folder
        self._gateway_url = gateway_url
        self._port = 0

    @property
    def base_url(self) -> str:
        return f"{self.url}/sandbox"

    async def start(self) -> None:
        self._server = Server(self._app, self._port)
        self._port = self._server.port
        self.url = self._server.url
        self.sandbox = Sandbox(
            self._folder / "sandbox.sqlite",
            [
                PspName(
                    "sandbox",
                    self.base_url,
                    API_KEY,
                    PAYOUT_API_KEY,
                    WEBHOOK_SECRET,
                    f"{self._gateway_url}/webhooks/sandbox",
                )
            ],
        )
        self._deliveries = asyncio.get_running_loop().create_task(self.sandbox.deliveries.run())
        await self._server.start()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        await self.sandbox.api(scope, receive, send)

    async def kill(self) -> None:
        await self._server.kill()
        self._deliveries.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._deliveries
        self.sandbox.store.close()

    def config(self, *, timeout_ms: int = 5_000, base_url: str = "") -> PspConfig:
        return PspConfig(
            name="sandbox",
            base_url=base_url or self.base_url,
            api_key=API_KEY,
            payout_api_key=PAYOUT_API_KEY,
            webhook_secret=WEBHOOK_SECRET,
            return_url="http://127.0.0.1:9/payment/return",
            payout_callback_url=f"{self._gateway_url}/webhooks/sandbox/payouts",
            statement_descriptor="Ducat Market",
            timeout_ms=timeout_ms,
        )
