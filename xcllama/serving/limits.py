"""What stands before every route: the bound of a body, and the count of requests."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .protocol import ApiError


class Limits:
    """ASGI middleware.

    Args:
        app: the application.
        max_bytes: of a body; a longer one is refused when that much of it has come.
        max_seconds: in which a body has to come.
        metrics: counts requests by route and status.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_seconds: float, metrics: Metrics):
        self.app, self.max_bytes, self.max_seconds, self.metrics = app, max_bytes, max_seconds, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        taken, status = 0, 500
        deadline: float | None = asyncio.get_running_loop().time() + self.max_seconds

        async def bounded() -> Message:
            nonlocal taken, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the body did not come in time.", code="timeout") from None
            if not message.get("more_body"):
                # what comes after the body is that the client goes away
                deadline = None
            taken += len(message.get("body", b""))
            if taken > self.max_bytes:
                message = f"the body is longer than {self.max_bytes} bytes."
                raise ApiError(413, message, code="body_too_large")
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, bounded, noted)
        finally:
            # the pattern of the route: what was asked for may name an id
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
