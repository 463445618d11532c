"""Numbers about a server in the Prometheus text format, and one log line for everything that goes wrong in it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from uuid import uuid4

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("normfree.serve")
#: Others are counted together: a stranger's paths must not become time series.
PATHS = ("/", "/predict", "/health", "/metrics")
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one server. `queue_length` is asked whenever the numbers are read."""

    def __init__(self, queue_length: Callable[[], float]) -> None:
        self.registry = here = CollectorRegistry()
        self.requests = Counter(
            "normfree_requests", "Requests answered, by path and status.", ["path", "status"], registry=here
        )
        self.seconds = Histogram(
            "normfree_request_seconds",
            "From a request's head to the end of its answer.",
            ["path"],
            registry=here,
        )
        self.pictures = Counter(
            "normfree_pictures", "Pictures, by what became of them.", ["result"], registry=here
        )
        self.batch_size = Histogram(
            "normfree_batch_size", "Pictures per batch.", buckets=_SIZES, registry=here
        )
        self.batch_seconds = Histogram(
            "normfree_batch_seconds", "A batch's time in the network.", registry=here
        )
        Gauge("normfree_queue_length", "Pictures that wait.", registry=here).set_function(queue_length)

    def on_batch(self, size: int, seconds: float) -> None:
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Watch:
    """ASGI middleware: counts and times every request, gives it an id, and turns an exception that nobody caught
    into a log line and an answer 500 with that id."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, name = time.monotonic(), 0, uuid4().hex[:12]
        scope.setdefault("state", {})["request_id"] = name

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                headers["x-content-type-options"] = "nosniff"
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            await self.app(scope, receive, note)
        except asyncio.CancelledError:  # uvicorn's grace is over
            log.warning(
                "request %s: %s %r given up, the server is stopping", name, scope["method"], scope["path"]
            )
            if status == 0:
                await JSONResponse({"error": "the server is stopping"}, status_code=503)(scope, receive, note)
        except Exception:
            log.exception("request %s: %s %r failed", name, scope["method"], scope["path"])
            if status == 0:
                answer = JSONResponse({"error": f"internal error, request {name}"}, status_code=500)
                await answer(scope, receive, note)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - started)
