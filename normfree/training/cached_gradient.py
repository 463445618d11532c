"""The exact gradient of a loss on all embeddings of a batch, with the activations of one micro-batch in memory.

A contrastive loss compares each image with all others, so it is not a sum over images, and adding up the losses of
micro-batches would compute another one. The chain rule is still a sum over images: dL/dw = Σ dL/dz_i · dz_i/dw. So a
first pass without gradients collects all embeddings z, micro-batch by micro-batch and over processes; then dL/dz is
computed once; then a second pass computes each z_i again, with its graph, and propagates dL/dz_i into the weights. The
price is one more forward pass. The gradient is exact if an embedding depends on its own image alone; with batch
statistics it depends on the micro-batch, and the result is the gradient of another function.

Source: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup" (arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from normfree.optim.per_example import using_batch_statistics
from normfree.suggest import problem, some_names

# Largest relative difference of the embeddings of both passes. Rounding may differ where autograd is on; it is 4e-3 in
# bfloat16. Other masks of dropout change embeddings by a large part of their size.
REPEATABLE = 0.05
# What caching does to a batch-norm twin, as tests/training/test_cached_gradient.py measures it.
BATCH_NORM_ERROR = "off by 31 to 90 % in tests with 2 to 8 micro-batches of a ResNet"


def cached_backward(
    model: nn.Module,
    images: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    micro_batch: int,
    rank: int = 0,
    gather: Callable[[Tensor], Tensor] = lambda embeddings: embeddings,
) -> Tensor:
    """Add the gradient of `loss(model(images))` to the parameters, `micro_batch` images at a time.

    The gradient equals that of a single pass over all images, up to rounding, while activations of only one micro-batch
    are in memory. Parameters of the loss, such as a learned temperature, get their gradient too. Dropout and stochastic
    depth draw the same masks in both passes, from PyTorch's default generators. With several processes, each calls this
    with its own images; add the gradients up over the processes afterwards.

    Args:
        model: maps images B ... to embeddings B D, each from its own image alone.
        images: B ...
        loss: maps the embeddings of all images, of all processes, to a loss, 0-dim.
        micro_batch: images per pass.
        rank: index of this process, if several share the batch in equal parts.
        gather: concatenates the embeddings of all processes in the order of their ranks, without gradients.

    Returns:
        The loss, 0-dim, without a graph.

    Raises:
        ValueError: `micro_batch` is below 1, there are no images, the loss is not 0-dim or has no gradient, or the
            model has batch norm that uses the statistics of the batch, or gives other embeddings in the second pass.
            Operations inside of a `forward` that mix images are not found: `normfree.batch_dependence` measures
            whether they do.

    Examples:
        >>> import torch
        >>> net = normfree.create_model("nf_resnet_nano", num_classes=0)
        >>> views = torch.randn(8, 3, 16, 16)  # two views of four images
        >>> loss = normfree.cached_backward(
        ...     net, views, lambda z: normfree.nt_xent(z[:4], z[4:], temperature=0.2), micro_batch=2
        ... )
        >>> net.stem.conv0.weight.grad is not None, loss.requires_grad
        (True, False)

    Source: Gao et al. 2021 (arXiv 2101.06983).
    """
    if not isinstance(micro_batch, int) or micro_batch < 1:
        raise ValueError(
            problem(f"micro_batch is {micro_batch!r}", allowed="an integer from 1", fix="pass 32")
        )
    if len(images) == 0:
        raise ValueError(problem("there are no images", allowed="1 or more", fix="skip the step"))
    parts, states = images.split(micro_batch), list[list[Tensor]]()
    if len(parts) > 1:
        refuse_batch_statistics(model)

    def gathered(own: Tensor) -> Tensor:
        every = gather(own)
        if len(every) > len(own):  # several processes
            refuse_batch_statistics(model)
        return every

    def encode(number: int) -> Tensor:
        if number < len(states):
            _restore(states[number], images.device)
        else:
            states.append(_random_state(images.device))
        embeddings: Tensor = model(parts[number])
        return embeddings

    return two_passes(encode, len(parts), loss, rank=rank, gather=gathered)[0]


def two_passes(
    encode: Callable[[int], Tensor],
    count: int,
    loss: Callable[[Tensor], Tensor],
    *,
    rank: int = 0,
    gather: Callable[[Tensor], Tensor] = lambda embeddings: embeddings,
    after: Callable[[], None] = lambda: None,
    keep_graph: bool = True,
) -> tuple[Tensor, Tensor]:
    """Add this process's share of the gradient of `loss` of all embeddings to the parameters of both functions.

    A single micro-batch keeps its graph, unless `keep_graph` is False, instead of being encoded twice.

    Args:
        encode: returns the embeddings of a micro-batch by its number, the same ones in every call.
        count: number of micro-batches of this process.
        loss, rank, gather: see `cached_backward`.
        after: called after the gradient of each micro-batch was added.

    Returns:
        The loss and the embeddings of all processes, without a graph.

    Raises:
        ValueError: the second pass gave other embeddings, or the loss is not 0-dim or has no gradient.
    """
    keep_graph = keep_graph and count == 1
    with torch.set_grad_enabled(keep_graph):
        first = [encode(number) for number in range(count)]
    own = torch.cat(first).detach()
    every = gather(own).requires_grad_()
    with torch.enable_grad():
        value = loss(every)
    if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        given = f"the loss returned a {'constant' if kind == 'shape ()' else kind}"
        raise ValueError(problem(given, allowed="a 0-dim tensor that depends on the embeddings"))
    # Parameters of the loss get their gradient too. Each process computes the whole loss, so it adds its share of that.
    processes = len(every) // len(own)
    (value / processes).backward()
    assert every.grad is not None
    gradient = processes * every.grad[rank * len(own) : (rank + 1) * len(own)]
    furthest = own.new_zeros(())
    for number, part in enumerate(gradient.split([len(z) for z in first])):
        again = first[number] if keep_graph else encode(number)
        again.backward(part)
        furthest = torch.maximum(furthest, (again.detach() - first[number].detach()).abs().max())
        after()
    if furthest > REPEATABLE * own.abs().max():
        given = f"the second pass over a micro-batch gave embeddings that differ by {float(furthest):.2g}"
        fix = "draw random numbers in the model from PyTorch's default generators alone; drop the gradients"
        raise ValueError(problem(given, allowed="the same embeddings in both passes", fix=fix))
    return value.detach(), every.detach()


def refuse_batch_statistics(model: nn.Module) -> None:
    """Check that no embedding depends on other images of its micro-batch.

    Raises:
        ValueError: the model has batch norm that uses the statistics of the batch.
    """
    if names := using_batch_statistics(model):
        given = (
            f"{some_names(names, limit=2)} normalize with the statistics of a micro-batch, so that the gradient would "
            f"not be that of the batch ({BATCH_NORM_ERROR})"
        )
        fix = "use a normalizer-free model, or one micro-batch in one process"
        raise ValueError(
            problem(given, allowed="no batch norm in training mode, nor without running statistics", fix=fix)
        )


def _random_state(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a model on `device` draws from."""
    states = [torch.get_rng_state()]
    if device.type in ("cuda", "mps"):
        module = torch.get_device_module(device)
        states.append(module.get_rng_state(device) if device.type == "cuda" else module.get_rng_state())
    return states


def _restore(states: list[Tensor], device: torch.device) -> None:
    """Set the generators to the states of `_random_state`."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        module = torch.get_device_module(device)
        if device.type == "cuda":
            module.set_rng_state(states[1], device)
        else:
            module.set_rng_state(states[1])
