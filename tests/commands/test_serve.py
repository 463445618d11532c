"""`normfree serve` as a process: its address, clean shutdown, and one-line errors."""

import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from normfree import cli
from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, save_pretrained
from normfree.serve import server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "m"
    net = create_model("nf_resnet_nano", num_classes=3).eval()
    save_pretrained(TrainedModel(net, Preprocessing(image_size=16, crop="squash"), ("a", "b", "c")), out)
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_it_prints_its_address_serves_and_exits_cleanly_on_a_signal(folder, number):
    args = [sys.executable, "-m", "normfree", "serve", str(folder), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        args,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        line = process.stdout.readline()
        found = re.fullmatch(
            r"nf_resnet_nano, 3 classes: (http://127\.0\.0\.1:\d+/)  \(Ctrl-C stops it\)\n", line
        )
        with urllib.request.urlopen(found[1] + "health", timeout=600) as response:
            assert json.load(response)["ready"] is True
        process.send_signal(number)
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (0, "", "")


def test_a_port_in_use_is_one_line_and_exit_code_2(folder, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["serve", str(folder), "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"normfree: 127.0.0.1 port {port} cannot be used: Address already in use. "
        "Fix: choose another --port, or 0 for any free port.\n"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--port 70000", "port is 70000. Allowed: 0 to 65535. Fix: --port 8000."),
        # an address reserved for documentation, which no machine has
        ("--port 0 --host 203.0.113.1",
         "203.0.113.1 port 0 cannot be used: Cannot assign requested address. Fix: --host 127.0.0.1."),
        ("--port 0 --max-batch 0", "max_batch is 0. Allowed: 1 or more. Fix: max_batch=1."),
        ("--port 0 --max-files 0", "max_files is 0. Allowed: above 0. Fix: max_files=16."),
    ],
)  # fmt: skip
def test_invalid_arguments_are_one_line_and_exit_code_2(folder, capsys, line, message):
    assert cli.main(["serve", str(folder), "--device", "cpu", *line.split()]) == 2
    assert capsys.readouterr().err == f"normfree: {message}\n"


def test_it_listens_on_the_loopback_interface_unless_told_otherwise(folder, monkeypatch):
    bound = []
    monkeypatch.setattr(server, "run", lambda _, sock: bound.append(sock.getsockname()[0]))
    assert cli.main(["serve", str(folder), "--port", "0", "--device", "cpu"]) == 0
    assert ipaddress.ip_address(bound[0]).is_loopback


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_a_public_address_prints_a_warning(folder, capsys, monkeypatch, host, warned):
    monkeypatch.setattr(server, "run", lambda *_: None)
    assert cli.main(["serve", str(folder), "--host", host, "--port", "0", "--device", "cpu"]) == 0
    expected = (
        f"normfree: {host} can be reached from other machines, and there is no authentication\n"
        if warned
        else ""
    )
    assert capsys.readouterr().err == expected
