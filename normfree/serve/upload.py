"""Read the files of a request. A body that exceeds a limit is rejected while it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from normfree.suggest import problem

# Status for a client that closed its connection, as nginx logs it. It appears in the metrics only.
CLIENT_LEFT = 499
# Longest file name that file systems allow. Longer names are cut.
_NAME_LENGTH = 255
_FIX = "curl -F file=@photo.jpg ADDRESS/predict"


@dataclass(frozen=True)
class Limits:
    """The limits of one server.

    Attributes:
        max_bytes: bytes of one request's body.
        max_pixels: pixels of one image, according to its header.
        max_waiting_pixels: pixels of all images together that wait to be decoded or are being decoded.
        max_files: files of one request.
        max_queue: images that wait for the network.
        max_connections: open connections; a further one closes the oldest that waits for its client, or gets
            status 503.
        max_held_bytes: bytes of all bodies that are being read or decoded; further requests are answered with 503.
        body_seconds: seconds in which a body must arrive.
        head_seconds: seconds in which a request line and its headers must arrive, and also the unread rest of a
            rejected body.

    Raises:
        ValueError: a limit is not above 0, or a request of `max_files` would not fit in the queue.
    """

    max_bytes: int = 32_000_000
    max_pixels: int = 64_000_000  # a thread that decodes takes 256 MB for so many
    max_waiting_pixels: int = 256_000_000
    max_files: int = 16
    max_queue: int = 128
    max_connections: int = 128
    max_held_bytes: int = 256_000_000
    body_seconds: float = 60.0
    head_seconds: float = 10.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not value > 0:
                raise ValueError(
                    problem(f"{item.name} is {value}", allowed="above 0", fix=f"{item.name}={item.default}")
                )
        if self.max_files > self.max_queue:
            raise ValueError(
                problem(f"max_files is {self.max_files}", allowed=f"at most max_queue, which is {self.max_queue}",
                        fix=f"max_files={self.max_queue}")
            )  # fmt: skip


@dataclass(frozen=True)
class Upload:
    """An uploaded file.

    Attributes:
        name: the name that the client gave. It is untrusted and only returned to the client.
        data: the content.
    """

    name: str
    data: bytes


class RequestError(Exception):
    """A request that is rejected.

    Attributes:
        status: the HTTP status.
        reason: the reason, in one line.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


class HeldBytes:
    """The number of bytes of request bodies in memory. Only the thread of the event loop may use it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0

    def add(self, count: int) -> None:
        """Add `count` bytes, or raise RequestError if they exceed the limit."""
        if self.count + count > self.limit:
            raise RequestError(503, "too many uploads at once")
        self.count += count


@asynccontextmanager
async def uploads(request: Request, *, limits: Limits, held: HeldBytes) -> AsyncIterator[list[Upload]]:
    """Context manager that reads the files of a request: the parts of a form, or the body if its type is image/*.

    The bytes of the body are counted in `held` until the context is left.

    Raises:
        RequestError: 400 for an invalid form, 408 for a body that takes too long, 413 for too many bytes or files, 415
            for another content type, 499 for a client that left, 503 if other bodies use all the memory.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = kind == "multipart/form-data"
    if not form and not kind.startswith("image/"):
        allowed = "multipart/form-data with files, or image/*"
        raise RequestError(415, problem(f"content type is {kind!r}", allowed=allowed, fix=_FIX))
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > limits.max_bytes:
        raise _too_long(limits)
    size = 0

    async def receive() -> Message:
        nonlocal size
        message = await request.receive()
        new = len(message.get("body", b""))
        if size + new > limits.max_bytes:
            raise _too_long(limits)
        held.add(new)
        size += new
        return message

    guarded = Request(request.scope, receive)
    try:
        try:
            async with asyncio.timeout(limits.body_seconds):
                files = await (_files(guarded, limits) if form else _body(guarded))
        except TimeoutError:
            raise RequestError(408, f"the body took longer than {limits.body_seconds:g} seconds") from None
        except ClientDisconnect:
            raise RequestError(CLIENT_LEFT, "the client left before its body was complete") from None
        yield files
    finally:
        held.count -= size


def _too_long(limits: Limits) -> RequestError:
    """Return the error for a body of too many bytes."""
    return RequestError(
        413, problem(f"more than {limits.max_bytes:,} bytes", fix="send fewer or smaller files")
    )


def _too_many(limits: Limits) -> RequestError:
    """Return the error for a form with too many files."""
    return RequestError(
        413, problem(f"more than {limits.max_files} files", fix="send them in several requests")
    )


async def _body(request: Request) -> list[Upload]:
    """Return the body as one file."""
    return [Upload("image", await request.body())]


class _InMemory(MultiPartParser):
    """A parser of forms that writes no temporary files: the size of the body is limited already."""

    spool_max_size = 1 << 40


async def _files(request: Request, limits: Limits) -> list[Upload]:
    """Return the files of a form."""
    found: list[Upload] = []
    parser = _InMemory(
        request.headers, request.stream(), max_files=limits.max_files, max_fields=limits.max_files
    )
    try:
        form = await parser.parse()
        for _, value in form.multi_items():
            if isinstance(value, UploadFile):
                name = value.filename or f"image {len(found) + 1}"
                found.append(Upload(_printable(name), await value.read()))
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise _too_many(limits) from None
        raise RequestError(400, error.message) from None
    except HTTPException as error:
        if error.detail.startswith("Too many files"):
            raise _too_many(limits) from None
        raise RequestError(error.status_code, error.detail) from None
    except ValueError as error:  # for example a charset that cannot decode the form
        raise RequestError(400, f"the form cannot be read: {error}") from None
    finally:
        for (
            file
        ) in parser._files_to_close_on_error:  # all files, also those of a form that is rejected half-way
            file.close()
    if not found:
        raise RequestError(400, problem("the form contains no file", fix=_FIX))
    return found


def _printable(name: str) -> str:
    """Return the name in valid UTF-8 and of limited length. A form may contain half a surrogate pair."""
    return name[:_NAME_LENGTH].encode("utf-8", "replace").decode("utf-8")
