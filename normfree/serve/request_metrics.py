"""Metrics of a server in the Prometheus text format, and a log line for each request that fails."""

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
# Requests for other paths are counted together, so that clients cannot create time series.
PATHS = ("/", "/predict", "/health", "/metrics")
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class RequestMetrics:
    """The metrics of one server.

    Args:
        queue_length: returns the number of images that wait for the network; called whenever the metrics are read.
        held_bytes: returns the bytes of all bodies that are being read or decoded.
        waiting_pixels: returns the pixels of all images that wait to be decoded or are being decoded.
    """

    def __init__(
        self,
        queue_length: Callable[[], float],
        *,
        held_bytes: Callable[[], float],
        waiting_pixels: Callable[[], float],
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "normfree_requests", "Requests, by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "normfree_request_seconds",
            "Seconds from the head of a request to the end of its response.",
            ["path"],
            registry=registry,
        )
        self.images = Counter("normfree_images", "Images, by result.", ["result"], registry=registry)
        self.batch_size = Histogram(
            "normfree_batch_size", "Images per batch.", buckets=_SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "normfree_batch_seconds", "Seconds of a batch in the network.", registry=registry
        )
        for name, what, function in (
            ("queue_length", "Images that wait for the network.", queue_length),
            ("held_bytes", "Bytes of bodies that are being read or decoded.", held_bytes),
            ("waiting_pixels", "Pixels that wait to be decoded or are being decoded.", waiting_pixels),
        ):
            Gauge(f"normfree_{name}", what, registry=registry).set_function(function)

    def on_batch(self, size: int, seconds: float) -> None:
        """Record a batch of `size` images that took `seconds`."""
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class RequestMonitor:
    """ASGI middleware that counts and times requests and gives each an id.

    It turns an uncaught exception into a log line and a response with status 500 and that id.
    """

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, request_id = time.monotonic(), 0, uuid4().hex[:12]
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            await self.app(scope, receive, send_and_record)
        except asyncio.CancelledError:  # uvicorn's time for open requests is over
            log.warning(
                "request %s: %s %r canceled, the server is stopping",
                request_id,
                scope["method"],
                scope["path"],
            )
            if status == 0:
                await JSONResponse({"error": "the server is stopping"}, status_code=503)(
                    scope, receive, send_and_record
                )
        except Exception:
            log.exception("request %s: %s %r failed", request_id, scope["method"], scope["path"])
            if status == 0:
                response = JSONResponse({"error": f"internal error, request {request_id}"}, status_code=500)
                await response(scope, receive, send_and_record)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - started)
