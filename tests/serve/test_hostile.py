"""After a thousand malformed requests, several at a time, the server answers a valid request."""

import contextlib
import dataclasses
import gc
import io
import json
import random
import socket
import struct
import sys
import threading
import time
import weakref
import zlib
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from normfree.data.transforms.decode import _BLOCK, load_image
from normfree.serve.decoding import Decoders
from normfree.serve.limits import Limits, RequestError

# Short limits for requests that are rejected because they take too long.
HURRIED = Limits(max_bytes=1_000_000, body_seconds=0.5, head_seconds=0.5)
# On a busy machine any request may take more than half a second.
PATIENT = Limits(max_bytes=1_000_000)


def encoded(kind, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 40, (40, 50, 3), dtype=np.uint8)
    pixels[..., 0] += 200  # red, with noise, so that a truncated file cannot be decoded
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


PNG, JPEG = encoded("PNG"), encoded("JPEG")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def request(body, *, kind="image/png", length=None, path="/predict", method="POST", extra=b""):
    length = len(body) if length is None else length
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\nContent-Type: {kind}\r\n"
    )
    return head.encode() + extra + b"\r\n" + body


def form(*files, kind="multipart/form-data; boundary=edge"):
    """Return a request with files, each (raw bytes of the name, data)."""
    parts = [
        b'--edge\r\nContent-Disposition: form-data; name="file"; filename="'
        + name
        + b'"\r\n\r\n'
        + data
        + b"\r\n"
        for name, data in files
    ]
    return request(b"".join(parts) + b"--edge--\r\n", kind=kind)


