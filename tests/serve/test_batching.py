"""Batching changes the time of a result, never the result."""

import doctest
import random
import threading
import time

import pytest
import torch

from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel
from normfree.serve import fair_queue, limits
from normfree.serve.batching import Batcher, ClientLimit, Unavailable, probabilities


def results(futures):
    return [f.result(600) for f in futures]


def test_batched_results_equal_single_results_in_any_order():
    net = create_model("nf_resnet_nano", num_classes=7).eval()
    with torch.no_grad():
        net.head.weight.normal_()
    model = TrainedModel(net, Preprocessing(image_size=32, crop="squash"), tuple("abcdefg"))
    run = probabilities(model, device=torch.device("cpu"))
    images = list(torch.randint(0, 256, (37, 3, 32, 32), dtype=torch.uint8))
    alone = torch.cat([run(image[None]) for image in images])
    assert alone.std(dim=0).max() > 0.01  # the outputs differ, so a wrong order would be found
    order = list(range(37))
    random.Random(0).shuffle(order)
    got, sizes = {}, []
    batcher = Batcher(run, max_batch=5, max_delay_ms=20, on_batch=lambda size, _: sizes.append(size))

    def ask(part):
        futures = batcher.submit([images[i] for i in part])
        got.update({i: f.result(600) for i, f in zip(part, futures, strict=True)})

    threads = [threading.Thread(target=ask, args=(order[k::4],)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batcher.stop()
    torch.testing.assert_close(torch.stack([got[i] for i in range(37)]), alone, rtol=1e-5, atol=1e-6)
    assert sum(sizes) == 37
    assert max(sizes) == 5  # each thread submits more than 5 images at once, so full batches occur


def test_a_full_batch_starts_at_once_and_a_single_image_waits_for_the_delay():
    batcher = Batcher(lambda images: images.sum(dim=1), max_batch=4)
    batcher._delay = 3600  # s
    results(batcher.submit(list(torch.ones(4, 3))))  # raises after ten minutes
    batcher.stop()
    batcher = Batcher(lambda images: images.sum(dim=1), max_batch=4, max_delay_ms=120)
    started = time.monotonic()
    results(batcher.submit([torch.ones(3)]))
    assert time.monotonic() - started > 0.1
    batcher.stop()


class Gate:
    """A network that waits until `open` is set, and records the sizes of its batches."""

    def __init__(self):
        self.entered, self.open, self.seen = threading.Event(), threading.Event(), []

    def __call__(self, images):
        self.entered.set()
        assert self.open.wait(60)
        self.seen.append(len(images))
        return images


def test_a_full_queue_accepts_all_images_of_a_request_or_none():
    gate = Gate()
    batcher = Batcher(gate, max_batch=2, max_delay_ms=0, max_queue=3)
    first = batcher.submit([torch.zeros(1)])
    assert gate.entered.wait(60)
    waiting = batcher.submit([torch.ones(1), torch.ones(1)])
    with pytest.raises(Unavailable, match=r"^the queue is full \(2 images wait\)$"):
        batcher.submit([torch.ones(1), torch.ones(1)])
    assert len(batcher) == 2  # without the rejected images
    last = batcher.submit([torch.full((1,), 2.0)])
    gate.open.set()
    assert torch.cat(results(first + waiting + last)).tolist() == [0, 1, 1, 2]
    assert gate.seen == [1, 2, 1]
    batcher.stop()


def test_an_error_reaches_all_images_of_the_batch_and_the_next_batch_succeeds():
    def run(images):
        if images.min() < 0:
            raise RuntimeError("no memory")
        return images[:1] if images.max() > 1 else images

    batcher = Batcher(run, max_batch=3, max_delay_ms=1000)
    for future in batcher.submit(list(torch.tensor([1.0, -1.0, 0.0]))):
        with pytest.raises(RuntimeError, match=r"^no memory$"):
            future.result(60)
    for future in batcher.submit(list(torch.tensor([2.0, 1.0, 0.0]))):
        with pytest.raises(RuntimeError, match=r"^the network returned 1 outputs for 3 images$"):
            future.result(60)
    assert [float(a) for a in results(batcher.submit(list(torch.tensor([0.1, 0.2, 0.3]))))] == pytest.approx(
        [0.1, 0.2, 0.3]
    )
    batcher.stop()


def test_an_error_in_on_batch_does_not_end_the_worker(caplog):
    def count(size, seconds):
        raise KeyError(size)

    batcher = Batcher(lambda images: images, max_delay_ms=0, on_batch=count)
    results(batcher.submit([torch.zeros(1)]))
    results(batcher.submit([torch.zeros(1)]))
    assert batcher.ready
    batcher.stop()
    assert [r.message for r in caplog.records] == ["on_batch failed"] * 2


def test_canceled_images_leave_the_queue_and_are_not_computed():
    gate = Gate()
    batcher = Batcher(gate, max_batch=2, max_delay_ms=0, max_queue=3)
    batcher.submit([torch.zeros(1)])
    assert gate.entered.wait(60)
    first, gone, last = batcher.submit([torch.ones(1)] * 3)
    with pytest.raises(Unavailable):
        batcher.submit([torch.ones(1)])
    assert gone.cancel()
    assert len(batcher) == 2
    extra = batcher.submit([torch.ones(1)])
    gate.open.set()
    results([first, last, *extra])
    assert gate.seen == [1, 2, 1]
    gate.entered.clear()
    gate.open.clear()
    batcher.submit([torch.zeros(1)])  # all waiting images are canceled, and the worker continues
    assert gate.entered.wait(60)
    assert all(f.cancel() for f in batcher.submit([torch.ones(1)] * 2))
    gate.open.set()
    results(batcher.submit([torch.ones(1)]))
    assert gate.seen == [1, 2, 1, 1, 1]
    batcher.stop()


def test_stop_processes_waiting_images_and_accepts_no_more():
    gate = Gate()
    batcher = Batcher(gate, max_batch=2, max_delay_ms=10_000)
    futures = batcher.submit([torch.zeros(1)] * 5)
    assert gate.entered.wait(60)
    threading.Timer(0.1, gate.open.set).start()
    batcher.stop()
    assert all(f.done() for f in futures)
    assert gate.seen == [2, 2, 1]  # the last image did not wait for ten seconds
    assert not batcher.ready
    with pytest.raises(Unavailable, match=r"^the server is stopping$"):
        batcher.submit([torch.zeros(1)])


def test_stop_does_not_wait_for_a_network_that_hangs():
    gate = Gate()
    batcher = Batcher(gate, max_batch=1, max_delay_ms=0)
    first, second = batcher.submit([torch.zeros(1)] * 2)
    assert gate.entered.wait(60)
    batcher.stop(timeout=0.1)
    with pytest.raises(Unavailable, match=r"^the server is stopping$"):
        second.result(60)
    gate.open.set()
    assert first.result(60) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0. Allowed: 1 or more. Fix: max_batch=1."),
        ({"max_delay_ms": -1}, "max_delay_ms is -1. Allowed: 0 to 10000. Fix: max_delay_ms=5."),
        ({"max_delay_ms": float("nan")}, "max_delay_ms is nan. Allowed: 0 to 10000. Fix: max_delay_ms=5."),
        ({"max_queue": 0}, "max_queue is 0. Allowed: 1 or more. Fix: max_queue=128."),
    ],
)  # fmt: skip
def test_invalid_arguments(wrong, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Batcher(lambda images: images, **wrong)
    assert str(error.value) == message


def test_clients_take_turns_in_the_batches_and_have_a_limit_each():
    gate, seen = threading.Event(), []

    def run(images):
        gate.wait(60)
        seen.append(images[:, 0].tolist())
        return images

    batcher = Batcher(run, max_batch=2, max_delay_ms=0, max_queue=8, max_each=5)
    first = batcher.submit([torch.zeros(1)], client="first")
    while len(batcher):  # until it is in the network
        time.sleep(0.01)
    many = batcher.submit(list(torch.ones(5, 1)), client="many")
    with pytest.raises(ClientLimit, match="5 images of this client wait already"):
        batcher.submit([torch.ones(1)], client="many")
    one = batcher.submit([2 * torch.ones(1)], client="one")
    with pytest.raises(Unavailable, match="the queue is full"):
        batcher.submit(list(torch.ones(3, 1)), client="third")
    gate.set()
    results([*first, *many, *one])
    batcher.stop()
    assert seen == [[0], [1, 2], [1, 1], [1, 1]]


@pytest.mark.parametrize("module", [fair_queue, limits])
def test_the_examples_run(module):
    assert doctest.testmod(module).failed == 0
