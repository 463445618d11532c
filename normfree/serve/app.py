"""The web application: a page, `/predict`, `/health` and `/metrics`.

POST /predict[?top=N]   a form with files, or one image as the body (image/*)
    200 {"predictions": [{"name": ..., "top": [{"class": ..., "probability": ...}, ...]},
                         {"name": ..., "error": ...}]}
    4xx {"error": ...}, with "predictions" if there were files but none was a usable image
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor

from normfree.suggest import needs, problem

with needs("normfree serve", install="normfree[serve]"):
    import prometheus_client  # noqa: F401  for request_metrics.py
    import python_multipart  # noqa: F401  for forms in starlette
    import uvicorn  # noqa: F401  for server.py
    from fastapi import FastAPI, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException

from normfree._version import __version__
from normfree.data.transforms.decode import ImageError, load_image
from normfree.device import run_device
from normfree.pretrained import TrainedModel
from normfree.serve.batching import Batcher, ClientLimit, Unavailable, probabilities
from normfree.serve.decoding import Decoders
from normfree.serve.index_page import index_page
from normfree.serve.limits import Budget, Limits, RequestError, client_of
from normfree.serve.origin import HostGuard
from normfree.serve.request_metrics import RequestMetrics, RequestMonitor, log
from normfree.serve.upload import CLIENT_LEFT, uploads

Result = TypeVar("Result")

# Threads that decode images, in each lane.
_DECODERS = max(2, min(4, os.cpu_count() or 1))
# Seconds in which images that wait for the network are answered at the end.
_STOP_SECONDS = 2.0
# Seconds. A small network has emptied a full queue by then.
_RETRY = {"Retry-After": "1"}
_REASON_LENGTH = 300
# Digits of a probability, as `normfree predict` prints them.
_DIGITS = 6


def create_app(
    model: TrainedModel,
    *,
    name: str = "",
    device: str | torch.device = "auto",
    max_batch: int = 16,
    max_delay_ms: float = 5.0,
    limits: Limits | None = None,
    hosts: Sequence[str] = (),
) -> FastAPI:
    """Return the application that serves `model`.

    Its probabilities are those of `normfree.predict` up to rounding. The network runs once before this function
    returns, so that a network that cannot run is found early.

    Args:
        model: a trained model.
        name: its name on the page and in `/health`; "" means the name of the network.
        device: a device or its name; "auto" is a GPU if there is one, else the CPU.
        max_batch: maximum number of images per forward pass.
        max_delay_ms: milliseconds that an image waits for others; see `normfree.serve.batching.Batcher`.
        limits: limits of requests; None means the defaults.
        hosts: host names under which clients reach the server, in addition to IP addresses, localhost and the name of
            this machine; "*" allows all.

    Raises:
        ValueError: the device cannot be used, or an argument is out of range.
    """
    target = run_device(device) if isinstance(device, str) else device
    service = _Service(model, name or getattr(model.net, "name", "model"), limits or Limits())
    service.start(target, max_batch=max_batch, max_delay_ms=max_delay_ms)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.stop)

    # There is no schema and no /docs, because that page would load scripts from other servers.
    app = FastAPI(openapi_url=None, lifespan=lifespan)
    app.add_api_route("/", service.page, response_model=None)
    app.add_api_route("/health", service.health, response_model=None)
    app.add_api_route("/metrics", service.metrics_text, response_model=None)
    app.add_api_route("/predict", service.predict, methods=["POST"], response_model=None)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_query)
    app.add_middleware(HostGuard, hosts=hosts)
    app.add_middleware(RequestMonitor, metrics=service.metrics)
    app.state.service = service
    return app


class _Service:
    """The endpoints, and the state that they share."""

    def __init__(self, model: TrainedModel, name: str, limits: Limits) -> None:
        self.model, self.name, self.limits = model, name, limits
        each = limits.share(limits.max_held_bytes, request=limits.max_bytes)
        self.held = Budget(limits.max_held_bytes, each=each, what="uploads at once")
        self.transform = model.preprocessing.transform()
        self.metrics = RequestMetrics(lambda: len(self.batcher), held_bytes=lambda: self.held.used,
                                      waiting_pixels=lambda: self.decoders.pixels)  # fmt: skip
        self.html, self.policy = index_page()
        self.device = torch.device("cpu")

    def start(self, device: torch.device, *, max_batch: int, max_delay_ms: float) -> None:
        """Run the network once and start the threads."""
        run = probabilities(self.model, device=device)
        image = torch.zeros(1, 3, *self.model.preprocessing.shape[1:], dtype=torch.uint8)
        width = run(image).shape[-1]
        if width != len(self.model.classes):
            raise ValueError(
                problem(f"the network has {width} outputs for {len(self.model.classes)} class names",
                        allowed="one name for each output", fix="export or save the model again")
            )  # fmt: skip
        self.device = device
        limits = self.limits
        self.batcher = Batcher(run, max_batch=max_batch, max_delay_ms=max_delay_ms, max_queue=limits.max_queue,
                               max_each=limits.share(limits.max_queue, request=limits.max_files),
                               on_batch=self.metrics.on_batch)  # fmt: skip
        pixels = limits.max_waiting_pixels
        self.decoders = Decoders(_DECODERS, max_pixels=pixels, max_image=limits.max_pixels,
                                 max_each=limits.share(pixels, request=0))  # fmt: skip

    def stop(self) -> None:
        """Answer waiting images and end the threads."""
        self.decoders.stop()
        self.batcher.stop(_STOP_SECONDS)

    async def page(self) -> Response:
        """Return the web page."""
        return HTMLResponse(self.html, headers={"Content-Security-Policy": self.policy})

    async def health(self) -> Response:
        """Return facts about the server; status 503 if it cannot predict."""
        ready, limits = self.batcher.ready, self.limits
        if not ready:
            log.error("not ready: the thread that runs the network has ended")
        facts = {
            "ready": ready, "model": self.name, "image_size": self.model.preprocessing.image_size,
            "num_classes": len(self.model.classes), "classes": list(self.model.classes), "device": str(self.device),
            "limits": {"bytes": limits.max_bytes, "pixels": limits.max_pixels, "files": limits.max_files},
            "version": __version__,
        }  # fmt: skip
        return JSONResponse(facts, status_code=200 if ready else 503)

    async def metrics_text(self) -> Response:
        """Return the metrics in the Prometheus text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def predict(self, request: Request, top: Annotated[int, Query(ge=1)] = 5) -> Response:
        """Return the `top` most probable classes of each image in the request."""
        # Checked before the body is read.
        if len(self.batcher) >= self.batcher.max_queue:
            raise RequestError(503, "the queue is full")
        async with uploads(request, limits=self.limits, held=self.held) as files:
            names = [file.name for file in files]
            data, client = [file.data for file in files], client_of(request.client)
            decoded = await self._results(request, self.decoders.submit(self._decode, data, client=client))
            del data
            files.clear()  # frees their memory, which is no longer counted as held
        good = [image for image in decoded if isinstance(image, Tensor)]
        self.metrics.images.labels("refused").inc(len(decoded) - len(good))
        outputs = iter(await self._run(request, good))
        predictions: list[dict[str, Any]] = []
        for name, image in zip(names, decoded, strict=True):
            result = {"error": image} if isinstance(image, str) else {"top": self._top(next(outputs), top)}
            predictions.append({"name": name, **result})
        self.metrics.images.labels("answered").inc(len(good))
        if good:
            return JSONResponse({"predictions": predictions})
        reason = f"{names[0]}: {decoded[0]}"
        if len(names) > 1:
            reason = f"none of the {len(names)} files is a usable image; {reason}"
        return JSONResponse({"error": " ".join(reason.split()), "predictions": predictions}, status_code=422)

    async def _run(self, request: Request, images: list[Tensor]) -> list[Tensor]:
        """Return the probabilities of each image."""
        try:
            futures = self.batcher.submit(images, client=client_of(request.client))
            return await self._results(request, futures)
        except Unavailable as error:
            raise RequestError(429 if isinstance(error, ClientLimit) else 503, str(error)) from None

    async def _results(self, request: Request, futures: Sequence[Future[Result]]) -> list[Result]:
        """Return the results of the futures. If the client leaves, all are canceled.

        Raises:
            RequestError: 499 for a client that left, 503 if the server is stopping.
        """
        outputs = asyncio.gather(*map(asyncio.wrap_future, futures))
        # asyncio would log an exception that is never retrieved, here that of a client that left.
        outputs.add_done_callback(lambda done: done.cancelled() or done.exception())
        left = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((outputs, left), return_when=asyncio.FIRST_COMPLETED)
            if not outputs.done():
                raise RequestError(CLIENT_LEFT, "the client left before its response")
            if outputs.cancelled():
                raise RequestError(503, "the server is stopping")
            return list(outputs.result())
        finally:
            left.cancel()
            outputs.cancel()
            for future in futures:  # at once: asyncio would cancel them only in a later iteration of its loop
                future.cancel()

    def _decode(self, data: bytes, given_up: Callable[[], bool]) -> Tensor | str:
        """Return the image as input of the network, or the reason why it cannot be read."""
        white, most = self.model.preprocessing.pixel_range, self.limits.max_pixels
        try:
            return self.transform(load_image(data, max_pixels=most, pixel_range=white, given_up=given_up))
        except ImageError as error:
            reason = " ".join(error.reason.encode("utf-8", "replace").decode().split())
            return reason[:_REASON_LENGTH]

    def _top(self, probabilities: Tensor, top: int) -> list[dict[str, Any]]:
        """Return the `top` most probable classes."""
        if not torch.isfinite(probabilities).all():
            raise RuntimeError("the output of the network is not finite")
        values, indices = probabilities.topk(min(top, len(self.model.classes)))
        return [
            {"class": self.model.classes[i], "probability": round(p, _DIGITS)}
            for i, p in zip(indices.tolist(), values.tolist(), strict=True)
        ]


async def _disconnected(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _request_error(request: Request, error: Exception) -> Response:
    """Return the response for a rejected request."""
    assert isinstance(error, RequestError)
    if error.status >= 500:
        log.warning("request %s: %d, %s", request.state.request_id, error.status, error.reason)
    headers = _RETRY if error.status in (429, 503) else None
    return JSONResponse({"error": error.reason}, status_code=error.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Return the response for an unknown path or method."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": f"{error.detail}: {request.method} {request.url.path}"},
                        status_code=error.status_code, headers=error.headers)  # fmt: skip


async def _invalid_query(request: Request, error: Exception) -> Response:
    """Return the response for an invalid query parameter."""
    given = request.query_params.get("top", "")
    reason = problem(f"top is {given!r}", allowed="a whole number from 1", fix="?top=5")
    return JSONResponse({"error": reason}, status_code=422)
