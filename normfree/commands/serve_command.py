"""`normfree serve`: a trained network behind HTTP."""

from __future__ import annotations

import ipaddress
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from normfree.commands.usage import tell


@dataclass
class ServeArguments:
    """Serve a web page that classifies dropped images, and a JSON endpoint with the same predictions."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run or model folder, or an .onnx file that `normfree export` wrote."""
    host: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 listens on all. There is no authentication."""
    allow_host: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """Host names under which clients reach the server, besides IP addresses, localhost and this machine's name. *: all,
    also POST requests from other sites."""
    port: int = 8000
    """Port to listen on; 0: any free port."""
    max_batch: int = 16
    """Maximum number of images per forward pass; 1: no batching."""
    max_delay_ms: float = 5.0
    """Milliseconds that an image waits for others to form a batch."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda or mps; auto: the first GPU if there is one, else the CPU."""
    max_bytes: int = 32_000_000
    """Maximum number of bytes per request."""
    max_pixels: int = 64_000_000
    """Maximum number of pixels per image."""
    max_files: int = 16
    """Maximum number of files per request."""
    client_share: float = 0.5
    """Part of all capacity that one client address may use; 1: all, for a server behind a proxy."""


def serve(arguments: ServeArguments) -> int:
    """Serve until SIGINT or SIGTERM; return 0."""
    from normfree.serve.app import create_app
    from normfree.serve.server import listen, make_server, run

    # Reserve the port first, because loading the network may take long.
    sock = listen(arguments.host, arguments.port)
    try:
        from normfree.pretrained import from_pretrained
        from normfree.serve.limits import Limits

        # python_multipart would log a line for every malformed form.
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        logging.basicConfig(
            level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
        )
        limits = Limits(max_bytes=arguments.max_bytes, max_pixels=arguments.max_pixels,
                        max_files=arguments.max_files, client_share=arguments.client_share)  # fmt: skip
        model = from_pretrained(arguments.model)
        model.require_classes()
        tell(model.note)
        name = getattr(model.net, "name", "") or Path(arguments.model).stem
        app = create_app(model, name=name, device=arguments.device, max_batch=arguments.max_batch,
                         max_delay_ms=arguments.max_delay_ms, limits=limits,
                         hosts=(arguments.host, *arguments.allow_host))  # fmt: skip
        host, port = sock.getsockname()[:2]
        if not ipaddress.ip_address(host).is_loopback:
            print(
                f"normfree: {host} can be reached from other machines, and there is no authentication",
                file=sys.stderr,
            )
        shown = f"[{host}]" if ":" in host else host
        print(f"{name}, {len(model.classes)} classes: http://{shown}:{port}/  (Ctrl-C stops it)", flush=True)
        run(make_server(app, limits=limits), sock)
    finally:
        sock.close()
    return 0
