"""What one step does to a run's network: the order is the science.

Forward and backward in micro-batches -> (SAM) -> one sum over processes -> clipping of the raw gradient, which also
checks that it is finite -> decay -> momentum -> average; the schedule sets the rate before. Whoever wants another
order copies this page. `modes.py` says what the config's `parallel` changes in it, `update.py` who does what follows
the gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.data.loader import Batch
from normfree.data.seeds import key
from normfree.data.transforms.mixing import FreshPairs, mix, paired_targets
from normfree.data.transforms.normalize import normalize
from normfree.data.transforms.train import AfterMixing, train_transform
from normfree.device import run_device
from normfree.diagnose.gradients import ratio_quantiles
from normfree.models.net import Net
from normfree.models.shared_weights import standardized_once
from normfree.models.zoo import create_model
from normfree.optim.dtensor import is_sharded
from normfree.optim.ema import Ema
from normfree.optim.groups import parameter_groups, parse_unclipped
from normfree.optim.named_gradients import ClipReport, NonFiniteGradientError
from normfree.optim.named_state import copy_named_
from normfree.optim.sam import STRIDE, ascend_, descend_
from normfree.optim.schedule import schedule_multiplier
from normfree.optim.sgd import SGD
from normfree.training import checkpoint, micro_batch
from normfree.training.class_weights import weigh
from normfree.training.compiled import CompiledBlocks
from normfree.training.config import Config, steps_of
from normfree.training.distributed import fsdp
from normfree.training.distributed.exact import TreeSum
from normfree.training.distributed.modes import check_mode
from normfree.training.distributed.world import World
from normfree.training.profile import span
from normfree.training.update import Update

SAMPLE_RATIOS = 10  # lines of metrics.jsonl from one sample of gradients against weights to the next


class Diverged(ValueError):
    """A gradient was not finite. Weights and the last checkpoint are sound; the message names the parameters."""


class Trainer:
    """Network, optimizer and average of one run, and what one step does to them. `weights`: a folder to start from,
    `head`: with its classifier too. `class_weights` K: what a label counts in the loss; None: all alike.

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
        class_weights: Tensor | None = None,
        world: World | None = None,
    ) -> None:
        assert class_weights is None or config.optim.class_balance
        self.config, self.num_classes = config, num_classes
        self.world = world or World(device=run_device(config.device))
        self.world.part(config.input.batch_size)
        check_mode(config, world_size=self.world.size)
        self.exact = config.parallel == "exact"
        self.sharded = (
            config.parallel == "sharded" and self.world.size > 1
        )  # one process has nothing to share
        self.device = self.world.device
        self.class_weights = None if class_weights is None else class_weights.to(self.device)
        self.total_steps = max(
            1, steps_of(config.length, samples=samples, batch_size=config.input.batch_size)
        )
        self.warmup = min(
            1.0,
            steps_of(config.optim.warmup, samples=samples, batch_size=config.input.batch_size)
            / self.total_steps,
        )
        torch.manual_seed(key(config.seed, "init"))
        net = self._network(weights, head=head)
        auto = config.input.micro_batch == "auto"
        size = micro_batch.predicted(self, net) if auto else None  # before anything lies on the device
        if self.sharded:
            self.ema = Ema(net, decay=config.optim.ema_decay)  # while it can be copied
            for each in (net, self.ema.module):
                assert isinstance(each, Net)
                fsdp.shard_(each, self.world)
            self.net = net
        else:
            self.net = net.to(self.device).to(memory_format=torch.channels_last)
            self.ema = Ema(net, decay=config.optim.ema_decay)
        groups = parameter_groups(
            net, weight_decay=config.optim.weight_decay, clipping=config.optim.clipping,
            unclipped=parse_unclipped(config.optim.unclipped),
        )  # fmt: skip
        self.optimizer = SGD(groups, config.optim.lr, momentum=config.optim.momentum)
        self.ratios: dict[str, list[float]] = {}  # of the step just taken, if it was sampled
        self.pairs = _pairs(config)
        self.transform = train_transform(
            image_size=int(config.input.image_size), crop_min=config.augment.crop_min, flip=config.augment.flip,
            randaugment="off" if self.pairs else config.augment.randaugment,
        )  # fmt: skip
        self.compiled = CompiledBlocks(net) if config.compile else None
        self.update = Update(self.optimizer, model=net, ema=self.ema, config=config.optim)
        if size is not None:
            self.config = micro_batch.settled(self, size)

    def _network(self, weights: str = "", *, head: bool = True) -> Net:
        fields = {k: v for k, v in self.config.net.model_dump().items() if v != "auto"}
        net = create_model(
            self.config.model, num_classes=self.num_classes, weights=weights or None, head=head, **fields
        )
        assert isinstance(net, Net)
        return net

    def step(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, ClipReport]:
        """One optimizer step on a batch. Returns mean loss, correct answers (both on the device), and the clipping."""
        config = self.config
        progress = step / self.total_steps
        factor = schedule_multiplier(
            config.optim.schedule, progress, warmup=self.warmup, final=config.optim.final_lr
        )
        self.optimizer.set_lr(config.optim.lr * factor)
        with span("prepare"):
            images, targets = self.prepare(batch, step)
        sampled = (step + 1) % (SAMPLE_RATIOS * config.log.every) == 0 and not self.sharded
        self.ratios = {}
        try:
            before = self.climb_(images, targets, step) if config.optim.sam_rho else None
            with self.world.watched():
                loss, correct = self.gradients(images, targets, step)
            if before is not None:
                descend_(self.net.parameters(), before)
            with span("exchange"):
                self.exchange_([loss, correct])
            if sampled and self.world.first:
                self.ratios = ratio_quantiles(self.optimizer.param_groups, eps=config.optim.clipping_eps)
            return loss, correct, self.update.step_(step)
        except NonFiniteGradientError as error:
            raise Diverged(f"step {step}: {error} Images of the step begin with {batch.names[0]!r}. "
                           f"Try --optim.lr {config.optim.lr / 3:.2g}.") from None  # fmt: skip

    def exchange_(self, others: list[Tensor]) -> None:
        """Sums gradients, and `others`, over the processes. What FSDP2 has cut it has also summed already."""
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None and not is_sharded(p.grad)]
        add_up = self.world.tree_sum_ if self.exact else self.world.sum_
        add_up([*gradients, *others])

    def prepare(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Normalized, mixed images B 3 S S and soft targets B K, on the device.

        With mix_with "batch" the partners come from this process's part of the batch, so that pairs and shares
        depend on the number of processes; with "fresh", and without mixing, nothing does. "exact" takes partners
        from the micro-batch, and draws for its number.
        """
        rank = self.world.rank
        if not self.exact:  # the first process draws what a single one draws
            return self._mixed(batch, key(self.config.seed, "mix", step, *((rank,) if rank else ())))
        size = self._size(len(batch))
        first = rank * len(batch) // size
        parts = (_part(batch, slice(start, start + size)) for start in range(0, len(batch), size))
        made = [
            self._mixed(part, key(self.config.seed, "mix", step, "part", number))
            for number, part in enumerate(parts, first)
        ]
        images, targets = (torch.cat(rows) for rows in zip(*made, strict=True))
        return images, targets

    def _mixed(self, batch: Batch, draw: int) -> tuple[Tensor, Tensor]:
        augment = self.config.augment
        smoothing = augment.label_smoothing if self.class_weights is None else 0.0  # after weighing, if any
        images = normalize(batch.images.to(self.device, non_blocking=True))
        labels = batch.labels.to(self.device, non_blocking=True)
        if batch.partners is not None and batch.share is not None:  # mixed already, image by image
            partners, share = batch.partners.to(self.device), batch.share.to(self.device)
            targets = paired_targets(
                labels, partners, share, num_classes=self.num_classes, label_smoothing=smoothing
            )
            return images.contiguous(memory_format=torch.channels_last), self.weighed(targets)
        generator = torch.Generator().manual_seed(draw)
        images, targets = mix(
            images.contiguous(memory_format=torch.channels_last), labels, num_classes=self.num_classes,
            mixup=augment.mixup, cutmix=augment.cutmix, label_smoothing=smoothing, generator=generator,
        )  # fmt: skip
        return images, self.weighed(targets)

    def weighed(self, targets: Tensor) -> Tensor:
        """Targets with the weights of their labels, and smoothed then; without weights as they are."""
        if self.class_weights is None:
            return targets
        return weigh(targets, self.class_weights, label_smoothing=self.config.augment.label_smoothing)

    def climb_(self, images: Tensor, targets: Tensor, step: int) -> list[Tensor]:
        """SAM: moves the weights uphill for this process's part of the batch. Returns where they were."""
        self.gradients(images[::STRIDE], targets[::STRIDE], step)
        return ascend_(self.net.parameters(), rho=self.config.optim.sam_rho)

    def gradients(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Adds this process's share of the gradient of the batch's mean loss, micro-batch by micro-batch; the sum
        over micro-batches and processes is exact without batch statistics. Returns its shares of loss and answers.

        All randomness of the network comes from (seed, step, micro-batch), so nothing hidden has to be saved.
        Micro-batches are numbered over all processes: of equal size, they are the same for any number of those. FSDP2
        sums over processes after every one of them, so that no process ever holds more than its rows.
        """
        size, tree = self._size(len(images)), TreeSum()
        whole, first = len(images) * self.world.size, self.world.rank * -(-len(images) // size)
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros(
            (), device=self.device
        )  # float32, to travel with the gradients; exact to 2 ** 24
        with self.passes():
            for part, (x, y) in enumerate(zip(images.split(size), targets.split(size), strict=True), first):
                torch.manual_seed(key(self.config.seed, "model", step, part))
                share, right = self.pass_(x, y, whole=whole)
                if self.exact:
                    tree.add([*self._take_gradients(), share, right])
                else:
                    loss += share
                    correct += right
        if self.exact:
            *gradients, loss, correct = tree.total()
            for parameter, gradient in zip(self.net.parameters(), gradients, strict=True):
                parameter.grad = gradient
        return loss, correct

    @contextlib.contextmanager
    def passes(self) -> Iterator[None]:
        """Around the passes of a step: weights are standardized once, compiled blocks are compiled."""
        self.net.train()
        with contextlib.ExitStack() as stack:
            # "exact" adds up whole gradients of micro-batches; FSDP2 has whole weights only while a block computes
            if not self.exact and not self.sharded:
                stack.enter_context(standardized_once(self.net))
            if self.compiled is not None:
                stack.enter_context(self.compiled.active())
            yield

    def pass_(self, x: Tensor, y: Tensor, *, whole: int) -> tuple[Tensor, Tensor]:
        """Forward and backward pass of a micro-batch within `passes`. Returns its share of the mean loss of `whole`
        images, and its correct answers."""
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
        with span("forward"):
            with half:
                logits = self.net(x)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            share = F.cross_entropy(logits, y, reduction="sum") / whole
        with span("backward"):
            share.backward()
        right = (logits.detach().argmax(dim=1) == y.argmax(dim=1)).sum().to(torch.float32)
        return share.detach(), right

    def _size(self, images: int) -> int:
        size = self.config.input.micro_batch
        assert size != "auto"
        return size or images

    def _take_gradients(self) -> list[Tensor]:
        found = []
        for parameter in self.net.parameters():
            assert parameter.grad is not None
            found.append(parameter.grad)
            parameter.grad = None
        return found

    def align_(self) -> None:
        """Makes the processes' networks one again. Only batch-norm twins have what differs: running statistics, each
        process's own while training, which do not act on the training; scores and checkpoints take their mean."""
        for net in (self.net, self.ema.module):
            self.world.mean_([b for b in net.buffers() if b.is_floating_point()])

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds. Sharded, every process makes the call, and the first gets whole copies."""
        if not self.sharded:
            return self._live()
        with self.world.watched():
            return {file: fsdp.gather_first(part, self.world) for file, part in self._live().items()}

    def restore_(self, saved: checkpoint.Checkpoint | None) -> None:
        """Continues from what `tensors` gave to the first process; the others pass None, and so does the first one to
        let all begin with its own tensors. Every process makes the call.

        Raises:
            ValueError: names or shapes differ; nothing was changed.
        """
        live = self._live()
        with self.world.together():
            if saved is not None:
                for file, part in live.items():
                    fsdp.check_fits(part, saved.tensors[file], owner=f"this run's {file}")
        if self.sharded:
            if self.world.any(saved is not None):  # else every row was made once, by the one that has it
                with self.world.watched():
                    for file, part in live.items():
                        fsdp.scatter_first_(part, saved.tensors[file] if saved else {}, self.world)
            return
        for file, part in live.items():
            if saved is not None:
                copy_named_(part, saved.tensors[file], owner="")
            self.world.copy_first_(list(part.values()))

    def whole(self, net: nn.Module) -> nn.Module:
        """`net`, which is the network or its average, with all its weights, to score or to save it. Sharded, a copy
        without gradients; every process makes the call and gets one."""
        if not self.sharded:
            return net
        with torch.device("meta"):
            plain = self._network()
        plain = plain.to_empty(device=self.device).to(memory_format=torch.channels_last).requires_grad_(False)
        with self.world.watched():
            fsdp.fill_(plain, net)
        return plain.eval()

    def _live(self) -> dict[str, dict[str, Tensor]]:
        return {
            "model": dict(self.net.state_dict()),
            "ema": dict(self.ema.module.state_dict()),
            "optim": self.optimizer.named_state(),
        }


def _part(batch: Batch, rows: slice) -> Batch:
    return replace(
        batch, images=batch.images[rows], labels=batch.labels[rows], indices=batch.indices[rows],
        names=batch.names[rows], partners=None if batch.partners is None else batch.partners[rows],
        share=None if batch.share is None else batch.share[rows],
    )  # fmt: skip


def _pairs(config: Config) -> FreshPairs | None:
    augment = config.augment
    if augment.mix_with == "batch" or augment.mixup == augment.cutmix == 0:
        return None
    after = None if augment.randaugment == "off" else AfterMixing(augment.randaugment)
    return FreshPairs(augment.mixup, augment.cutmix, after)
