"""Registration of our variants with timm. `import normfree.timm` is all that is needed.

After it, `timm.create_model("nf_resnet_nano", in_chans=1, ...)` and all libraries that take networks by timm's names
know every variant of `list_models()`. Names that timm has keep timm's meaning; our variant of the same name is then
called `normfree_NAME` (`name_in_timm`).

Networks are made by `create_model`: every field of `Variant` is a keyword, and rates of dropout and stochastic depth
are those of the variant unless they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normfree.models.features import feature_info
from normfree.models.variant import Variant
from normfree.models.variants import VARIANTS, name_in_timm
from normfree.models.zoo import create_model
from normfree.preprocessing import SQUASH_UP_TO, published_preprocessing
from normfree.suggest import needs
from normfree.weights.hub import TAGS
from normfree.weights.names import to_our_names

with needs("normfree.timm", install="timm"):
    from timm.models import (
        PretrainedCfg,
        build_model_with_cfg,
        generate_default_cfgs,
        get_pretrained_cfg,
        is_model,
        register_model,
    )


def _configs(name: str, variant: Variant) -> dict[str, PretrainedCfg]:
    """Return timm's description of a variant's inputs, outputs and published weights, by its name with a tag."""
    ours: dict[str, Any] = {"architecture": None, "first_conv": "stem.conv0", "classifier": "head"}
    theirs = name.removeprefix("timm_") if name.startswith("timm_") else f"dm_{name}"
    published = get_pretrained_cfg(f"{theirs}.{TAGS[theirs]}") if theirs in TAGS else None
    if published is not None:
        return {f"{name_in_timm(name)}.{TAGS[theirs]}": replace(published, **ours)}
    preprocessing = published_preprocessing(name, variant.test_size)
    if variant.test_size <= SQUASH_UP_TO:  # as `normfree train` evaluates the variants for small images
        preprocessing = replace(preprocessing, crop="squash")
    config = preprocessing.to_config()
    ours |= {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    ours["input_size"] = (3, variant.train_size, variant.train_size)
    if variant.train_size != variant.test_size:
        ours["test_input_size"] = tuple(config["input_size"])
    return {name_in_timm(name): PretrainedCfg(**ours)}


def _our_names(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return weights by our names, for `load_pretrained` of timm."""
    return to_our_names(state)


def _entrypoint(name: str, variant: Variant) -> Callable[..., nn.Module]:
    """Return the function that timm calls to make a variant."""

    def network(
        *, device: torch.device | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> nn.Module:
        return create_model(name, **kwargs).to(device=device, dtype=dtype)

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        maps = tuple(range(len(feature_info(variant))))
        model: nn.Module = build_model_with_cfg(
            network,
            name_in_timm(name),
            pretrained,
            # Other classes of features that timm offers take the network apart, at its containers.
            feature_cfg={"feature_cls": "getter", "out_indices": maps, "flatten_sequential": True},
            pretrained_filter_fn=_our_names,
            **kwargs,
        )
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name_in_timm(name)
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = f"Return {name}; see `normfree.create_model`."
    return entrypoint


# `register_model` reads this name.
default_cfgs = generate_default_cfgs(
    {key: config for name, variant in VARIANTS.items() for key, config in _configs(name, variant).items()}
)

for _name, _variant in VARIANTS.items():
    # A later version of timm may have the name, and this module may be imported twice.
    if not is_model(name_in_timm(_name)):
        register_model(_entrypoint(_name, _variant))
