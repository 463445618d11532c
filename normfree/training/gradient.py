"""The gradient of one step, in micro-batches; exact for networks without batch statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from normfree.data.seeds import key
from normfree.models.net import Net
from normfree.models.shared_weights import standardized_once
from normfree.training.body import frozen_modules
from normfree.training.choices import uses_sigmoid
from normfree.training.compiled import CompiledBlocks
from normfree.training.config import Config
from normfree.training.distributed.exact import TreeSum
from normfree.training.distributed.world import World
from normfree.training.loss import batch_loss
from normfree.training.profile import span


class BatchGradient:
    """Add the gradient of a batch's mean loss to the parameters of `net`, micro-batch by micro-batch.

    The sum over micro-batches and processes is exact without batch statistics. All random numbers of the network come
    from (seed, step, micro-batch), so no generator state has to be saved. Micro-batches are numbered over all
    processes: with equal sizes they are the same for any number of processes.

    Args:
        micro_batch: images per pass; 0 is the whole batch.
        exact: add up gradients in an order that does not depend on the number of processes.
        sharded: parameters are sharded by FSDP2, which sums over processes after each micro-batch, so that no process
            ever holds more than its rows.
    """

    def __init__(
        self,
        net: Net,
        config: Config,
        *,
        world: World,
        micro_batch: int,
        exact: bool = False,
        sharded: bool = False,
    ) -> None:
        self.net, self.world, self.micro_batch = net, world, micro_batch
        self.exact, self.sharded = exact, sharded
        self.seed, self.half = config.seed, config.precision == "bfloat16"
        self.frozen = frozen_modules(net)
        self.trained = [p for p in net.parameters() if p.requires_grad]
        self.sigmoid = uses_sigmoid(config.objective)
        self.loss = batch_loss(config.objective)
        self.compiled = CompiledBlocks(net) if config.compile else None

    def __call__(
        self, images: Tensor, targets: Tensor, step: int, *, micro_batch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add this process's share of the gradient.

        Args:
            images: B 3 S S, normalized, on the device.
            targets: B K class probabilities; with objective "bce", one for each class by itself.
            step: decides the random numbers.
            micro_batch: in place of `self.micro_batch`.

        Returns:
            This process's shares of the mean loss and of the number of correct answers, 0-dim.
        """
        size = (self.micro_batch if micro_batch is None else micro_batch) or len(images)
        batch, first = len(images) * self.world.size, self.world.rank * -(-len(images) // size)
        tree = TreeSum()
        loss = torch.zeros((), device=images.device)
        # float32, to travel with the gradients; exact to 2 ** 24
        correct = torch.zeros((), device=images.device)
        with self._passes():
            for number, (x, y) in enumerate(zip(images.split(size), targets.split(size), strict=True), first):
                torch.manual_seed(key(self.seed, "model", step, number))
                share, right = self._pass(x, y, batch=batch)
                if self.exact:
                    tree.add([*self._take_gradients(), share, right])
                else:
                    loss += share
                    correct += right
        if self.exact:
            *gradients, loss, correct = tree.total()
            for parameter, gradient in zip(self.trained, gradients, strict=True):
                parameter.grad = gradient
        return loss, correct

    @contextlib.contextmanager
    def _passes(self) -> Iterator[None]:
        """Standardize weights once for all passes of a step, and use the compiled blocks."""
        self.net.train()
        for module in self.frozen:
            module.eval()
        with contextlib.ExitStack() as stack:
            # "exact" adds up whole gradients of micro-batches; FSDP2 has whole weights only while a block computes
            if not self.exact and not self.sharded:
                stack.enter_context(standardized_once(self.net))
            if self.compiled is not None:
                stack.enter_context(self.compiled.active())
            yield

    def _pass(self, x: Tensor, y: Tensor, *, batch: int) -> tuple[Tensor, Tensor]:
        """Run one micro-batch forward and backward. Return its share of the mean loss of `batch` images, and its number
        of correct answers."""
        with span("forward"):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
                logits = self.net(x)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            share = self.loss(logits, y) / batch
        with span("backward"):
            share.backward()
        best = logits.detach().argmax(dim=1)
        right = (best == y.argmax(dim=1)).sum().to(torch.float32)
        if self.sigmoid:  # an image may have several classes: the most probable one is among them
            right = (y.gather(1, best[:, None]) == y.amax(dim=1, keepdim=True)).sum().to(torch.float32)
        return share.detach(), right

    def example_targets(self, count: int, num_classes: int) -> Tensor:
        """Return targets for `count` images, for a test of the memory."""
        return torch.full((count, num_classes), 1 / num_classes, device=self.world.device)

    def _take_gradients(self) -> list[Tensor]:
        """Return the gradients of all trained parameters and clear them."""
        found = []
        for parameter in self.trained:
            assert parameter.grad is not None
            found.append(parameter.grad)
            parameter.grad = None
        return found
