"""The network of a run whose model is "fit": one that this machine can train."""

from __future__ import annotations

import torch

from normfree.data.transforms.normalize import height_and_width
from normfree.models.cost import count
from normfree.models.net import Net
from normfree.models.variants import variant_of
from normfree.training import memory
from normfree.training.config import Config, channels_of, size_of
from normfree.training.console import RunLog
from normfree.training.distributed.world import World
from normfree.training.memory_checks import state_bytes

# The network of the demo, which two cores train in minutes. A step of NFNet-F0 takes two hundred times as many
# multiply-accumulates for each image.
ON_A_CPU = "nf_resnet_micro_64"
# On a GPU, the first one that fits: the smallest networks of the two papers, then that of the demo.
ON_A_GPU = ("nfnet_f0", "nf_regnet_b0", ON_A_CPU)


def with_network(config: Config, world: World, run_log: RunLog) -> Config:
    """Return the config with a name in the key model instead of "fit", or with "auto" if it has weights."""
    if config.model != "fit":
        return config
    network = "auto"
    if not config.weights:
        # Free memory may differ between the processes; the main one decides.
        decision = chosen_network(config, world.device) if world.is_main else ("", "")
        network, reason = world.all_gather(decision)[0]
        run_log.info(reason)
    return config.model_copy(update={"model": network})


def chosen_network(config: Config, device: torch.device) -> tuple[str, str]:
    """Return the name of a network that `device` can train, and the reason in a sentence."""
    if device.type == "cpu":
        network, why = ON_A_CPU, f"there is no GPU, and a CPU would take hours or days for {ON_A_GPU[0]}"
        if config.device == "cpu":
            why = why.replace("there is no GPU, and ", "")
        return network, _sentence(network, why)
    limit = memory.free_bytes(device)
    needs = {}
    for network in ON_A_GPU:
        needs[network] = _needs(config, network)
        if needs[network] <= limit:
            break
    why = (
        f"it needs about {needs[network] / 1e9:.1f} GB of the {limit / 1e9:.1f} GB that are free on {device}"
    )
    return network, _sentence(network, why)


def _sentence(network: str, why: str) -> str:
    """Return the reason for a network as a sentence."""
    size = variant_of(network).train_size
    return f"no --model was given: {network} at {size} px, because {why}; normfree list prints the others"


def _needs(config: Config, network: str) -> int:
    """Return about how many bytes a run with a network needs."""
    variant = variant_of(network)
    with torch.device("meta"):
        net = Net(variant, name=network)
    given = config.input.image_size
    shape = height_and_width(variant.train_size if given == "auto" else size_of(given))
    # With micro-batches "auto", any network fits whose state does and one image.
    size = {"auto": 1, 0: config.input.batch_size}.get(config.input.micro_batch, config.input.micro_batch)
    fixed, each = memory.line(
        net, image_size=shape, channels=channels_of(given), half=config.precision == "bfloat16"
    )
    return state_bytes(4 * count(variant).parameters, config) + fixed + int(size) * each
