"""A request's body in, pictures' bytes out, within limits. What is over a limit is refused while it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from normfree.data.transforms.decode import MAX_PIXELS

GONE = 499  # what nginx counts for clients that closed their connection; nobody reads it
_NAME_LENGTH = 255  # what file systems allow; a longer name is cut
_FIX = "Fix: curl -F file=@photo.jpg ADDRESS/predict"


@dataclass(frozen=True)
class Limits:
    """What one server takes. Bytes and pixels are whole numbers, times are seconds."""

    max_bytes: int = 32_000_000
    """Of one request's body."""
    max_pixels: int = MAX_PIXELS
    """Of one picture, as its header states them."""
    max_files: int = 16
    """Of one request."""
    max_queue: int = 128
    """Pictures that wait for the network."""
    max_connections: int = 128
    """Open connections; the next one gets 503."""
    max_held_bytes: int = 256_000_000
    """Bodies of all requests that are being read or decoded; the next ones get 503."""
    body_seconds: float = 60.0
    """For a whole body to arrive."""
    head_seconds: float = 10.0
    """For a request line and headers to arrive, and for the unread rest of a refused body."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not value > 0:
                raise ValueError(f"{item.name}={value}. Allowed: above 0. Fix: {item.name}={item.default}")
        if self.max_files > self.max_queue:  # such a request would never find room
            raise ValueError(f"max_files={self.max_files} with max_queue={self.max_queue}. Allowed: no more files than "
                             f"the queue holds. Fix: max_files={self.max_queue}")  # fmt: skip


@dataclass(frozen=True)
class Upload:
    """A file as it came: its stated name, which is only ever repeated, and its bytes."""

    name: str
    data: bytes


class Refused(Exception):
    """A request that is not answered: HTTP status and the reason, one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


class Held:
    """Bytes of bodies in memory, over all requests. Only the event loop's thread touches it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0

    def take(self, count: int) -> None:
        if self.count + count > self.limit:
            raise Refused(503, "too many uploads at once")
        self.count += count


@asynccontextmanager
async def uploads(request: Request, *, limits: Limits, held: Held) -> AsyncIterator[list[Upload]]:
    """The files of a request: parts of a form, or the body itself if its type is image/*.

    The body counts in `held` until the block is left.

    Raises:
        Refused: 400 for a form that is none, 408 for a body that takes too long, 413 for too many bytes or files,
            415 for another type, 499 for a client that left, 503 when other bodies fill the memory.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = kind == "multipart/form-data"
    if not form and not kind.startswith("image/"):
        raise Refused(
            415, f"content type {kind!r}. Allowed: multipart/form-data with files, or image/*. {_FIX}"
        )
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > limits.max_bytes:
        raise _too_long(limits)
    mine = 0

    async def receive() -> Message:
        nonlocal mine
        message = await request.receive()
        size = len(message.get("body", b""))
        if mine + size > limits.max_bytes:
            raise _too_long(limits)
        held.take(size)
        mine += size
        return message

    guarded = Request(request.scope, receive)
    try:
        try:
            async with asyncio.timeout(limits.body_seconds):
                files = await (_files(guarded, limits) if form else _body(guarded))
        except TimeoutError:
            raise Refused(408, f"the body took longer than {limits.body_seconds:g} seconds") from None
        except ClientDisconnect:
            raise Refused(GONE, "the client left before its body was complete") from None
        yield files
    finally:
        held.count -= mine


def _too_long(limits: Limits) -> Refused:
    return Refused(413, f"more than {limits.max_bytes:,} bytes. Fix: send fewer or smaller files")


def _too_many(limits: Limits) -> Refused:
    return Refused(413, f"more than {limits.max_files} files. Fix: send them in several requests")


async def _body(request: Request) -> list[Upload]:
    return [Upload("image", await request.body())]


async def _files(request: Request, limits: Limits) -> list[Upload]:
    found: list[Upload] = []
    try:
        async with request.form(max_files=limits.max_files, max_fields=limits.max_files) as form:
            for _, value in form.multi_items():
                if isinstance(value, UploadFile):
                    name = value.filename or f"image {len(found) + 1}"
                    found.append(Upload(_plain(name), await value.read()))
    except HTTPException as error:
        if error.detail.startswith("Too many files"):
            raise _too_many(limits) from None
        raise Refused(error.status_code, error.detail) from None
    except ValueError as error:  # a charset that exists but cannot decode, among others
        raise Refused(400, f"the form cannot be read: {error}") from None
    if not found:
        raise Refused(400, f"the form holds no file. {_FIX}")
    return found


def _plain(name: str) -> str:
    """Only what UTF-8 can write: a form may state half a surrogate pair."""
    return name[:_NAME_LENGTH].encode("utf-8", "replace").decode("utf-8")
