"""normfree: train, fine-tune, diagnose and deploy image classifiers without normalization layers.

The public names. They are imported on first use, so that `import normfree` and `normfree --help` take no time.
Training in Python is `normfree.train.loop.train`: a name here cannot be both that function and its package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normfree._version import __version__

if TYPE_CHECKING:
    from normfree.diagnose.dependence import batch_dependence
    from normfree.diagnose.gradients import gradient_report
    from normfree.diagnose.propagation import signal_propagation
    from normfree.inference import evaluate, predict
    from normfree.models.layers import WSConv2d, gain_of, scaled_activation
    from normfree.models.rows import VARIANTS
    from normfree.models.zoo import create_model, list_models
    from normfree.optim.agc import adaptive_clip_grad_
    from normfree.optim.ema import Ema
    from normfree.optim.groups import parameter_groups
    from normfree.optim.sgd import SGD
    from normfree.pretrained import from_pretrained, push_to_hub, save_pretrained
    from normfree.surgery.convert import convert_batchnorm

_OWNERS = {
    "batch_dependence": "diagnose.dependence",
    "gradient_report": "diagnose.gradients",
    "signal_propagation": "diagnose.propagation",
    "VARIANTS": "models.rows",
    "WSConv2d": "models.layers",
    "gain_of": "models.layers",
    "scaled_activation": "models.layers",
    "load_weights": "models.weights",
    "convert_batchnorm": "surgery.convert",
    "create_model": "models.zoo",
    "list_models": "models.zoo",
    "adaptive_clip_grad_": "optim.agc",
    "Ema": "optim.ema",
    "parameter_groups": "optim.groups",
    "SGD": "optim.sgd",
    "from_pretrained": "pretrained",
    "push_to_hub": "pretrained",
    "save_pretrained": "pretrained",
    "evaluate": "inference",
    "predict": "inference",
}

__all__ = [
    "SGD",
    "VARIANTS",
    "Ema",
    "WSConv2d",
    "__version__",
    "adaptive_clip_grad_",
    "batch_dependence",
    "convert_batchnorm",
    "create_model",
    "evaluate",
    "from_pretrained",
    "gain_of",
    "gradient_report",
    "list_models",
    "load_weights",
    "parameter_groups",
    "predict",
    "push_to_hub",
    "save_pretrained",
    "scaled_activation",
    "signal_propagation",
]


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module 'normfree' has no attribute {name!r}")
    return getattr(import_module(f"normfree.{_OWNERS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
