"""The endpoints: the same numbers as `predict`, precise errors, and metrics."""

import asyncio
import base64
import hashlib
import http.client
import io
import json
import re
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.formparsers import MultiPartParser

from normfree.data.transforms.decode import formats
from normfree.models.zoo import create_model
from normfree.prediction import predict
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel
from normfree.serve.limits import Limits
from normfree.serve.request_metrics import RequestMetrics, RequestMonitor


def png(color, size=(12, 10)):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


RED, BLUE = png("red"), png("blue")


def form(*files):
    parts = [
        f'--edge\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in files
    ]
    return b"".join(parts) + b"--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}


def send(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    kind = response.headers["content-type"]
    return response.status, json.loads(text) if kind == "application/json" else text, response.headers


def post(port, *files, path="/predict"):
    return send(port, "POST", path, *form(*files))[:2]


def test_probabilities_equal_those_of_predict(serving, tmp_path):
    net = create_model("nf_resnet_nano", num_classes=7).eval()
    with torch.no_grad():
        net.head.weight.normal_(std=3)
        for name, parameter in net.named_parameters():
            if name.endswith("skip_gain"):
                parameter.normal_()
    model = TrainedModel(net, Preprocessing(image_size=40), tuple("abcdefg"))
    random = np.random.default_rng(0)
    for i in range(6):
        pixels = random.integers(0, 255, (50 + i, 61 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    expected = list(predict(model, [tmp_path], top=3, device="cpu"))
    assert len({p.classes for p in expected}) > 1
    with serving(model) as (port, _):
        files = [(p.name, p.read_bytes()) for p in sorted(tmp_path.iterdir())]
        status, together = post(port, *files, path="/predict?top=3")
        assert status == 200
        alone = [
            send(port, "POST", "/predict?top=3", data, {"Content-Type": "image/png"})[1]["predictions"][0]
            for _, data in files
        ]
    for i, want in enumerate(expected):
        for got, name in ((together["predictions"][i], f"{i}.png"), (alone[i], "image")):
            assert got["name"] == name
            assert tuple(entry["class"] for entry in got["top"]) == want.classes
            assert [entry["probability"] for entry in got["top"]] == pytest.approx(
                want.probabilities, abs=1e-5
            )


def test_valid_and_invalid_files_of_one_request_get_separate_results(serving, colors):
    with serving(colors) as (port, _):
        status, result = post(port, ("a.png", RED), ("b.txt", b"hello"), ("c.png", BLUE), ("d.png", b""))
        assert status == 200
        first, second, third, fourth = result["predictions"]
        assert [first["top"][0]["class"], third["top"][0]["class"]] == ["red", "<b>blue</b>"]
        assert [len(first["top"]), sum(e["probability"] for e in first["top"])] == [
            3,
            pytest.approx(1, abs=1e-5),
        ]
        assert second == {"name": "b.txt", "error": f"not an image, or not one of {', '.join(formats())}"}
        assert fourth == {"name": "d.png", "error": "the file is empty"}
        status, result = post(port, ("a.png", RED), path="/predict?top=1")
        assert [e["class"] for e in result["predictions"][0]["top"]] == ["red"]
        status, result = post(port, ("b.txt", b"hello"), ("c.png", b""))
        assert status == 422
        assert result["error"] == (
            "none of the 2 files is a usable image; b.txt: "
            f"not an image, or not one of {', '.join(formats())}"
        )
        assert [p["name"] for p in result["predictions"]] == ["b.txt", "c.png"]


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "error"),
    [
        ("/predict", RED, "text/plain", 415, "content type is 'text/plain'. Allowed: multipart/form-data with files, "
         "or image/*. Fix: curl -F file=@photo.jpg ADDRESS/predict."),
        ("/predict", b"", "image/png", 422, "image: the file is empty"),
        ("/predict", RED[:48], "image/png", 422, "image: damaged: image file is truncated"),
        ("/predict", b"x" * 4001, "image/png", 413, "more than 4,000 bytes. Fix: send fewer or smaller files."),
        ("/predict", png("red", (101, 100)), "image/png", 422,
         "image: too large: 101 x 100 pixels, the limit is 10,000. Fix: scale it down, or raise max_pixels"),
        ("/predict?top=0", RED, "image/png", 422, "top is '0'. Allowed: a whole number from 1. Fix: ?top=5."),
        ("/predict?top=two", RED, "image/png", 422, "top is 'two'. Allowed: a whole number from 1. Fix: ?top=5."),
        ("/predict", b"", "multipart/form-data", 400, "Missing boundary in multipart."),
        ("/predict", b"--e--\r\n", "multipart/form-data; boundary=e", 400,
         "the form contains no file. Fix: curl -F file=@photo.jpg ADDRESS/predict."),
        ("/predict", form(*[("a", RED)] * 3)[0], "multipart/form-data; boundary=edge", 413,
         "more than 2 files. Fix: send them in several requests."),
        ("/predict", form(*[("a", b"")] * 20)[0], "multipart/form-data; boundary=edge", 413,
         "more than 2 files. Fix: send them in several requests."),
        ("/nothing", RED, "image/png", 404, "Not Found: POST /nothing"),
        ("/health", RED, "image/png", 405, "Method Not Allowed: POST /health"),
    ],
    ids=range(13),
)  # fmt: skip
def test_an_invalid_request_gets_one_line_and_a_status(serving, colors, path, body, kind, status, error):
    with serving(colors, limits=Limits(max_bytes=4000, max_pixels=10_000, max_files=2)) as (port, app):
        got, result, headers = send(port, "POST", path, body, {"Content-Type": kind})
        assert (got, result["error"]) == (status, error)
        assert headers["x-content-type-options"] == "nosniff"
        assert app.state.service.held.used == 0


def test_health_and_metrics_count_what_happened(serving, colors):
    with serving(colors, name="colors", max_delay_ms=0) as (port, _):
        status, facts, _ = send(port, "GET", "/health")
        assert status == 200
        assert facts.pop("version")
        assert facts == {
            "ready": True, "model": "colors", "image_size": 8, "num_classes": 3, "device": "cpu",
            "classes": ["red", "green", "<b>blue</b>"],
            "limits": {"bytes": 32_000_000, "pixels": 64_000_000, "files": 16},
        }  # fmt: skip
        post(port, ("a", RED), ("b", b"no"))
        post(port, ("c", b"no"))
        for i in range(3):
            send(port, "GET", f"/{i}")
        text = send(port, "GET", "/metrics")[1]
    for line in (
        'normfree_requests_total{path="/predict",status="200"} 1.0',
        'normfree_requests_total{path="/predict",status="422"} 1.0',
        'normfree_requests_total{path="other",status="404"} 3.0',
        'normfree_request_seconds_count{path="/predict"} 2.0',
        'normfree_images_total{result="answered"} 1.0',
        'normfree_images_total{result="refused"} 2.0',
        'normfree_batch_size_bucket{le="1.0"} 1.0',
        "normfree_batch_size_count 1.0",
        "normfree_queue_length 0.0",
        "normfree_held_bytes 0.0",
        "normfree_waiting_pixels 0.0",
    ):
        assert line in text.splitlines()
    assert "/0" not in text  # an unknown path is not a label


def test_the_policy_allows_only_the_style_and_script_of_the_page(serving, colors):
    with serving(colors) as (port, _):
        _, html, headers = send(port, "GET", "/")
    policy = headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    for tag in ("style", "script"):
        (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "http" not in html  # nothing is loaded from other servers
    assert "innerHTML" not in html


def test_a_full_queue_is_503_with_retry_after(serving, colors, caplog, eventually):
    limits = Limits(max_queue=2, max_files=2)
    with serving(colors, limits=limits, max_batch=1, max_delay_ms=0) as (port, app):
        colors.net.entered.clear()
        colors.net.gate.clear()
        results = []
        threads = [threading.Thread(target=lambda: results.append(post(port, ("a", RED)))) for _ in range(3)]
        threads[0].start()
        assert colors.net.entered.wait(60)  # the network holds the first image
        for thread in threads[1:]:
            thread.start()
        eventually(lambda: len(app.state.service.batcher) == 2)
        status, result, headers = send(port, "POST", "/predict", RED, {"Content-Type": "image/png"})
        assert (status, result, headers["retry-after"]) == (503, {"error": "the queue is full"}, "1")
        assert f"request {headers['x-request-id']}: 503, the queue is full" in [
            r.message for r in caplog.records
        ]
        colors.net.gate.set()
        for thread in threads:
            thread.join()
        assert [status for status, _ in results] == [200] * 3


def test_bodies_over_all_requests_are_limited(serving, colors):
    limits = Limits(max_bytes=3000, max_held_bytes=4000)
    with serving(colors, limits=limits) as (port, app):
        app.state.service.held.used = 3900
        status, result, headers = send(
            port, "POST", "/predict", RED + bytes(500), {"Content-Type": "image/png"}
        )
        assert (status, result) == (503, {"error": "too many uploads at once"})
        assert headers["retry-after"] == "1"
        assert app.state.service.held.used == 3900
        app.state.service.held.used = 0
        assert send(port, "POST", "/predict", RED, {"Content-Type": "image/png"})[0] == 200


@pytest.mark.parametrize(
    ("fault", "reason"), [("raise", "out of memory"), ("nan", "the output of the network is not finite")]
)
def test_an_error_in_the_network_is_a_500_with_a_log_line_and_the_server_continues(
    serving, colors, caplog, fault, reason
):
    with serving(colors) as (port, _):
        colors.net.fault = fault
        status, result, headers = send(port, "POST", "/predict", RED, {"Content-Type": "image/png"})
        name = headers["x-request-id"]
        assert (status, result) == (500, {"error": f"internal error, request {name}"})
        (record,) = [r for r in caplog.records if name in r.message]
        assert record.message == f"request {name}: POST '/predict' failed"
        assert str(record.exc_info[1]) == reason
        colors.net.fault = ""
        assert post(port, ("a", RED))[0] == 200


def test_a_path_with_an_end_of_line_is_one_line_of_the_log(caplog):
    async def failing(scope, receive, send):
        raise RuntimeError

    async def send(message):
        sent.append(message)

    sent: list[dict] = []
    scope = {"type": "http", "method": "GET", "path": "/a\nforged: line\x1b[2J"}
    asyncio.run(
        RequestMonitor(failing, RequestMetrics(int, held_bytes=int, waiting_pixels=int))(scope, None, send)
    )
    assert sent[0]["status"] == 500
    assert caplog.records[0].getMessage().endswith(r"GET '/a\nforged: line\x1b[2J' failed")


def test_a_form_is_kept_in_memory(serving, colors, monkeypatch):
    rows = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)  # cannot be compressed
    out = io.BytesIO()
    Image.fromarray(rows).save(out, "PNG")
    assert len(out.getvalue()) > MultiPartParser.spool_max_size

    def refuse(*_, **__):
        raise AssertionError("a temporary file")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with serving(colors) as (port, _):
        assert post(port, ("a", out.getvalue()))[0] == 200


def test_a_stopped_worker_is_not_ready(serving, colors):
    with serving(colors) as (port, app):
        app.state.service.batcher.stop()
        status, facts, _ = send(port, "GET", "/health")
        assert (status, facts["ready"]) == (503, False)
        assert post(port, ("a", RED)) == (503, {"error": "the server is stopping"})


def test_a_network_that_cannot_run_is_found_before_the_first_request(serving, colors):
    short = TrainedModel(colors.net, colors.preprocessing, ("red", "green"))
    with pytest.raises(
        ValueError, match=r"^the network has 3 outputs for 2 class names\. Allowed: one name for each"
    ):
        serving(short).__enter__()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_bytes": 0}, "max_bytes is 0. Allowed: above 0. Fix: max_bytes=32000000."),
        ({"body_seconds": float("nan")}, "body_seconds is nan. Allowed: above 0. Fix: body_seconds=60.0."),
        ({"max_files": 200}, "max_files is 200. Allowed: at most max_queue, which is 128. Fix: max_files=128."),
    ],
)  # fmt: skip
def test_invalid_limits(wrong, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Limits(**wrong)
    assert str(error.value) == message


def test_a_missing_package_is_an_error_with_the_install_command(monkeypatch):
    monkeypatch.delitem(sys.modules, "normfree.serve.app")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'^normfree serve needs fastapi, .* pip install "normfree\[serve\]"\.$'
    ):
        import normfree.serve.app  # noqa: F401
