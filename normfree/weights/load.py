"""Load weights into a network from a file or a mapping, in our names, the released ones or timm's; all or nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfree.suggest import number_of, problem
from normfree.weights.checksums import verify
from normfree.weights.haiku import read_haiku
from normfree.weights.names import shaped_as, to_our_names
from normfree.weights.run_weights import EXPORTED, MODEL_FILE, exported_file, model_files
from normfree.weights.tensor_file import read_tensors

# Suffixes of files that torch and others write as pickles; only `normfree convert` reads them, in a separate process.
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")  # timm's train.py writes .pth.tar
# Names of the classifier's parameters begin with this.
_CLASSIFIER = "head."
_FIRST_CONV = "stem.conv0.weight"

_logger = logging.getLogger(__name__)


def load_weights(
    net: nn.Module, source: str | Path | Mapping[str, Any], *, head: bool = True, adapt: bool = False
) -> None:
    """Load weights into a network. Every name and shape must match, otherwise nothing is loaded.

    The network keeps its own numerics: with timm's `dm_nfnet_f0` weights, `nfnet_f0` computes as the reference code
    does and `timm_dm_nfnet_f0` as timm does.

    Args:
        net: a network with the parameter names of this package, as `create_model` returns.
        source: a `.safetensors` file, a released `.npz` file, a model folder or run folder, a state dict, or a haiku
            tree `{module: {name: array}}`. Our names, the released ones and timm's are recognized. If the network has
            no classifier (`num_classes=0`), a classifier in the source is ignored.
        head: load the classifier too. False keeps the network's own, for other classes.
        adapt: accept weights for another number of image channels or classes, as timm does: the first convolution is
            changed by `adapt_input_channels`, and the network keeps its own classifier, with one line in the log.

    Raises:
        ValueError: the source cannot be read, names are missing or unknown, shapes differ, or a value is not finite.

    Examples:
        >>> trained = normfree.create_model("nf_resnet_nano", num_classes=3)
        >>> net = normfree.create_model("nf_resnet_nano", num_classes=5)
        >>> normfree.load_weights(net, trained.state_dict(), head=False)
        >>> (net.stem.conv0.weight == trained.stem.conv0.weight).all().item()
        True
    """
    title = "the state dict" if isinstance(source, Mapping) else str(source)
    state = to_our_names(source if isinstance(source, Mapping) else read_weights(Path(source)))
    if adapt:
        state, head = _adapted(net, state, head=head, source=title)
    if not head:
        own = {k: v for k, v in net.state_dict().items() if k.startswith(_CLASSIFIER)}
        state = {k: v for k, v in state.items() if not k.startswith(_CLASSIFIER)} | own
    load_state_dict_(net, state, source=title)


def adapt_input_channels(weight: Tensor, in_channels: int) -> Tensor:
    """Return the weight of a first convolution for images with another number of channels.

    For one channel, the weight is summed over the channels. For more, its channels are repeated in order up to that
    number, and divided by the factor by which their number grows.

    Args:
        weight: O I H W.
        in_channels: channels of the images.

    Returns:
        O `in_channels` H W in the dtype of `weight`.

    Source: timm 1.0.31, `adapt_input_conv`; equal to the last bit.
    """
    given = weight.shape[1]
    if given == in_channels:
        return weight
    wide = weight.float()
    if in_channels == 1:
        return wide.sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = wide.repeat(1, math.ceil(in_channels / given), 1, 1)[:, :in_channels]
    return (repeated * (given / float(in_channels))).to(weight.dtype)


def _adapted(
    net: nn.Module, state: Mapping[str, Tensor], *, head: bool, source: str
) -> tuple[dict[str, Tensor], bool]:
    """Return the state with the image channels of `net`, and whether its classifier fits that of `net`."""
    own, state = net.state_dict(), dict(state)
    wanted, given = own.get(_FIRST_CONV), state.get(_FIRST_CONV)
    if wanted is not None and given is not None and wanted.ndim == given.ndim == 4:
        state[_FIRST_CONV] = adapt_input_channels(given, wanted.shape[1])
        if wanted.shape[1] != given.shape[1]:
            _logger.info("%s: adapted from %d to %d image channels", source, given.shape[1], wanted.shape[1])
    sizes = [len(s[key]) if (key := f"{_CLASSIFIER}bias") in s else 0 for s in (own, state)]
    if head and sizes[0] and sizes[0] != sizes[1]:
        classes = number_of(sizes[1], "class") if sizes[1] else "no classifier"
        _logger.warning("%s has %s, so the classifier for %d classes is new", source, classes, sizes[0])
        head = False
    return state, head


def read_weights(path: Path) -> Mapping[str, Any]:
    """Read a weights file and return its tensors under their own names: a state dict, or a haiku tree for `.npz`.

    Args:
        path: a `.safetensors` or `.npz` file, a model folder or a run folder.

    Raises:
        ValueError: the file is broken or of another kind.
    """
    if path.is_dir():
        files = model_files(path)
        if files.weights.parent == files.folder:  # not the checkpoint of a run, which is verified already
            verify(files.folder, MODEL_FILE)
        path = files.weights
    if not path.is_file():
        raise ValueError(problem(f"{str(path)!r} does not exist", fix="give a file or folder of weights"))
    if path.suffix == ".npz":
        return read_haiku(path)
    kinds = ".safetensors, .npz or a model folder"
    if path.suffix in PICKLED:
        raise ValueError(
            problem(
                f"{path} is a pickle, which may run code",
                allowed=kinds,
                fix=f"convert it first with normfree convert {path} FOLDER",
            )
        )
    if path.suffix in EXPORTED:
        raise ValueError(exported_file(path))
    if path.suffix != ".safetensors":
        raise ValueError(problem(f"{path} is of an unknown kind", allowed=kinds))
    return read_tensors(path)


def load_state_dict_(net: nn.Module, state: Mapping[str, Tensor], *, source: str = "the state dict") -> None:
    """Load a state dict like `net.load_state_dict`, but all or nothing, and report every difference.

    A classifier in `state` is ignored if the network has none.

    Args:
        net: a network with the parameter names of this package.
        state: tensors by our names.
        source: what error messages call the state.

    Raises:
        ValueError: names are missing or unknown, shapes differ, or a value is not finite; nothing was changed.
    """
    own = net.state_dict()
    if not any(key.startswith(_CLASSIFIER) for key in own):
        state = {k: v for k, v in state.items() if not k.startswith(_CLASSIFIER)}
    state = {k: shaped_as(v, own[k]) if k in own else v for k, v in state.items()}
    problems = [f"{k} is missing" for k in own.keys() - state.keys()]
    problems += [f"{k} is unknown" for k in state.keys() - own.keys()]
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            problems.append(f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}")
        elif state[key].is_floating_point() and not torch.isfinite(state[key]).all():
            problems.append(f"{key} has values that are not finite")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        listed = "; ".join(sorted(problems)[:8])
        raise ValueError(f"{source} does not fit {_title(net)}: {listed}{more}.")
    net.load_state_dict(dict(state))


def _title(net: nn.Module) -> str:
    """Return what error messages call a network: its name and number of classes if it has them, else its class."""
    name = getattr(net, "name", "") or type(net).__name__
    classes = getattr(net, "num_classes", None)
    return f"{name} with {number_of(classes, 'class')}" if isinstance(classes, int) else str(name)