class Client:
    """A client that sends raw bytes."""

    def __init__(self, port, address="127.0.0.1"):
        self.port, self.address = port, address

    def connect(self):
        return socket.create_connection(
            ("127.0.0.1", self.port), timeout=600, source_address=(self.address, 0)
        )

    def talk(self, *pieces, pause=0.0, half_close=False):
        """Send pieces of a request; return status and JSON or text of the first response.

        The result is (0, "") if the server closed the connection without a response.
        """
        with self.connect() as sock:
            try:
                for piece in pieces:
                    sock.sendall(piece)
                    time.sleep(pause)
                if half_close:
                    sock.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass  # rejected while it was sent; there may still be a response
            return self.read(sock)

    @staticmethod
    def read(sock):
        data = b""
        try:
            while b"\r\n\r\n" not in data:
                data += (got := sock.recv(65536))
                if not got:
                    break
            head, _, body = data.partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 "):
                return 0, ""
            lengths = [int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")]
            while lengths and len(body) < lengths[0]:
                body += (got := sock.recv(65536))
                if not got:
                    break
        except ConnectionResetError:
            return 0, ""
        status, body = int(head[9:12]), body[: lengths[0]] if lengths else body
        return status, json.loads(body) if b"application/json" in head else body.decode()


def wrong_type(client, r):
    kind = r.choice(
        ["text/plain", "application/json", "", "application/x-www-form-urlencoded", "multipart/mixed", "\xff"]
    )
    return client.talk(request(PNG, kind=kind)), {415, 400}


def empty(client, r):
    return client.talk(request(b"", kind=r.choice(["image/png", "image/jpeg"]))), {422}


def truncated(client, r):
    data = r.choice([PNG, JPEG])
    return client.talk(request(data[: r.randrange(1, len(data) * 9 // 10)])), {422}


def noise(client, r):
    return client.talk(request(r.randbytes(r.randrange(1, 5000)), kind="image/jpeg")), {422}


def pixel_bomb(client, r):
    return client.talk(request(bomb(r.choice([8001, 65_000, 2**31 - 1])))), {422}


def hundred_megabytes(client, r):
    """Send 100 MB, with or without a Content-Length, which is rejected long before the end."""
    if r.random() < 0.3:
        return client.talk(request(b"", length=100_000_000)), {413}
    sent = 0
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=600) as sock:
        sock.sendall(head)
        sock.setblocking(False)
        piece = b"40000\r\n" + bytes(0x40000) + b"\r\n"
        while sent < 100_000_000:
            try:
                if sock.recv(1, socket.MSG_PEEK):
                    break  # the response has arrived
            except BlockingIOError:
                pass
            sock.setblocking(True)
            sock.sendall(piece)
            sock.setblocking(False)
            sent += len(piece)
        sock.setblocking(True)
        assert sent < 30_000_000
        return client.read(sock), {413}


def length_too_long(client, r):
    return client.talk(request(PNG, length=len(PNG) + r.randrange(1, 999)), half_close=r.random() < 0.5), {
        0,
        400,
        408,
    }


def length_too_short(client, r):
    return client.talk(request(PNG, length=r.randrange(1, 1000))), {
        422,
        0,
    }  # the rest is an invalid request


def slow_body(client, r):
    pieces = [request(b"", length=5000), *[b"x"] * 4]
    return client.talk(*pieces, pause=0.2), {408}


def slow_head(client, r):
    return client.talk(*[b"P", b"OST", b" /pre", b"dict"], pause=0.15), {0}


def huge_head(client, r):
    return client.talk(request(PNG, extra=b"X-Long: " + b"a" * 1_000_000 + b"\r\n")), {400, 0}


def no_http(client, r):
    lines = [
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"POST /predict HTTP/x\r\n\r\n",
        r.randbytes(300) + b"\r\n\r\n",
    ]
    return client.talk(r.choice(lines), half_close=True), {400, 0}


def bad_form(client, r):
    bodies = [
        b"",
        b"garbage",
        b"--edge\r\n\r\n\r\n--edge--",
        b'--edge\r\nContent-Disposition: form-data; filename="a"\r\n\r\nx\r\n--edge--',
        b'--edge\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--edge--',
        r.randbytes(200),
    ]
    edge = r.choice(["", "; boundary=", "; boundary=edge", "; boundary=edge", f"; boundary={'e' * 5000}"])
    return client.talk(request(r.choice(bodies), kind="multipart/form-data" + edge)), {400, 422}


def bad_charset(client, r):
    charset = r.choice(
        ["undefined", "idna", "punycode", "utf-7", "zlib", "rot13", "nothing", "utf-16", "unicode_escape"]
    )
    kind = f"multipart/form-data; boundary=edge; charset={charset}"
    return client.talk(form((b"\xff\\ud800+2AA-.x", b"not an image"), kind=kind)), {400, 422}


def unknown_path(client, r):
    path = r.choice(
        [
            "/../../etc/passwd",
            "/%2e%2e/%2e%2e/etc",
            "/predict/",
            "/docs",
            "/openapi.json",
            "/%00",
            "/" + "a" * 999,
        ]
    )
    return client.talk(request(PNG, path=path)), {404, 307}


def wrong_method(client, r):
    method = r.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"])
    return client.talk(request(b"", method=method)), {405}


def many_files(client, r):
    return client.talk(form(*[(b"a", b"")] * 10_000)), {413}


def names(client, r):
    """Send valid images with malicious names, which are only returned to the client."""
    candidates = [
        b"\xff\xfe\x80.png",
        b"../../../etc/passwd",
        b"C:\\\\windows\\\\x",
        b"<img src=x onerror=alert(1)>",
    ]
    candidates += [
        b"a" * 4000,
        b"%0d%0aX-Evil: 1",
        "\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe".encode(),
        b"\xed\xa0\x80",
    ]
    name = r.choice(candidates)
    status, result = client.talk(form((name, PNG)))
    assert result["predictions"][0]["top"][0]["class"] == "red"
    if name.startswith(b"<"):
        assert result["predictions"][0]["name"] == name.decode()
    assert len(result["predictions"][0]["name"]) <= 255
    return (status, result), {200}


KINDS = [
    wrong_type, empty, truncated, noise, pixel_bomb, hundred_megabytes, length_too_long, length_too_short, slow_body,
    slow_head, huge_head, no_http, bad_form, bad_charset, unknown_path, wrong_method, many_files, names,
]  # fmt: skip


# Requests that are rejected because they take too long.
LATE = {slow_body, slow_head, length_too_long}


def test_the_server_survives_a_thousand_malformed_requests(serving, colors, caplog, eventually):
    with (
        serving(colors, limits=PATIENT) as (port, app),
        serving(colors, limits=HURRIED) as (hurried, hurried_app),
    ):

        def attack(number):
            kind = KINDS[number % len(KINDS)]
            client = Client(hurried if kind in LATE else port)
            (status, result), allowed = kind(client, random.Random(number))
            return kind.__name__, status, result, allowed

        with ThreadPoolExecutor(24) as pool:
            results = list(pool.map(attack, range(1008)))
        unexpected = {
            (kind, status, str(result)[:200])
            for kind, status, result, allowed in results
            if status not in allowed
        }
        assert not unexpected
        assert max(status for _, status, _, _ in results) < 500
        # Each rejection by the application has a reason in one line.
        for _, status, result, _ in results:
            if status >= 400 and isinstance(result, dict):
                assert result["error"].strip()
                assert "\n" not in result["error"]
        for each, service in ((port, app.state.service), (hurried, hurried_app.state.service)):
            assert Client(each).talk(request(JPEG))[1]["predictions"][0]["top"][0]["class"] == "red"
            # The server may notice a disconnected client after the client has finished.
            eventually(lambda service=service: service.held.used == 0 and len(service.batcher) == 0)
        assert [r for r in caplog.records if r.levelname == "ERROR"] == []


def test_an_unfinished_head_does_not_hold_a_connection(serving, colors):
    with serving(colors, limits=HURRIED) as (port, _):
        for head in (b"", b"GET / HT"):
            started = time.monotonic()  # before the server can start its timer
            with socket.create_connection(("127.0.0.1", port), timeout=600) as sock:
                sock.sendall(head)
                with contextlib.suppress(ConnectionResetError):
                    assert sock.recv(100) == b""
                assert time.monotonic() - started > 0.3


def test_a_rejected_body_is_not_read_forever(serving, colors):
    with (
        serving(colors, limits=HURRIED) as (port, _),
        socket.create_connection(("127.0.0.1", port), timeout=600) as sock,
    ):
        sock.sendall(request(b"", length=10**9))
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")
        started = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - started < 300:
                sock.sendall(b"x" * 1000)
                time.sleep(0.02)
        assert time.monotonic() - started < 300  # the server ended the connection


def test_idle_connections_do_not_keep_good_clients_out(serving, colors):
    """A new connection over the limit closes the oldest that waits for its client."""
    limits = Limits(max_connections=3, head_seconds=120, body_seconds=120)
    with serving(colors, limits=limits) as (port, _), contextlib.ExitStack() as stack:
        heads = [b"", b"GET / HT", request(b"", length=5000), b"", b""]
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in heads]
        for sock, head in zip(held, heads, strict=True):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(head)
        for _ in range(4):
            assert Client(port).talk(request(PNG))[0] == 200


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is another address on Linux only")
def test_a_client_cannot_take_all_connections(serving, colors):
    """The bodies never arrive in full; the limits of time do not matter."""
    limits = Limits(max_connections=8, head_seconds=120, body_seconds=120)
    with serving(colors, limits=limits) as (port, _), contextlib.ExitStack() as stack:
        good = stack.enter_context(Client(port).connect())
        good.sendall(request(PNG)[:-5])
        attackers = [stack.enter_context(Client(port, "127.0.0.2").connect()) for _ in range(20)]
        for sock in attackers:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(request(b"", length=5000))
        assert Client(port, "127.0.0.3").talk(request(PNG))[0] == 200
        good.sendall(request(PNG)[-5:])
        assert Client.read(good)[0] == 200  # the oldest connection, and yet not closed


def test_while_others_ask_one_request_of_a_client_is_worked_on_at_a_time(
    serving, colors, monkeypatch, eventually
):
    with serving(colors, limits=PATIENT, max_batch=1) as (port, app), contextlib.ExitStack() as stack:
        begun, submit = [], app.state.service.decoders.submit

        def counted(*arguments, client):
            begun.append(client)
            return submit(*arguments, client=client)

        monkeypatch.setattr(app.state.service.decoders, "submit", counted)
        colors.net.gate.clear()
        sockets = []
        for address in ("127.0.0.3", *["127.0.0.2"] * 8):
            sockets.append(stack.enter_context(Client(port, address).connect()))
            sockets[-1].sendall(request(PNG))
            eventually(lambda: begun)  # the other client asks first
        for _ in range(3):  # the server has seen all requests by then
            assert Client(port, "127.0.0.4").talk(request(b"", method="GET", path="/health"))[0] == 200
        eventually(lambda: len(begun) == 2)
        assert begun == ["127.0.0.3", "127.0.0.2"]
        colors.net.gate.set()
        assert [Client.read(sock)[0] for sock in sockets] == [200] * 9


def test_requests_that_do_not_wait_for_a_response_are_not_read(serving, colors):
    with serving(colors) as (port, _), Client(port).connect() as sock:
        sock.sendall(request(b"", method="GET", path="/health") * 3)
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while more := sock.recv(65_536):
                data += more
        assert data.count(b"HTTP/1.1 200") == 1


def test_a_slow_upload_does_not_delay_other_requests_of_its_client(serving, colors):
    with serving(colors, limits=PATIENT) as (port, _), Client(port, "127.0.0.2").connect() as slow:
        assert Client(port, "127.0.0.3").talk(request(PNG))[0] == 200
        slow.sendall(request(PNG)[:-5])
        assert Client(port, "127.0.0.3").talk(request(PNG))[0] == 200
        assert Client(port, "127.0.0.2").talk(request(PNG))[0] == 200
        slow.sendall(request(PNG)[-5:])
        assert Client.read(slow)[0] == 200


def test_a_client_that_does_not_read_its_response_is_disconnected(serving, colors, eventually):
    limits = Limits(body_seconds=0.5)
    classes = tuple(f"{i} {'x' * 3_000_000}" for i in range(3))
    model = dataclasses.replace(colors, classes=classes)
    with serving(model, limits=limits) as (port, _), Client(port).connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:  # requests one after the other, whose responses are not read
                sock.sendall(request(b"", method="GET", path="/health") * 20)
        assert Client(port).talk(request(PNG))[0] == 200


def test_an_endless_body_is_cut_off(serving, colors):
    with serving(colors, limits=PATIENT) as (port, _):
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        piece, sent = b"40000\r\n" + bytes(0x40000) + b"\r\n", 0
        with socket.create_connection(("127.0.0.1", port), timeout=600) as sock:
            sock.sendall(head)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while sent < 400_000_000:
                    sock.sendall(piece)
                    sent += len(piece)
        assert sent < 100_000_000


def test_a_body_of_tiny_chunks_is_cut_off(serving, colors):
    with serving(colors, limits=PATIENT) as (port, _), Client(port).connect() as sock:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 6_000_000:  # less than max_bytes of content
                sock.sendall(b"1\r\nx\r\n" * 1000)
                sent += 6000
        assert sent < 6_000_000


def test_a_request_with_two_lengths_ends_its_connection(serving, colors):
    image = encoded("PNG")
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(image), image)
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 4\r\n"
    with serving(colors, limits=PATIENT) as (port, _), Client(port).connect() as sock:
        sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        assert Client.read(sock)[0] == 200
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(request(image))
        assert Client.read(sock) == (0, "")


@pytest.mark.parametrize(
    ("host", "more", "status"),
    [
        ("localhost:8000", "", 200),
        ("127.0.0.1", "Origin: http://127.0.0.1\r\n", 200),
        ("[::1]:8000", "", 200),
        ("model.example", "Origin: http://model.example\r\n", 200),
        ("evil.example", "", 403),
        ("[::1]evil.example", "", 403),
        ("user@localhost", "", 403),
        ("127.0.0.1:80:80", "", 403),
        ("localhost:8000", "Origin: http://localhost:8000\r\nOrigin: http://evil.example\r\n", 403),
        ("127.0.0.1.evil.example", "", 403),
        ("localhost", "Origin: http://evil.example\r\n", 403),
        ("localhost", "Origin: null\r\n", 403),
        ("localhost:8000", "Origin: http://localhost:9000\r\n", 403),
        ("localhost", "Sec-Fetch-Site: cross-site\r\n", 403),
    ],
)
def test_hosts_and_origins_of_other_sites_are_refused(host, more, status, serving, colors):
    body = request(PNG, extra=more.encode()).replace(b"Host: localhost", b"Host: " + host.encode())
    with serving(colors, hosts=["model.example"]) as (port, _):
        found, answer = Client(port).talk(body)
    assert found == status
    if status == 403:
        assert "--allow-host" in answer["error"]


@pytest.fixture
def decoders():
    """Decoders with a budget of 60 megapixels, 40 for each client, and an event that lets `slow` return."""
    made, gate = (
        Decoders(2, max_pixels=60_000_000, max_image=60_000_000, max_each=40_000_000),
        threading.Event(),
    )
    yield made, gate
    gate.set()
    made.stop()


def slow_decode(gate, entered):
    """Return a function that decodes an image for as long as it is wanted or the gate is closed."""

    def decode(data, given_up):
        entered.set()
        while not gate.wait(0.01):
            if given_up():
                raise CancelledError
        return len(data)

    return decode


def test_the_pixels_of_all_waiting_images_have_a_limit_and_large_ones_do_not_delay_small_ones(decoders):
    image = {size: bomb(size) for size in (5000, 3000, 100)}
    decoders, gate = decoders
    slow = slow_decode(gate, entered := threading.Event())
    (first,) = decoders.submit(slow, [image[5000]], client="a")  # 25 megapixels
    assert entered.wait(60)
    (second,) = decoders.submit(slow, [image[5000]], client="b")
    for client, side, status in (("a", 5000, 429), ("c", 5000, 503), ("c", 100_000, None)):
        if status is None:  # not decoded, so it does not count
            assert (
                decoders.submit(lambda data, _: "refused", [bomb(side)], client=client)[0].result(60)
                == "refused"
            )
            continue
        with pytest.raises(RequestError) as error:
            decoders.submit(slow, [image[side]], client=client)
        assert error.value.status == status
    with pytest.raises(RequestError) as error:
        decoders.submit(slow, [image[5000]] * 3)
    assert error.value.status == 413
    for side in (3000, 100):  # while a large one is being decoded
        (smaller,) = decoders.submit(lambda data, _: len(data), [image[side]], client="a")
        assert smaller.result(60) == len(image[side])
    assert second.cancel()
    gate.set()
    assert first.result(60) == len(image[5000])


def test_an_image_of_a_client_that_left_is_not_decoded_to_its_end(decoders):
    decoders, gate = decoders
    (left,) = decoders.submit(slow_decode(gate, entered := threading.Event()), [bomb(5000)])
    assert entered.wait(60)
    assert not left.cancel()  # it has begun
    with pytest.raises(CancelledError):
        left.result(60)
    (next_one,) = decoders.submit(lambda data, _: "decoded", [bomb(5000)])
    assert next_one.result(60) == "decoded"


def test_the_pixels_of_an_image_that_was_given_up_are_freed_at_once(decoders):
    decoders, gate = decoders
    entered, kept = threading.Event(), []

    class Pixels:
        pass

    def decode(data, given_up):
        pixels = Pixels()
        kept.append(weakref.ref(pixels))
        return slow_decode(gate, entered)(data, given_up)

    gc.disable()
    try:
        (left,) = decoders.submit(decode, [bomb(5000)])
        assert entered.wait(60)
        left.cancel()
        with pytest.raises(CancelledError):
            left.result(60)
        (after,) = decoders.submit(lambda data, _: kept[0](), [bomb(5000)])  # by the same thread
        assert after.result(60) is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "PPM"])
