"""What one step does to a run's network: the order is the science.

Forward and backward in micro-batches -> (SAM) -> one sum over processes -> clipping of the raw gradient, which also
checks that it is finite -> decay -> momentum -> average; the schedule sets the rate before. Whoever wants another
order copies this page.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.data.augment import AfterMixing, normalize, train_transform
from normfree.data.loader import Batch
from normfree.data.mixing import FreshPairs, mix, paired_targets
from normfree.data.seeds import key
from normfree.inference import run_device
from normfree.models.net import Net
from normfree.models.zoo import create_model
from normfree.optim.agc import ClipReport, NonFiniteGradientError, clip_grad_
from normfree.optim.ema import Ema
from normfree.optim.groups import parameter_groups
from normfree.optim.sam import STRIDE, ascend_, descend_
from normfree.optim.schedule import schedule_multiplier
from normfree.optim.sgd import SGD
from normfree.train import checkpoint
from normfree.train.config import Config, steps_of
from normfree.train.parallel import World


class Diverged(ValueError):
    """A gradient was not finite. Weights and the last checkpoint are sound; the message names the parameters."""


class Trainer:
    """Network, optimizer and average of one run, and what one step does to them. `weights`: a folder to start from,
    `head`: with its classifier too.

    `world`: the processes that share the run, each with a trainer of its own; None: this one alone.
    """

    def __init__(
        self,
        config: Config,
        *,
        num_classes: int,
        samples: int,
        weights: str = "",
        head: bool = True,
        world: World | None = None,
    ) -> None:
        self.config, self.num_classes = config, num_classes
        self.world = world or World(device=run_device(config.device))
        self.world.part(config.input.batch_size)
        self.device = self.world.device
        self.total_steps = max(
            1, steps_of(config.length, samples=samples, batch_size=config.input.batch_size)
        )
        self.warmup = min(
            1.0,
            steps_of(config.optim.warmup, samples=samples, batch_size=config.input.batch_size)
            / self.total_steps,
        )
        torch.manual_seed(key(config.seed, "init"))
        fields = {k: v for k, v in config.net.model_dump().items() if v != "auto"}
        net = create_model(
            config.model, num_classes=num_classes, weights=weights or None, head=head, **fields
        )
        assert isinstance(net, Net)
        self.net = net.to(self.device).to(memory_format=torch.channels_last)
        groups = parameter_groups(net, weight_decay=config.optim.weight_decay, clipping=config.optim.clipping)
        self.optimizer = SGD(groups, config.optim.lr, momentum=config.optim.momentum)
        self.ema = Ema(net, decay=config.optim.ema_decay)
        self.pairs = _pairs(config)
        self.transform = train_transform(
            image_size=int(config.input.image_size), crop_min=config.augment.crop_min, flip=config.augment.flip,
            randaugment="off" if self.pairs else config.augment.randaugment,
        )  # fmt: skip
        self.forward: nn.Module = torch.compile(net) if config.compile else net  # type: ignore[assignment]

    def step(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, ClipReport]:
        """One optimizer step on a batch. Returns mean loss, correct answers (both on the device), and the clipping."""
        config = self.config
        progress = step / self.total_steps
        factor = schedule_multiplier(
            config.optim.schedule, progress, warmup=self.warmup, final=config.optim.final_lr
        )
        self.optimizer.set_lr(config.optim.lr * factor)
        images, targets = self.prepare(batch, step)
        before = self.climb_(images, targets, step) if config.optim.sam_rho else None
        loss, correct = self.gradients(images, targets, step)
        if before is not None:
            descend_(self.net.parameters(), before)
        self.world.sum_([*(p.grad for p in self.net.parameters() if p.grad is not None), loss, correct])
        try:
            report = clip_grad_(
                self.optimizer.param_groups, mode=config.optim.clip, clipping=config.optim.clipping,
                eps=config.optim.clipping_eps,
            )  # fmt: skip
        except NonFiniteGradientError as error:
            raise Diverged(f"step {step}: {error} Images of the step begin with {batch.names[0]!r}. "
                           f"Try --optim.lr {config.optim.lr / 3:.2g}.") from None  # fmt: skip
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update_(self.net, step=step)
        return loss, correct, report

    def prepare(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Normalized, mixed images B 3 S S and soft targets B K, on the device.

        With mix_with "batch" the partners come from this process's part of the batch, so that pairs and shares
        depend on the number of processes; with "fresh", and without mixing, nothing does.
        """
        augment = self.config.augment
        images = normalize(batch.images.to(self.device, non_blocking=True))
        labels = batch.labels.to(self.device, non_blocking=True)
        if batch.partners is not None and batch.share is not None:  # mixed already, image by image
            partners, share = batch.partners.to(self.device), batch.share.to(self.device)
            return images.contiguous(memory_format=torch.channels_last), paired_targets(
                labels, partners, share, num_classes=self.num_classes, label_smoothing=augment.label_smoothing
            )
        rank = (
            (self.world.rank,) if self.world.rank else ()
        )  # the first process draws what a single one draws
        generator = torch.Generator().manual_seed(key(self.config.seed, "mix", step, *rank))
        return mix(
            images.contiguous(memory_format=torch.channels_last), labels, num_classes=self.num_classes,
            mixup=augment.mixup, cutmix=augment.cutmix, label_smoothing=augment.label_smoothing, generator=generator,
        )  # fmt: skip

    def climb_(self, images: Tensor, targets: Tensor, step: int) -> list[Tensor]:
        """SAM: moves the weights uphill for this process's part of the batch. Returns where they were."""
        self.gradients(images[::STRIDE], targets[::STRIDE], step)
        return ascend_(self.net.parameters(), rho=self.config.optim.sam_rho)

    def gradients(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Adds this process's share of the gradient of the batch's mean loss, micro-batch by micro-batch; the sum
        over micro-batches and processes is exact without batch statistics. Returns its shares of loss and answers.

        All randomness of the network comes from (seed, step, micro-batch), so nothing hidden has to be saved.
        Micro-batches are numbered over all processes: of equal size, they are the same for any number of those.
        """
        self.net.train()
        size = self.config.input.micro_batch or len(images)
        whole, first = len(images) * self.world.size, self.world.rank * -(-len(images) // size)
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros(
            (), device=self.device
        )  # float32, to travel with the gradients; exact to 2 ** 24
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
        for part, (x, y) in enumerate(zip(images.split(size), targets.split(size), strict=True), first):
            torch.manual_seed(key(self.config.seed, "model", step, part))
            with half:
                logits = self.forward(x)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            share = F.cross_entropy(logits, y, reduction="sum") / whole
            share.backward()
            loss += share.detach()
            correct += (logits.detach().argmax(dim=1) == y.argmax(dim=1)).sum()
        return loss, correct

    def align_(self) -> None:
        """Makes the processes' networks one again. Only batch-norm twins have what differs: running statistics, each
        process's own while training, which do not act on the training; scores and checkpoints take their mean."""
        for net in (self.net, self.ema.module):
            self.world.mean_([b for b in net.buffers() if b.is_floating_point()])

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds."""
        return {
            "model": dict(self.net.state_dict()),
            "ema": self.ema.state_dict(),
            "optim": self.optimizer.named_state(),
        }

    def restore_(self, saved: checkpoint.Checkpoint) -> None:
        """Continues from `tensors`."""
        self.net.load_state_dict(saved.tensors["model"])
        self.ema.load_state_dict_(saved.tensors["ema"])
        self.optimizer.load_named_state_(saved.tensors["optim"])


def _pairs(config: Config) -> FreshPairs | None:
    augment = config.augment
    if augment.mix_with == "batch" or augment.mixup == augment.cutmix == 0:
        return None
    after = None if augment.randaugment == "off" else AfterMixing(augment.randaugment)
    return FreshPairs(augment.mixup, augment.cutmix, after)
