"""The tensors of a run that a checkpoint holds: network, average and momentum, whole or sharded over processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from normfree.models.net import Net
from normfree.optim.ema import Ema
from normfree.optim.named_state import copy_named_
from normfree.optim.sgd import SGD
from normfree.optim.torch_optimizers import TorchOptimizer
from normfree.training import checkpoint
from normfree.training.distributed import fsdp
from normfree.training.distributed.world import World


class TrainingState:
    """Save and restore network, average and momentum. Every process makes each call.

    Args:
        make_network: returns another network of the same architecture.
        sharded: parameters are sharded by FSDP2.
    """

    def __init__(
        self,
        net: Net,
        ema: Ema,
        optimizer: SGD | TorchOptimizer,
        *,
        world: World,
        make_network: Callable[[], Net],
        sharded: bool = False,
    ) -> None:
        self.net, self.ema, self.optimizer = net, ema, optimizer
        self.world, self.make_network, self.sharded = world, make_network, sharded

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that a checkpoint holds. If sharded, rank 0 gets whole copies."""
        if not self.sharded:
            return self._live()
        with self.world.guard():
            return {file: fsdp.gather_first(part, self.world) for file, part in self._live().items()}

    def restore_(self, saved: checkpoint.Checkpoint | None) -> None:
        """Continue from a checkpoint, which rank 0 passes; the others pass None.

        If rank 0 passes None too, all processes start from the tensors of rank 0.

        Raises:
            ValueError: names or shapes differ; nothing was changed.
        """
        live = self._live()
        with self.world.all_or_none():
            if saved is not None:
                for file, part in live.items():
                    fsdp.check_fits(part, saved.tensors[file], owner=f"this run's {file}")
        if self.sharded:
            # Without a checkpoint, each shard was initialized by the only process that has it.
            if self.world.any(saved is not None):
                with self.world.guard():
                    for file, part in live.items():
                        fsdp.scatter_first_(part, saved.tensors[file] if saved else {}, self.world)
            return
        for file, part in live.items():
            if saved is not None:
                copy_named_(part, saved.tensors[file], owner="")
            self.world.copy_first_(list(part.values()))

    def whole(self, net: nn.Module) -> nn.Module:
        """Return the network or its average with all its weights, to score or save it; if sharded, a copy."""
        if not self.sharded:
            return net
        with torch.device("meta"):
            plain = self.make_network()
        plain = plain.to_empty(device=self.world.device)
        plain = plain.to(memory_format=torch.channels_last).requires_grad_(False)
        with self.world.guard():
            fsdp.fill_(plain, net)
        return plain.eval()

    def align_(self) -> None:
        """Average the running statistics of batch norm over processes, before the network is scored or saved.

        Only batch-norm twins have any; each process has its own while training, and they do not affect training.
        """
        for net in (self.net, self.ema.module):
            self.world.mean_([b for b in net.buffers() if b.is_floating_point()])

    def _live(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors by file and name, not copied."""
        return {
            "model": dict(self.net.state_dict()),
            "ema": dict(self.ema.module.state_dict()),
            "optim": self.optimizer.named_state(),
        }
