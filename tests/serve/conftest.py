"""A server on a free loopback port, and a network whose outputs are known."""

import contextlib
import threading
import time

import pytest
import torch

from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel
from normfree.serve.app import create_app
from normfree.serve.limits import Limits
from normfree.serve.server import SHUTDOWN_SECONDS, listen, make_server


class Brightest(torch.nn.Module):
    """A network whose logits are the mean of each channel, so the class is the color of the image.

    Attributes:
        fault: "raise" makes `forward` fail, "nan" makes its outputs NaN.
        gate: `forward` waits until this event is set.
        entered: set when `forward` is called.
    """

    def __init__(self):
        super().__init__()
        self.fault = ""
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def forward(self, images):
        self.entered.set()
        self.gate.wait(60)
        if self.fault == "raise":
            raise RuntimeError("out of memory")
        logits = 20 * images.mean(dim=(2, 3))
        return logits * float("nan") if self.fault == "nan" else logits


@pytest.fixture
def colors():
    pre = Preprocessing(image_size=8, crop="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return TrainedModel(Brightest(), pre, ("red", "green", "<b>blue</b>"))


@contextlib.contextmanager
def serve(model, *, limits=None, shutdown_seconds=SHUTDOWN_SECONDS, **options):
    """Serve a model; yield the port and the application."""
    limits = limits or Limits()
    app = create_app(model, device="cpu", limits=limits, **options)
    sock = listen("127.0.0.1", 0)
    server = make_server(app, limits=limits, shutdown_seconds=shutdown_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield sock.getsockname()[1], app
    finally:
        server.should_exit = True
        thread.join(60)
        sock.close()
    assert not thread.is_alive()
    assert not app.state.service.batcher.ready


@pytest.fixture
def eventually():
    """Return a function that waits until a condition holds, and fails after a minute."""

    def wait(holds):
        deadline = time.monotonic() + 600
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return wait


@pytest.fixture
def serving():
    """Return `serve`: a context manager that yields (port, app)."""
    return serve
