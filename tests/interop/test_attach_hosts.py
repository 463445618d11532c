"""`attach_agc` in other libraries' loops gives, bit for bit, the weights of a loop in plain PyTorch that clips by hand.

The reference loop uses neither the hook nor the library: it accumulates, clips with `adaptive_clip_grad_` and steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normfree
from normfree.optim.agc import unitwise_norm

CLIPPING, STEPS, SIZE = 0.02, 6, 8
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, 0.01),
}


def network() -> nn.Module:
    """Return a small network with a standardized convolution, a skip gain and a classifier."""
    torch.manual_seed(0)
    fields = {"depths": (1, 1), "widths": (16, 32), "strides": (1, 2), "group_width": 4}
    return normfree.create_model(
        "nf_resnet_nano", num_classes=3, drop_rate=0.0, stochdepth_rate=0.0, skip_gain=0.5, **fields
    )


def data(batches: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(batches * SIZE, 3, 16, 16, generator=generator),
        torch.randint(3, (batches * SIZE,), generator=generator),
    )


def loader(batches: int) -> DataLoader:
    return DataLoader(data(batches), batch_size=SIZE)


def by_hand(
    kind: str, *, accumulate: int = 1, context: Callable[[], Any] = nullcontext, clip_first: float = 0.0
) -> dict[str, Tensor]:
    """Train in plain PyTorch and return the weights. Every step clips some units and leaves others."""
    net = network()
    optimizer = OPTIMIZERS[kind](net.parameters())
    clipped = [(name, p) for name, p in net.named_parameters() if name != "head.weight"]
    for batch, (images, labels) in enumerate(loader(STEPS * accumulate), start=1):
        with context():
            loss = F.cross_entropy(net(images), labels)
        (loss / accumulate).backward()
        if batch % accumulate == 0:
            if clip_first:
                nn.utils.clip_grad_norm_(net.parameters(), clip_first)
            report = normfree.adaptive_clip_grad_(clipped, CLIPPING)
            assert 0.0 < float(report) < 1.0
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach() for name, p in net.named_parameters()}


def assert_equal(net: nn.Module, expected: dict[str, Tensor]) -> None:
    found = dict(net.named_parameters())
    assert found.keys() == expected.keys()
    assert max(float((found[name] - value).abs().max()) for name, value in expected.items()) == 0.0


@pytest.mark.works("Hugging Face Accelerate", "attach_agc")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(kind: str, accumulate: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    net = network()
    optimizer = OPTIMIZERS[kind](net.parameters())
    agc = normfree.attach_agc(optimizer, CLIPPING, model=net)
    net, prepared, batches = accelerator.prepare(net, optimizer, loader(STEPS * accumulate))
    for images, labels in batches:
        with accelerator.accumulate(net):
            accelerator.backward(F.cross_entropy(net(images), labels))
            prepared.step()
            prepared.zero_grad()
    assert agc.exempt == ("head.weight",)
    assert 0.0 < float(agc.report) < 1.0
    assert_equal(accelerator.unwrap_model(net), by_hand(kind, accumulate=accumulate))


def fit(kind: str, folder: Path, **options: Any) -> tuple[nn.Module, Any]:
    """Train with Lightning's automatic optimization, which steps with a closure; return the network and the handle."""
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = OPTIMIZERS[kind](self.parameters())
            self.agc = normfree.attach_agc(optimizer, CLIPPING, model=self)
            return optimizer

    task = Task()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(task, loader(STEPS * options.get("accumulate_grad_batches", 1)))
    assert task.agc.exempt == ("net.head.weight",)
    assert 0.0 < float(task.agc.report) < 1.0
    return task.net, task.agc


@pytest.mark.works("Lightning", "attach_agc")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(kind: str, accumulate: int, tmp_path: Path) -> None:
    net, _ = fit(kind, tmp_path, accumulate_grad_batches=accumulate)
    assert_equal(net, by_hand(kind, accumulate=accumulate))


@pytest.mark.works("Lightning", "attach_agc")
def test_lightning_in_bfloat16(tmp_path: Path) -> None:
    net, _ = fit("adamw", tmp_path, precision="bf16-mixed", accumulate_grad_batches=2)

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    assert_equal(net, by_hand("adamw", accumulate=2, context=autocast))


