"""Laws of the server: any request gets an answer, and what clients share is counted."""

import asyncio
from collections import Counter

from hypothesis import example, given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from normfree.serve.fair_queue import FairQueue
from normfree.serve.limits import Budget, Limits, RequestError, client_of
from normfree.serve.origin import HostGuard
from normfree.serve.upload import uploads

header = st.binary(max_size=20)
hosts = st.from_regex(r"[a-z]{1,5}(\.[a-z]{1,3})?(:[0-9]{1,4})?", fullmatch=True)


def status_of(method, allowed=(), **headers):
    """Return the status with which `HostGuard` lets a request through (200) or refuses it."""
    scope = {"type": "http", "method": method, "path": "/", "query_string": b"",
             "headers": [(name.replace("_", "-").encode(), value) for name, value in headers.items()]}  # fmt: skip
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b""}

    asyncio.run(HostGuard(PlainTextResponse("ok"), allowed)(scope, receive, send))
    return sent[0]["status"]


@given(st.sampled_from(["GET", "POST", "PUT"]), header, header, header)
@example("POST", b"localhost", b"http://[", b"")
@example("GET", b"[::1", b"", b"")
@example("POST", b"localhost", b"http://\xff", b"")
def test_any_host_and_origin_are_answered(method, host, origin, site):
    assert status_of(method, host=host, origin=origin, sec_fetch_site=site) in (200, 403)


@given(hosts, st.sampled_from(["GET", "POST"]))
def test_other_hosts_are_refused_and_allowed_ones_are_not(host, method):
    name = host.partition(":")[0]
    usual = status_of(method, host=b"localhost")
    assert usual == 200
    assert status_of(method, host=f"{name}.example".encode()) == 403
    assert status_of(method, [f"{name}.example"], host=f"{name.upper()}.EXAMPLE:80".encode()) == 200


@given(hosts)
def test_pages_of_other_sites_cannot_post_and_pages_of_this_server_can(host):
    assert status_of("POST", host=b"127.0.0.1:8000", origin=f"http://{host}".encode()) == 403
    assert status_of("POST", host=b"127.0.0.1:8000", origin=b"http://127.0.0.1:8000") == 200
    assert status_of("GET", host=b"127.0.0.1:8000", origin=f"http://{host}".encode()) == 200


def read(body, content_type, chunk=7):
    """Return the files of a request, or the error with which it is refused."""
    chunks = [body[i : i + chunk] for i in range(0, len(body), chunk)] or [b""]
    messages = [
        {"type": "http.request", "body": c, "more_body": i + 1 < len(chunks)} for i, c in enumerate(chunks)
    ]

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    held = Budget(10**6, each=10**6, what="bytes")
    scope = {"type": "http", "method": "POST", "path": "/", "client": ("192.0.2.7", 1),
             "headers": [(b"content-type", content_type)]}  # fmt: skip

    async def run():
        async with uploads(Request(scope, receive), limits=Limits(max_bytes=2000), held=held) as files:
            return files

    try:
        return asyncio.run(run())
    except RequestError as error:
        return error
    finally:
        assert held.used == 0


@given(st.binary(max_size=200), st.integers(1, 50))
def test_an_image_arrives_as_it_was_sent_in_any_pieces(body, chunk):
    assert [file.data for file in read(body, b"image/png", chunk)] == [body]


names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20)


@given(st.lists(st.tuples(names, st.binary(max_size=40)), min_size=1, max_size=4), st.integers(1, 50))
def test_the_files_of_a_form_arrive_as_they_were_sent_in_any_pieces(files, chunk):
    boundary = b"0123456789-not-in-the-data"
    body = b"".join(
        b'--%s\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n'
        % (boundary, name.encode(), data)
        for name, data in files
    )
    found = read(body + b"--%s--\r\n" % boundary, b"multipart/form-data; boundary=" + boundary, chunk)
    assert [(file.name, file.data) for file in found] == files


forms = st.sampled_from([b"multipart/form-data; boundary=a", b"multipart/form-data", b"image/png"])


@given(st.one_of(header, forms), st.binary(max_size=100).map(lambda data: data.replace(b"0", b"\r\n--a\r\n")))
@example(
    b'multipart/form-data; boundary=a; charset=x"',
    b'--a\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n--a--',
)
@example(
    b"multipart/form-data; boundary=a; charset=utf-16",
    b'--a\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n\r\n--a--',
)
@example(b"multipart/form-data; boundary=" + b"a" * 500, b"--a")
@example(b"image/png", b"x" * 3000)
def test_any_body_is_files_or_refused_with_a_status(kind, body):
    found = read(body, kind)
    if isinstance(found, RequestError):
        assert 400 <= found.status < 500
    else:
        assert found


clients = st.sampled_from("abc")


@given(st.lists(st.tuples(clients, st.integers(1, 9)), max_size=12), st.integers(1, 30), st.integers(1, 9))
def test_a_budget_is_never_exceeded_and_empty_at_the_end(wishes, limit, each):
    budget, taken = Budget(limit, each=each, what="bytes"), []
    for client, amount in wishes:
        own = sum(a for c, a in taken if c == client)
        try:
            budget.take(client, amount)
            taken.append((client, amount))
            assert not own or own + amount <= each
        except RequestError as error:
            assert error.status == (429 if own and own + amount > each else 503)
        assert budget.used == sum(a for _, a in taken) <= limit
    for client, amount in taken:
        budget.give_back(client, amount)
    assert budget.used == 0


@given(st.lists(clients, max_size=20))
def test_clients_take_turns_and_their_items_stay_in_order(senders):
    queue, left = FairQueue(), Counter(senders)
    for number, client in enumerate(senders):
        queue.append(client, (client, number))
    served = queue.clear()
    assert sorted(served, key=lambda item: item[1]) == [(c, n) for n, c in enumerate(senders)]
    for client in left:
        own = [number for c, number in served if c == client]
        assert own == sorted(own)
    seen = Counter()
    rounds = [seen.update([client]) or seen[client] for client, _ in served]
    assert rounds == sorted(rounds)  # the second item of a client comes after the first one of each other


@given(st.ip_addresses(), st.integers(0, 2**64 - 1))
def test_all_addresses_of_a_network_are_one_client(address, host):
    client = client_of((str(address), 1))
    assert client_of((str(address), 2)) == client
    if address.version == 6 and address.ipv4_mapped is None:
        neighbor = type(address)((int(address) >> 64 << 64) + host)
        assert client_of((str(neighbor), 1)) == client or neighbor.ipv4_mapped is not None
    else:
        assert client == str(address if address.version == 4 else address.ipv4_mapped)
