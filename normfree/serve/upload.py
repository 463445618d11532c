"""Read the files of a request. A body that exceeds a limit is rejected while it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from normfree.serve.limits import Budget, Limits, RequestError, client_of
from normfree.suggest import problem

# Status for a client that closed its connection, as nginx logs it. It appears in the metrics only.
CLIENT_LEFT = 499
# Longest file name that file systems allow. Longer names are cut.
_NAME_LENGTH = 255
_FIX = "curl -F file=@photo.jpg ADDRESS/predict"


@dataclass(frozen=True)
class Upload:
    """An uploaded file.

    Attributes:
        name: the name that the client gave. It is untrusted and only returned to the client.
        data: the content.
    """

    name: str
    data: bytes


@asynccontextmanager
async def uploads(request: Request, *, limits: Limits, held: Budget) -> AsyncIterator[list[Upload]]:
    """Context manager that reads the files of a request: the parts of a form, or the body if its type is image/*.

    The bytes of the body are counted in `held` until the context is left.

    Raises:
        RequestError: 400 for an invalid form, 408 for a body that takes too long, 413 for too many bytes or files, 415
            for another content type, 429 if this client's bodies use its share of the memory, 499 for a client that
            left, 503 if all bodies use all of it.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = kind == "multipart/form-data"
    if not form and not kind.startswith("image/"):
        allowed = "multipart/form-data with files, or image/*"
        raise RequestError(415, problem(f"content type is {kind!r}", allowed=allowed, fix=_FIX))
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > limits.max_bytes:
        raise _too_long(limits)
    size, client = 0, client_of(request.client)

    async def receive() -> Message:
        nonlocal size
        message = await request.receive()
        new = len(message.get("body", b""))
        if size + new > limits.max_bytes:
            raise _too_long(limits)
        held.take(client, new)
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
        held.give_back(client, size)


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
        for file in parser._files_to_close_on_error:  # all, also those of a form that is rejected half-way
            file.close()
    if not found:
        raise RequestError(400, problem("the form contains no file", fix=_FIX))
    return found


def _printable(name: str) -> str:
    """Return the name in valid UTF-8 and of limited length. A form may contain half a surrogate pair."""
    return name[:_NAME_LENGTH].encode("utf-8", "replace").decode("utf-8")