class Classifier(nn.Module):
    """A network as the Trainer calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(images)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def hugging_face(kind: str, folder: Path, *, accumulate: int = 1, max_grad_norm: float = 0.0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    model = Classifier()
    optimizer = OPTIMIZERS[kind](model.parameters())
    agc = normfree.attach_agc(optimizer, CLIPPING, model=model.net)
    arguments = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        max_grad_norm=max_grad_norm,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        images, labels = zip(*samples, strict=True)
        return {"images": torch.stack(images), "labels": torch.stack(labels)}

    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = InOrder(
        model,
        arguments,
        train_dataset=data(STEPS * accumulate),
        data_collator=collate,
        optimizers=(optimizer, constant),
    )
    trainer.train()
    assert 0.0 < float(agc.report) < 1.0
    return model.net


@pytest.mark.works("Hugging Face Transformers", "attach_agc")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_without_its_own_clipping(kind: str, accumulate: int, tmp_path: Path) -> None:
    assert_equal(hugging_face(kind, tmp_path, accumulate=accumulate), by_hand(kind, accumulate=accumulate))


@pytest.mark.works("Hugging Face Transformers", "attach_agc")
def test_the_trainer_clips_the_global_norm_first_by_default(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert transformers.TrainingArguments(tmp_path, report_to=[]).max_grad_norm == 1.0
    net = hugging_face("sgd", tmp_path, max_grad_norm=0.1)  # the gradients of this network are small
    assert_equal(net, by_hand("sgd", clip_first=0.1))
    with pytest.raises(AssertionError):
        assert_equal(net, by_hand("sgd"))


@pytest.mark.works("timm", "attach_agc")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_timms_loop(kind: str, accumulate: int, scaled: bool) -> None:
    """`train_one_epoch` of timm 1.0.31's train.py: its `_backward`, with `NativeScaler` and without."""
    utils = pytest.importorskip("timm.utils")
    net = network()
    optimizer = OPTIMIZERS[kind](net.parameters())
    agc = normfree.attach_agc(optimizer, CLIPPING, model=net)
    loss_scaler = utils.NativeScaler(device="cpu") if scaled else None
    optimizer.zero_grad()
    for batch, (images, labels) in enumerate(loader(STEPS * accumulate), start=1):
        loss = F.cross_entropy(net(images), labels)
        if accumulate > 1:
            loss /= accumulate
        need_update = batch % accumulate == 0
        if loss_scaler is not None:
            loss_scaler(loss, optimizer, clip_grad=None, parameters=net.parameters(), need_update=need_update)
        else:
            loss.backward()
            if need_update:
                optimizer.step()
        if need_update:
            optimizer.zero_grad()
    assert 0.0 < float(agc.report) < 1.0
    assert_equal(net, by_hand(kind, accumulate=accumulate))


@pytest.mark.works("timm", "adaptive_clip_grad_")
def test_timms_clipping_differs_in_gains_and_in_the_bias_of_the_classifier() -> None:
    """With its own networks; λ is the same, and so are all other units."""
    timm = pytest.importorskip("timm")
    from timm.utils import dispatch_clip_grad

    torch.manual_seed(0)
    net = timm.create_model("nf_resnet26", num_classes=5)
    for p in net.parameters():
        noise = torch.rand(p.shape[0], *[1] * (p.ndim - 1)) ** 2 if p.ndim else 1.0
        p.grad = torch.randn_like(p) * noise * 0.02 * p.norm() / p.numel() ** 0.5
    before = {name: p.grad.clone() for name, p in net.named_parameters()}
    # As `--clip-mode agc` of train.py: all parameters but the last two, the classifier's weight and bias.
    dispatch_clip_grad([*net.parameters()][:-2], CLIPPING, mode="agc")
    theirs = {name: p.grad.clone() for name, p in net.named_parameters()}
    for name, p in net.named_parameters():
        p.grad = before[name].clone()
    normfree.adaptive_clip_grad_(normfree.parameter_groups(net, clipping=CLIPPING))
    changed, different = set(), set()
    for name, p in net.named_parameters():
        if not torch.equal(p.grad, before[name]):
            changed.add(name)
        if float((p.grad - theirs[name]).norm()) > 1e-5 * float(theirs[name].norm()):
            different.add(name)
    assert len(changed) > 20
    assert different
    assert all(name.endswith(".gain") or name == "head.fc.bias" for name in different), different
    gain = next(p for name, p in net.named_parameters() if name.endswith(".gain"))
    assert unitwise_norm(gain).numel() == 1  # one unit here, one for each element there


@pytest.mark.works("Hugging Face Accelerate", "attach_agc")
def test_removed_from_the_loop_it_clips_no_more() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net = network()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    normfree.attach_agc(optimizer, CLIPPING, model=net).remove()
    net, optimizer = accelerator.prepare(net, optimizer)
    other = network()
    reference = OPTIMIZERS["sgd"](other.parameters())
    for images, labels in loader(2):
        for model, step in ((net, optimizer), (other, reference)):
            accelerator.backward(F.cross_entropy(model(images), labels))
            step.step()
            step.zero_grad()
    assert_equal(net, dict(other.named_parameters()))


def test_the_page_on_agc_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks run in order, and its table has the numbers that they compute."""
    for library in ("timm", "accelerate", "lightning", "transformers"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "agc.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```py(?:thon)?\n(.*?)```", text, flags=re.S):
        exec(compile(block, "agc.md", "exec"), namespace)
    for clipping, shares in namespace["table"].items():
        cells = " | ".join(f"{percent:.1f} %" for percent, _ in shares)
        assert f"| {clipping} | {cells} |" in text
        assert all(f"({units:,} units)" in text or f"{units} units" in text for _, units in shares)
