"""What one step does to a run's network. The order is the method:

    set the learning rate by the schedule
    gradients in micro-batches            gradient.py
      (with SAM: at weights moved uphill)
    sum over processes                    distributed/
    AGC on the raw gradient, which also checks that it is finite
    weight decay -> momentum -> weights -> average          update.py

To change the order, copy this file. `distributed/modes.py` says what the config's `parallel` changes in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from normfree.data.loader import Batch
from normfree.data.seeds import key
from normfree.data.transforms.normalize import height_and_width
from normfree.device import run_device
from normfree.diagnose.gradients import ratio_quantiles
from normfree.models.net import Net
from normfree.models.zoo import create_model
from normfree.optim.dtensor import is_sharded
from normfree.optim.ema import Ema
from normfree.optim.groups import parameter_groups, parse_unclipped
from normfree.optim.named_gradients import ClipReport, NonFiniteGradientError
from normfree.optim.sam import SAM, STRIDE
from normfree.optim.schedule import schedule_multiplier
from normfree.optim.sgd import SGD
from normfree.optim.torch_optimizers import TorchOptimizer, make_optimizer
from normfree.training import micro_batch
from normfree.training.batch import BatchPreparer, fresh_pairs, image_transform
from normfree.training.body import freeze_, lr_multipliers
from normfree.training.cached_gradient import refuse_batch_statistics
from normfree.training.choices import (
    CLIPS,
    OBJECTIVES,
    OPTIMIZERS,
    SCHEDULES,
    learns_embeddings,
    parse_choice,
)
from normfree.training.config import Config, OptimConfig, channels_of, size_of, steps_of
from normfree.training.distributed import fsdp
from normfree.training.distributed.modes import check_mode
from normfree.training.distributed.world import World
from normfree.training.divergence import not_finite_step, suspects
from normfree.training.embedding_gradient import EmbeddingGradient
from normfree.training.gradient import BatchGradient
from normfree.training.memory import require_images_fit
from normfree.training.memory_checks import (
    full_memory,
    is_out_of_memory,
    require_pass_fits,
    require_state_fits,
)
from normfree.training.precision import without_auto
from normfree.training.privacy import PrivacyPlan, plan_of
from normfree.training.private_gradient import PrivateGradient
from normfree.training.profile import span
from normfree.training.projection import project_
from normfree.training.resolve import Resolved
from normfree.training.secret import SecretKey
from normfree.training.state import TrainingState
from normfree.training.update import Update

SAMPLE_RATIOS = 10  # lines of metrics.jsonl between two samples of the ratios of gradients to weights


class Trainer:
    """Network, optimizer and average of one run, and what one step does to them.

    Args:
        resolved: the config, resolved.
        num_classes: width of the classifier, K.
        samples: training images per epoch.
        weights: model folder, file or address to start from; empty for random weights.
        head: take the classifier from `weights` too.
        class_weights: K, the factor of each label in the loss; None weighs all alike.
        world: the processes that share the run, each with a trainer; None is this process alone.

    Raises:
        ValueError: the config cannot be run on this device or in this number of processes.
    """

    def __init__(
        self,
        resolved: Resolved,
        *,
        num_classes: int,
        samples: int,
        weights: str = "",
        head: bool = True,
        class_weights: Tensor | None = None,
        world: World | None = None,
    ) -> None:
        self.world = world or World(device=run_device(resolved.config.device))
        self.device = self.world.device
        config = without_auto(resolved.config, self.device)
        resolved = replace(resolved, config=config)
        assert class_weights is None or config.optim.class_balance
        self.embeds = learns_embeddings(config.objective)
        if self.embeds:  # the width of the projection; 0 compares the pooled features themselves
            num_classes = parse_choice(config.objective, OBJECTIVES).options.get("dim", 0)
        self.resolved, self.num_classes = resolved, num_classes
        self._check_memory()
        check_mode(resolved, world_size=self.world.size)
        exact = config.parallel == "exact"
        sharded = config.parallel == "sharded" and self.world.size > 1  # one process has nothing to shard
        self.samples = samples
        self.total_steps = self.steps_of(config.length)
        self.privacy = plan_of(config, samples=samples, steps=self.total_steps, world=self.world)
        warmup_steps = steps_of(config.optim.warmup, samples=samples, batch_size=config.input.batch_size)
        self.warmup = min(1.0, warmup_steps / self.total_steps)
        assert config.optim.lr != "auto"
        self.lr = self.current_lr = config.optim.lr  # the peak, and that of the last step
        self.lr_factor = 1.0  # below 1 after the run has gone back, see `divergence.py`
        self.schedule = parse_choice(config.optim.schedule, SCHEDULES)
        self.eps = parse_choice(config.optim.clip, CLIPS).options.get("eps", 1e-3)
        torch.manual_seed(key(config.seed, "init"))
        net = self._network(weights, head=head)
        freeze_(net, config.optim.body)
        auto = config.input.micro_batch == "auto"
        require_pass_fits(net, resolved.variant, config, world=self.world)
        # Free memory is measured before anything is on the device.
        estimate = micro_batch.estimate(net, config, world=self.world, sharded=sharded) if auto else None
        if sharded:
            self.ema = Ema(net, decay=config.optim.ema_decay)  # before sharding, which forbids copies
            for each in (net, self.ema.module):
                assert isinstance(each, Net)
                fsdp.shard_(each, self.world)
            self.net = net
        else:
            self.net = net.to(self.device).to(memory_format=torch.channels_last)
            self.ema = Ema(net, decay=config.optim.ema_decay)
        self.optimizer = _optimizer(net, config.optim)
        self.sam = SAM(net.parameters(), rho=config.optim.sam_rho) if config.optim.sam_rho else None
        self.ratios: dict[str, list[float]] = {}  # of the last step, if it was sampled
        self.pairs = fresh_pairs(config)
        self.transform = image_transform(config)
        self.gradients = self._gradient(net, config, exact=exact, sharded=sharded)
        self.update = Update(self.optimizer, model=net, ema=self.ema, config=config.optim)
        size = config.input.micro_batch
        if estimate is not None:
            size = micro_batch.choose(
                estimate, self.gradients, self.optimizer, config, num_classes=num_classes
            )
        assert size != "auto"
        self.config = micro_batch.with_size(config, size)
        self.gradients.micro_batch = size
        if self.embeds and (self.world.size > 1 or 0 < size < config.input.batch_size):
            refuse_batch_statistics(net)
        self.prepare = BatchPreparer(
            self.config, num_classes=num_classes, world=self.world, micro_batch=size, exact=exact,
            class_weights=class_weights,
        )  # fmt: skip
        self.state = TrainingState(
            net, self.ema, self.optimizer, world=self.world, make_network=self._network, sharded=sharded
        )

    def _check_memory(self) -> None:
        """Raise ValueError if the images of a step, or the network, do not fit in memory."""
        config, size = self.resolved.config, self.resolved.config.input.image_size
        shape = (channels_of(size), *height_and_width(size_of(size)))
        require_images_fit(self.world.part(config.input.batch_size), shape, self.device)
        require_state_fits(self.resolved.variant, config, num_classes=self.num_classes, world=self.world)

    def _network(self, weights: str = "", *, head: bool = True) -> Net:
        config = self.resolved.config
        fields = {k: v for k, v in config.net.model_dump().items() if v != "auto"}
        num_classes = 0 if self.embeds else self.num_classes
        net = create_model(
            config.model, num_classes=num_classes, in_channels=channels_of(config.input.image_size),
            weights=weights or None, head=head, **fields,
        )  # fmt: skip
        assert isinstance(net, Net)
        if self.embeds:
            project_(net, self.num_classes)
        return net

    def steps_of(self, length: str) -> int:
        """Return a length of training in steps, at least 1."""
        return max(
            1, steps_of(length, samples=self.samples, batch_size=self.resolved.config.input.batch_size)
        )

    def _gradient(self, net: Net, config: Config, **options: bool) -> BatchGradient:
        if self.privacy is not None:
            return PrivateGradient(net, config, plan=self.privacy, world=self.world, micro_batch=0, **options)
        kind = EmbeddingGradient if self.embeds else BatchGradient
        return kind(net, config, world=self.world, micro_batch=0, **options)

    def keep_private(self, key: SecretKey | None, plan: PrivacyPlan) -> None:
        """Take noise and sampling from this key, and the noise that this plan has found; before the first step."""
        assert isinstance(self.gradients, PrivateGradient)
        self.privacy = self.gradients.plan = plan
        self.gradients.key = key

    @property
    def secret(self) -> SecretKey | None:
        """The key of a private run, None for other runs."""
        return self.gradients.key if isinstance(self.gradients, PrivateGradient) else None

    def members(self, count: int) -> Callable[[int], np.ndarray] | None:
        """Return the function of a step that draws its Poisson sample of `count` images, None if the run is not private
        or has no steps left."""
        if not isinstance(self.gradients, PrivateGradient) or self.gradients.key is None:
            return None
        key, rate = self.gradients.key, self.gradients.plan.sample_rate
        return lambda step: key.members(count, rate, step=step)

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        progress = step / self.total_steps
        return (
            self.lr
            * self.lr_factor
            * schedule_multiplier(self.schedule.name, progress, warmup=self.warmup, **self.schedule.options)
        )

    def step(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, ClipReport]:
        """Take one optimizer step on a batch.

        Returns:
            Mean loss and number of correct answers, both 0-dim on the device, and the report of the clipping.

        Raises:
            DivergedError: a gradient was not finite; nothing was changed.
            ValueError: memory is full.
        """
        config = self.config
        self.current_lr = self.rate_at(step)
        self.optimizer.set_lr(self.current_lr)
        with span("prepare"):
            images, targets = self.prepare(batch, step)
        self.ratios = {}
        try:
            with self._perturbed(images, targets, step), self.world.guard():
                loss, correct = self.gradients(images, targets, step)
            with span("exchange"):
                self._sum_over_processes([loss, correct])
            sampled = (step + 1) % (SAMPLE_RATIOS * config.log.every) == 0 and not self.gradients.sharded
            if sampled and self.world.is_main:
                self.ratios = ratio_quantiles(self.optimizer.param_groups, eps=self.eps)
            return loss, correct, self.update.step(step)
        except NonFiniteGradientError as error:
            named = suspects(
                self.net, images, batch.names, world=self.world, micro_batch=self.gradients.micro_batch,
                half=config.precision == "bfloat16",
            )  # fmt: skip
            raise not_finite_step(
                step, error.names, error.total, images=named, lr=self.lr,
                may_return=config.on_divergence != "stop",
            ) from None  # fmt: skip
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            size = self.gradients.micro_batch or self.world.part(config.input.batch_size)
            raise ValueError(full_memory(config, device=self.device, size=size)) from error

    def _perturbed(
        self, images: Tensor, targets: Tensor, step: int
    ) -> contextlib.AbstractContextManager[None]:
        """Return the context of the gradient: with SAM, weights moved uphill for a fifth of this process's images."""
        if self.sam is None:
            return contextlib.nullcontext()
        self.gradients(images[::STRIDE], targets[::STRIDE], step)
        return self.sam.perturbed()

    def _sum_over_processes(self, others: list[Tensor]) -> None:
        """Sum the gradients, and `others`, over processes. FSDP2 has already summed the gradients that it shards."""
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None and not is_sharded(p.grad)]
        add_up = self.world.tree_sum_ if self.gradients.exact else self.world.sum_
        add_up([*gradients, *others])


def _optimizer(net: Net, config: OptimConfig) -> SGD | TorchOptimizer:
    """Return the optimizer of a resolved config on the trained parameters of `net`."""
    assert config.lr != "auto"
    assert config.weight_decay != "auto"
    clip, chosen = parse_choice(config.clip, CLIPS), parse_choice(config.optimizer, OPTIMIZERS)
    unclipped = parse_unclipped(clip["unclipped"]) if clip.name == "agc" else None
    if unclipped and not net.num_classes:  # metric learning compares the features themselves
        unclipped = tuple(pattern for pattern in unclipped if pattern != "head.weight")
    groups = parameter_groups(
        net,
        weight_decay=config.weight_decay,
        clipping=config.clipping,
        unclipped=unclipped,
        lr_multipliers=lr_multipliers(net, config.body),
    )
    return make_optimizer(groups, config.lr, name=chosen.name, **chosen.options)
