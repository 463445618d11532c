"""Download one image from a URL, with limits on its size and on the time that it takes."""

from __future__ import annotations

import http.client
import os
import threading
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from normfree._version import __version__
from normfree.data.transforms.decode import ImageError
from normfree.suggest import problem

MAX_URL_BYTES = 100_000_000
MAX_SECONDS = 30.0
_SILENCE = 10.0  # seconds without a byte from the server
_CHUNK = 1 << 16


def is_url(text: str) -> bool:
    """Return True for a URL with http or https.

    >>> [is_url(text) for text in ("https://example.org/cat.jpg", "HTTP://x/y", "photos/cat.jpg", "s3://b/k")]
    [True, True, False, False]
    """
    return text.lower().startswith(("http://", "https://"))


def require_online(url: str) -> None:
    """Raise `ValueError` if HF_HUB_OFFLINE forbids downloads; huggingface_hub obeys the same variable."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        fix = "download the image first, or unset HF_HUB_OFFLINE"
        raise ValueError(problem(f"{url} would be downloaded, and HF_HUB_OFFLINE is set", fix=fix))


def download(url: str, *, max_bytes: int = MAX_URL_BYTES, max_seconds: float = MAX_SECONDS) -> bytes:
    """Return what a server sends for an http or https URL. Redirects to these two are followed.

    The caller decides which URLs are fetched: a program that takes them from strangers has to check their hosts.

    Raises:
        ImageError: the server cannot be reached, is too slow, sends too many bytes, a web page, or an error.
    """
    found: list[bytes | ImageError] = []
    # A server that sends one byte at a time never runs into the timeout of a socket, so a thread is left behind.
    worker = threading.Thread(
        target=lambda: found.append(_fetched(url, max_bytes, time.monotonic() + max_seconds)), daemon=True
    )
    worker.start()
    worker.join(max_seconds)
    if not found:
        raise ImageError(url, f"the server took longer than {max_seconds:g} seconds")
    if isinstance(found[0], ImageError):
        raise found[0]
    return found[0]


def _fetched(url: str, max_bytes: int, deadline: float) -> bytes | ImageError:
    """Return the content of a URL, or the error."""
    request = urllib.request.Request(url, headers={"User-Agent": f"normfree/{__version__}"})
    try:
        with _opener().open(request, timeout=min(_SILENCE, deadline - time.monotonic())) as response:
            kind = response.headers.get_content_type()
            if kind == "text/html":
                return ImageError(url, "the server sent a web page, not an image")
            return _body(url, response, max_bytes, deadline)
    except urllib.error.HTTPError as error:
        with error:
            return ImageError(url, f"the server answered {error.code} {error.reason}")
    except urllib.error.URLError as error:
        return ImageError(url, f"cannot be downloaded: {error.reason}")
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: the URL itself
        return ImageError(url, f"cannot be downloaded: {error or type(error).__name__}")


def _body(url: str, response: Any, max_bytes: int, deadline: float) -> bytes | ImageError:
    """Return the body of a response, or the error if it has too many bytes or comes too slowly."""
    parts, size = [], 0
    while part := response.read1(_CHUNK):
        size += len(part)
        if size > max_bytes:
            return ImageError(url, f"more than {max_bytes:,} bytes")
        if time.monotonic() > deadline:
            return ImageError(url, "the server is too slow")
        parts.append(part)
    expected = response.headers.get("Content-Length", "")
    if expected.isdigit() and int(expected) != size and not response.headers.get("Content-Encoding"):
        return ImageError(url, f"the connection broke after {size:,} of {int(expected):,} bytes")
    return b"".join(parts)


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for http and https alone: a redirect must not lead to a file or to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(), urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(), urllib.request.UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener


def suffix_of(url: str) -> str:
    """Return the suffix of the path in a URL, in lower case.

    >>> suffix_of("https://example.org/a/clip.MP4?x=1.jpg")
    '.mp4'
    """
    return os.path.splitext(urlsplit(url).path)[1].lower()
