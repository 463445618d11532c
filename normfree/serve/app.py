"""The application: a page, `/predict`, `/health`, `/metrics`.

POST /predict[?top=N]   a form with files, or one picture as the body (image/*)
    200 {"predictions": [{"name": ..., "top": [{"class": ..., "probability": ...}, ...]},
                         {"name": ..., "error": ...}]}
    4xx {"error": ...}, with "predictions" if the files as such were readable and none was a usable picture
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any

import torch
from torch import Tensor

try:
    import prometheus_client  # noqa: F401  metrics.py's
    import python_multipart  # noqa: F401  starlette's, for forms
    import uvicorn  # noqa: F401  server.py's
    from fastapi import FastAPI, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(f"normfree serve needs {missing.name}: pip install 'normfree[serve]'") from None

from normfree._version import __version__
from normfree.data.transforms.decode import ImageError, load_image
from normfree.device import run_device
from normfree.pretrained import TrainedModel
from normfree.serve.batching import Batcher, Unavailable, probabilities
from normfree.serve.index_page import page
from normfree.serve.request_metrics import Metrics, Watch, log
from normfree.serve.upload import GONE, Held, Limits, Refused, Upload, uploads

_DECODERS = min(4, os.cpu_count() or 1)  # threads; each may hold one decoded picture of max_pixels
_RETRY = {"Retry-After": "1"}  # seconds; a full queue of a small network is gone by then
_REASON_LENGTH = 300
_DIGITS = 6  # as `normfree predict` prints them


def create_app(
    model: TrainedModel,
    *,
    name: str = "",
    device: str | torch.device = "auto",
    max_batch: int = 16,
    max_delay_ms: float = 5.0,
    limits: Limits | None = None,
) -> FastAPI:
    """The application that answers for `model`; `name` is what the page and `/health` call it.

    Its probabilities are those of `normfree.inference.predict`, to rounding. The network runs once before this
    returns, so that one that cannot run is found now. Batches: see `normfree.serve.batching.Batcher`.

    Raises:
        ValueError: no such device, or a number makes no sense.
    """
    place = run_device(device) if isinstance(device, str) else device
    service = _Service(model, name or getattr(model.net, "name", "model"), limits or Limits())
    service.start(place, max_batch=max_batch, max_delay_ms=max_delay_ms)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.stop)

    # no schema and no /docs: its page would load scripts from elsewhere, and its answers would not be ours
    app = FastAPI(openapi_url=None, lifespan=lifespan)
    app.add_api_route("/", service.page, response_model=None)
    app.add_api_route("/health", service.health, response_model=None)
    app.add_api_route("/metrics", service.numbers, response_model=None)
    app.add_api_route("/predict", service.predict, methods=["POST"], response_model=None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_middleware(Watch, metrics=service.metrics)
    app.state.service = service
    return app


class _Service:
    """What the endpoints share."""

    def __init__(self, model: TrainedModel, name: str, limits: Limits) -> None:
        self.model, self.name, self.limits = model, name, limits
        self.held = Held(limits.max_held_bytes)
        self.transform = model.preprocessing.transform()
        self.metrics = Metrics(lambda: len(self.batcher))
        self.html, self.policy = page()
        self.device = torch.device("cpu")

    def start(self, device: torch.device, *, max_batch: int, max_delay_ms: float) -> None:
        run = probabilities(self.model, device=device)
        size = self.model.preprocessing.image_size
        width = run(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[-1]
        if width != len(self.model.classes):
            raise ValueError(f"the network has {width} outputs for {len(self.model.classes)} class names. "
                             "Allowed: one name for each output. Fix: export or save the model again.")  # fmt: skip
        self.device = device
        self.batcher = Batcher(run, max_batch=max_batch, max_delay_ms=max_delay_ms, max_queue=self.limits.max_queue,
                               on_batch=self.metrics.on_batch)  # fmt: skip
        self.decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="normfree-decode")

    def stop(self) -> None:
        self.batcher.stop()
        self.decoders.shutdown(cancel_futures=True)

    async def page(self) -> Response:
        return HTMLResponse(self.html, headers={"Content-Security-Policy": self.policy})

    async def health(self) -> Response:
        ready, limits = self.batcher.ready, self.limits
        if not ready:
            log.error("not ready: the network's thread has ended")
        facts = {
            "ready": ready, "model": self.name, "image_size": self.model.preprocessing.image_size,
            "num_classes": len(self.model.classes), "classes": list(self.model.classes), "device": str(self.device),
            "limits": {"bytes": limits.max_bytes, "pixels": limits.max_pixels, "files": limits.max_files},
            "version": __version__,
        }  # fmt: skip
        return JSONResponse(facts, status_code=200 if ready else 503)

    async def numbers(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def predict(self, request: Request, top: Annotated[int, Query(ge=1)] = 5) -> Response:
        if len(self.batcher) >= self.batcher.max_queue:  # before a body is read for nothing
            raise Refused(503, "the queue is full")
        async with uploads(request, limits=self.limits, held=self.held) as files:
            loop = asyncio.get_running_loop()
            decoded = await asyncio.gather(
                *(loop.run_in_executor(self.decoders, self._decode, f) for f in files)
            )
            names = [file.name for file in files]
            files.clear()  # their bytes no longer count as held
        good = [picture for picture in decoded if isinstance(picture, Tensor)]
        self.metrics.pictures.labels("refused").inc(len(decoded) - len(good))
        rows = iter(await self._answers(request, good))
        predictions: list[dict[str, Any]] = []
        for name, picture in zip(names, decoded, strict=True):
            answer = {"error": picture} if isinstance(picture, str) else {"top": self._top(next(rows), top)}
            predictions.append({"name": name, **answer})
        self.metrics.pictures.labels("answered").inc(len(good))
        if good:
            return JSONResponse({"predictions": predictions})
        reason = f"{names[0]}: {decoded[0]}"
        if len(names) > 1:
            reason = f"none of the {len(names)} files is a usable picture; {reason}"
        return JSONResponse({"error": " ".join(reason.split()), "predictions": predictions}, status_code=422)

    async def _answers(self, request: Request, images: list[Tensor]) -> list[Tensor]:
        """A row of probabilities per picture. A client that leaves takes its pictures out of the queue."""
        try:
            futures = self.batcher.submit(images)
        except Unavailable as error:
            raise Refused(503, str(error)) from None
        rows = asyncio.gather(*map(asyncio.wrap_future, futures))
        # asyncio logs an exception that nobody has looked at, here that of a client that left
        rows.add_done_callback(lambda done: done.cancelled() or done.exception())
        left = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((rows, left), return_when=asyncio.FIRST_COMPLETED)
            if not rows.done():
                raise Refused(GONE, "the client left before its answer")
            return list(rows.result())
        except Unavailable as error:  # the server stopped meanwhile
            raise Refused(503, str(error)) from None
        finally:
            left.cancel()
            rows.cancel()

    def _decode(self, file: Upload) -> Tensor | str:
        """The network's input, or what is wrong with the file."""
        try:
            return self.transform(load_image(file.data, max_pixels=self.limits.max_pixels))
        except ImageError as error:
            reason = " ".join(error.reason.encode("utf-8", "replace").decode().split())
            return reason[:_REASON_LENGTH]

    def _top(self, row: Tensor, top: int) -> list[dict[str, Any]]:
        if not torch.isfinite(row).all():
            raise RuntimeError("the network's answer is not finite")
        values, indices = row.topk(min(top, len(self.model.classes)))
        return [
            {"class": self.model.classes[i], "probability": round(p, _DIGITS)}
            for i, p in zip(indices.tolist(), values.tolist(), strict=True)
        ]


async def _left(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    if error.status >= 500:
        log.warning("request %s: %d, %s", request.state.request_id, error.status, error.reason)
    headers = _RETRY if error.status == 503 else None
    return JSONResponse({"error": error.reason}, status_code=error.status, headers=headers)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": f"{error.detail}: {request.method} {request.url.path}"},
                        status_code=error.status_code, headers=error.headers)  # fmt: skip


async def _invalid(request: Request, error: Exception) -> Response:
    given = request.query_params.get("top", "")
    return JSONResponse(
        {"error": f"top={given!r}. Allowed: a whole number from 1. Fix: ?top=5"}, status_code=422
    )
