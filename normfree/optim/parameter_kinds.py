"""What each parameter of any network is: a weight, a gain, a bias, an embedding; decided by the type of its module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from normfree.optim.classifier import logits_layers
from normfree.suggest import did_you_mean, problem

GAINS, NORMALIZATION, EMBEDDINGS = "gains and biases", "normalization", "embeddings"
CLASSIFIER, WEIGHTS = "classifier", "weights"
# In the order of the groups.
KINDS = (GAINS, NORMALIZATION, EMBEDDINGS, CLASSIFIER, WEIGHTS)

LINEAR = (nn.Linear, nn.Bilinear, _ConvNd)
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
# Tables that a network adds to its activations (position embeddings and biases, tokens) belong to no type
# of layer, so their usual names decide; torch calls everything that is multiplied "weight".
TABLE = re.compile(r"pos|token|embed|bias|table|(^|_)rel(_|$)", re.IGNORECASE)


def parameter_kinds(model: nn.Module, classifier: str | Sequence[str]) -> dict[str, str]:
    """Return the kind of each parameter of a model, one of `KINDS`, by the name of the parameter.

    Args:
        model: any module.
        classifier: names of the modules that compute the logits, whose last linear layers count; () for none.

    Raises:
        ValueError: a name of `classifier` is not that of a module.
    """
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            hint = did_you_mean(name, modules)
            given = f"classifier has {name!r}, which is no module of {type(model).__name__}.{hint}"
            raise ValueError(problem(given, allowed="names of modules, or () for none"))
    layers = [layer for name in names for layer in logits_layers(modules[name])]
    logits = {id(p) for layer in layers for p in layer.parameters()}
    undecayed = set(_undecayed(model))
    kinds = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            kind = kind_of(module, full, parameter)
            if kind == WEIGHTS and id(parameter) in logits:
                kind = CLASSIFIER
            elif kind == WEIGHTS and full in undecayed:
                kind = EMBEDDINGS
            kinds[full] = kind
    return {name: kinds[name] for name, _ in model.named_parameters()}


def kind_of(owner: nn.Module, name: str, parameter: Tensor) -> str:
    """Return the kind of a parameter, without regard to the classifier.

    Args:
        owner: the module that has the parameter.
        name: of the parameter, with or without that of the module.
        parameter: the parameter.
    """
    own = name.rpartition(".")[2]
    if own == "bias":
        return GAINS
    if isinstance(owner, NORMS):
        return NORMALIZATION
    if isinstance(owner, LOOKUPS):
        return EMBEDDINGS
    is_linear = isinstance(owner, LINEAR) or hasattr(owner, "kernel_size")
    if is_linear and own == "weight":
        return WEIGHTS  # also one of shape (1, n)
    if parameter.numel() == max(parameter.shape, default=1):
        return GAINS  # scalars and vectors, also of shape (n, 1, 1)
    if "weight" in own or own.startswith("original"):  # original0, original1: of a parametrized weight
        return WEIGHTS
    is_table = parameter.shape[0] == 1 or TABLE.search(name if own.isdecimal() else own)
    return EMBEDDINGS if is_table else WEIGHTS


def _undecayed(model: nn.Module) -> Iterator[str]:
    """Yield the parameters that timm's `no_weight_decay()` names, of the model or a submodule."""
    for prefix, module in model.named_modules():
        getter = getattr(module, "no_weight_decay", None)
        if callable(getter):
            patterns = getter()
            for name, _ in module.named_parameters():
                if any(fnmatchcase(name, pattern) for pattern in patterns):
                    yield f"{prefix}.{name}" if prefix else name
