"""`normfree serve`."""

from __future__ import annotations

import ipaddress
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass
class ServeArguments:
    """A page to drop pictures on, and a JSON endpoint with the same answers."""

    model: Positional[str]
    """A run or model folder, or an .onnx file of `normfree export`."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one. There is no authentication."""
    port: int = 8000
    """0: any free one."""
    max_batch: int = 16
    """Most pictures that go through the network together; 1: each alone."""
    max_delay_ms: float = 5.0
    """How long a picture waits for others, in milliseconds."""
    device: str = "auto"
    """cpu, cuda, mps; auto: the first GPU, else the CPU."""
    max_bytes: int = 32_000_000
    """Most bytes of one request."""
    max_pixels: int = 64_000_000
    """Most pixels of one picture."""
    max_files: int = 16
    """Most files of one request."""


def serve(arguments: ServeArguments) -> int:
    from normfree.serve.app import create_app
    from normfree.serve.server import listen, make_server, run

    sock = listen(arguments.host, arguments.port)  # before the network, which may take long
    try:
        from normfree.pretrained import from_pretrained
        from normfree.serve.upload import Limits

        logging.getLogger("python_multipart").setLevel(
            logging.ERROR
        )  # a line for every broken form otherwise
        logging.basicConfig(
            level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
        )
        limits = Limits(
            max_bytes=arguments.max_bytes, max_pixels=arguments.max_pixels, max_files=arguments.max_files
        )
        model = from_pretrained(arguments.model)
        name = getattr(model.net, "name", "") or Path(arguments.model).stem
        app = create_app(model, name=name, device=arguments.device, max_batch=arguments.max_batch,
                         max_delay_ms=arguments.max_delay_ms, limits=limits)  # fmt: skip
        host, port = sock.getsockname()[:2]
        if not ipaddress.ip_address(host).is_loopback:
            print(
                f"normfree: {host} can be reached from outside, and there is no authentication",
                file=sys.stderr,
            )
        shown = f"[{host}]" if ":" in host else host
        print(f"{name}, {len(model.classes)} classes: http://{shown}:{port}/  (Ctrl-C ends it)", flush=True)
        run(make_server(app, limits=limits), sock)
    finally:
        sock.close()
    return 0