def test_decoding_is_given_up_between_blocks(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    asked = []
    whole = load_image(out.getvalue(), given_up=lambda: asked.append(0))
    assert np.array_equal(whole, load_image(out.getvalue()))
    assert len(asked) > len(out.getvalue()) // (2 * _BLOCK)
    for stop_after in (len(asked) // 2, len(asked) - 1):
        calls = iter(range(len(asked)))
        with pytest.raises(CancelledError):
            load_image(out.getvalue(), given_up=lambda n=stop_after, c=calls: next(c) >= n)


def test_clients_take_turns(decoders):
    """One client sends fifty images, another one; the other is answered after one of them."""
    decoders, gate = decoders
    image, order = bomb(100), []
    entered = threading.Event()
    blocking = slow_decode(gate, entered)
    held = decoders.submit(blocking, [image] * 2, client="a")  # both threads of the lane
    many = decoders.submit(lambda data, _: order.append("many"), [image] * 50, client="b")
    (one,) = decoders.submit(lambda data, _: order.append("one"), [image], client="c")
    gate.set()
    for future in (*held, *many, one):
        future.result(60)
    assert order.index("one") <= 3  # two threads


def test_a_client_that_disconnects_leaves_nothing_behind(serving, colors, caplog, eventually):
    limits = Limits(max_queue=1, max_files=1)
    with serving(colors, max_batch=1, max_delay_ms=0, limits=limits) as (port, app):
        colors.net.entered.clear()
        colors.net.gate.clear()
        service = app.state.service

        def metrics():
            return Client(port).talk(request(b"", method="GET", path="/metrics"))[1]

        arrived = [
            (request(PNG, length=99_999), lambda: service.held.used),
            (request(PNG), colors.net.entered.is_set),
            (request(PNG), lambda: len(service.batcher)),
            (request(PNG), lambda: len(service.batcher)),
        ]
        for left, (data, has_arrived) in enumerate(arrived, 1):
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(data)
                eventually(has_arrived)
            eventually(lambda n=left: f'requests_total{{path="/predict",status="499"}} {n}.0' in metrics())
        colors.net.gate.set()
        assert Client(port).talk(request(PNG))[0] == 200
        assert service.held.used == 0
        # The image that was in the network, and the last one.
        assert "normfree_batch_size_sum 2.0" in metrics()
        assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_open_requests_are_answered_at_shutdown_or_get_503(serving, colors, caplog):
    for seconds, status in ((60, 200), (0.4, 503)):
        with ThreadPoolExecutor() as pool, serving(colors, shutdown_seconds=seconds) as (port, _):
            colors.net.entered.clear()
            colors.net.gate.clear()
            answer = pool.submit(Client(port).talk, request(PNG))
            assert colors.net.entered.wait(60)
            if status == 200:
                threading.Timer(0.2, colors.net.gate.set).start()  # after the shutdown has begun
            else:
                answer.add_done_callback(lambda _: colors.net.gate.set())
        assert answer.result()[0] == status
    assert answer.result()[1] == {"error": "the server is stopping"}
    assert [r.message.split(": ", 1)[1] for r in caplog.records if r.name == "normfree.serve"] == [
        "POST '/predict' canceled, the server is stopping"
    ]
    assert not any(r.exc_info for r in caplog.records)
