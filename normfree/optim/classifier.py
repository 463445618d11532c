"""Find the classifier of any network: the layer that AGC leaves alone ([B] section 4.1)."""

from __future__ import annotations

from torch import nn

from normfree.suggest import problem


def find_classifier(model: nn.Module) -> list[str]:
    """Return the names of the modules that compute the logits.

    If the model has timm's `get_classifier()`, they are what it returns: a module, or several (distilled networks), or
    none (`nn.Identity`). Otherwise it is the last linear layer or 1x1 convolution in the order of the modules, which in
    torchvision's and most other networks feeds the output.

    Raises:
        ValueError: the model has no `get_classifier()`, and no linear layer or 1x1 convolution.
    """
    names = {id(module): name for name, module in model.named_modules()}
    getter = getattr(model, "get_classifier", None)
    if callable(getter):
        found = getter()
        modules = found if isinstance(found, tuple | list) else [found]
        return [
            names[id(m)] for m in modules if isinstance(m, nn.Module) and any(True for _ in m.parameters())
        ]
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    if not linear:
        given = f"no classifier was found in a {type(model).__name__}"
        fix = "name the exempt modules, or pass exempt=() to clip all parameters"
        raise ValueError(problem(given, allowed="a linear layer or 1x1 convolution", fix=fix))
    return linear[-1:]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
