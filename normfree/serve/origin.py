"""Which requests the server answers: those whose Host names it, and no POST from the pages of other sites.

Without this, a web page that a user visits could read predictions and class names: it lets its own host name resolve to
127.0.0.1 (DNS rebinding), or sends forms across sites.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from normfree.suggest import problem

ANY = "*"
# A name, an IPv4 address, or an IPv6 address in brackets; then perhaps a port.
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[^\[\]@:/?#\s]+)(?::\d{1,5})?")


class HostGuard:
    """ASGI middleware that answers 403 to requests for other hosts, and to POST requests from other sites.

    IP addresses, localhost and the name of this machine are always allowed: no other site can use them as its name.

    Args:
        hosts: further host names; "*" allows all hosts and sites.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = ()) -> None:
        self.app = app
        self._hosts = {"localhost", socket.gethostname().lower(), *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = "" if scope["type"] != "http" or ANY in self._hosts else self._refusal(scope)
        if not reason:
            await self.app(scope, receive, send)
            return
        await JSONResponse({"error": reason}, status_code=403)(scope, receive, send)

    def _refusal(self, scope: Scope) -> str:
        """Return why a request is refused, or ""."""
        headers = Headers(scope=scope)
        fix = "start the server with --allow-host NAME"
        host = headers.get("host", "")
        if host and not (_HOST.fullmatch(host) and self._allows(f"http://{host}")):
            return problem(f"the host {host[:100]!r} is not this server", fix=fix)
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return ""
        origin = ", ".join(found) if (found := headers.getlist("origin")) else None
        # An allowed host name, or an address on the same port: other addresses may belong to other sites.
        if origin is not None and _netloc(origin) != host.lower() and not self._named(origin):
            return problem(f"requests from {origin[:100]!r} are not answered", fix=fix)
        if origin is None and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return problem("requests from other sites are not answered", fix=fix)
        return ""

    def _named(self, url: str) -> bool:
        """Return True if the host of a URL was allowed by name."""
        try:
            name = urlsplit(url).hostname
        except ValueError:
            return False
        return name is not None and name.lower() in self._hosts - {"localhost", socket.gethostname().lower()}

    def _allows(self, url: str) -> bool:
        """Return True if the host of a URL is an IP address or an allowed name."""
        try:
            name = (urlsplit(url).hostname or "").rstrip(".")
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name.partition("%")[0])
            return True
        except ValueError:
            return name.lower() in self._hosts


def _netloc(url: str) -> str | None:
    """Return host and port of a URL in lower case; None if it is no URL."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return None
